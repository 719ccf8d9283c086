"""Where generated answers end: how often one is cut or runs on, and what that costs. See benchmarks/README.md.

python benchmarks/eos.py RUN_FOLDER [RUN_FOLDER ...]

Each folder is a finished run on the built-in word problems. Its last checkpoint answers test problems of which only
the question is given, so that the whole room after it is masked, by each sampler with and without an end at EOS.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from _report import command_line, environment, settings, write
from torch import Tensor
from torch.utils.data import DataLoader

import puma_lightning
from puma_lightning import BlockSampler, LeftToRightSampler, ProgramAccuracy, Sampler
from puma_lightning.callbacks.generation import decoded
from puma_lightning.chain.student import Sample
from puma_lightning.data.text.token_cache import collate
from puma_lightning.data.word_problems import WordProblemsDataModule
from puma_lightning.modules.generative import GenerativeModule

LAST = "    return result"  # the last line of every program of the built-in problems


def judged(sample: Sample, batch: dict[str, Any], data: WordProblemsDataModule) -> dict[str, list[Any]]:
    """What became of each answer, as a column a row."""
    given = batch["prompt_mask"]
    texts = decoded(sample.tokens, given, data.decode, sample.attention_mask)
    completions = [text["completion"] for text in texts]
    verdicts = ProgramAccuracy(timeout=5).judge(completions, batch["answer"])
    real = ~given if sample.attention_mask is None else ~given & sample.attention_mask
    # Before the first EOS, and after it.
    is_eos = (sample.tokens == data.eos_id) & real
    after = is_eos.cumsum(1) > 0
    lines = [text.rstrip("\n").split("\n") for text in completions]
    last = [LAST in each for each in lines]
    has_eos = is_eos.any(1).tolist()
    return {
        "right": [each["correct"] for each in verdicts],
        "unparsable": [each["outcome"] == "unparsable" for each in verdicts],
        "no_eos": [not found for found in has_eos],
        "cut": [not found for found in last],
        "runs_on": [found and each[-1] != LAST for found, each in zip(last, lines, strict=True)],
        "text_after_eos": (after & real & ~is_eos).any(1).tolist(),
        "length": (real & ~after).sum(1).tolist(),
        "passes": sample.nfe.tolist(),
    }


def shares(columns: dict[str, list[Any]]) -> dict[str, float]:
    return {name: round(sum(values) / len(values), 4) for name, values in columns.items()}


def samplers_of(module: GenerativeModule, paces: list[int]) -> list[Any]:
    if module.sampler_class is LeftToRightSampler:
        return [LeftToRightSampler()]
    settings: list[dict[str, Any]] = [{"tokens_per_step": pace} for pace in paces]
    settings += [{"threshold": 0.9}]
    within = [Sampler(**each, end_at_eos=ends) for each in settings for ends in (False, True)]
    return [BlockSampler(each) for each in within] if module.sampler_class is BlockSampler else within


def answer(module: GenerativeModule, data: WordProblemsDataModule, name: str, sampler: Any, number: int, size: int):
    """Complete the first problems of a set, and judge them."""
    batches = DataLoader(data._sets[name], batch_size=size, collate_fn=collate)
    columns: dict[str, list[Any]] = {}
    seconds, left = 0.0, number
    for index, whole in enumerate(batches):
        if left <= 0:
            break
        batch = {key: values[:left] for key, values in whole.items()}
        left -= len(batch["input_ids"])
        xt: Tensor = batch["input_ids"].masked_fill(~batch["prompt_mask"], data.mask_id)
        start = time.process_time()
        generator = module.evaluation_generator(0, index)
        sample = module.sample(xt, batch["prompt_mask"], sampler, generator, batch.get("attention_mask"))
        seconds += time.process_time() - start
        for key, values in judged(sample, batch, data).items():
            columns.setdefault(key, []).extend(values)
    return {**shares(columns), "cpu_seconds": round(seconds, 2)}


def measured(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    data = WordProblemsDataModule(**{**config["data"]["init_args"], "num_test": max(1000, args.problems)})
    for name in ("predict", "test"):
        data._sets[name] = data._open(name)
    kind = getattr(puma_lightning, config["model"]["class_path"].split(".")[-1])
    module: GenerativeModule = kind.load_from_checkpoint(folder / "checkpoints/last.ckpt", map_location="cpu").eval()
    module.eos_id = data.eos_id  # type: ignore[assignment]  # runs of version 0.2.0 kept none
    found: dict[str, Any] = {}
    rooms = {"whole": "predict"}
    if data.padding != "eos" and module.sampler_class is not LeftToRightSampler:
        rooms["of the answer"] = "test"
    for room, name in rooms.items():
        for sampler in samplers_of(module, args.paces):
            if room != "whole" and getattr(getattr(sampler, "within", sampler), "end_at_eos", False):
                continue
            result = answer(module, data, name, sampler, args.problems, args.batch_size)
            found.setdefault(room, {})[sampler.name] = result
            print(f"{folder.parent.name:<10} {room:<14} {sampler.name:<26}", *(f"{k} {v}" for k, v in result.items()))
    return {"settings": settings(folder), "sequence_length": data.sequence_length, "rooms": found}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="of finished runs, with config.yaml and checkpoints")
    parser.add_argument("--problems", type=int, default=256, help="of the test set")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--paces", type=int, nargs="+", default=[1, 2], help="tokens per step")
    parser.add_argument("--threads", type=int, help="CPU threads; default what PyTorch chooses")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/eos.json"))
    return parser


def main() -> None:
    args = parser().parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    report: dict[str, Any] = {
        "command": command_line(),
        **environment(),
        "problems": args.problems,
        "runs": {folder.parent.name: measured(folder, args) for folder in args.folders},
    }
    write(args.out, report)


if __name__ == "__main__":
    main()

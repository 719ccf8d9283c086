"""What a GPU says: tests, training steps, sampling, the output layer and the host, in ten minutes.

python benchmarks/gpu.py --out gpu [--reference PATH]

Every part is a process of its own with a time limit, so that none stops the others; ``gpu.json`` in the folder is
written after each. Boards and texts are random: how long a step takes does not depend on them. What each part measures
is said by its function.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from _report import command_line, environment, write
from _turns import synchronise
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from puma_lightning import (
    ChainDiagnostics,
    Confidence,
    Margin,
    MaskedDiffusion,
    ProgressiveUnmasking,
    RandomMasking,
    Sampler,
    TransformerBackbone,
    WarmupCosine,
)
from puma_lightning.training.captured import RowsOnDevice

ROOT = Path(__file__).parents[1]
# The paper's models, and small ones to try this script on a CPU.
MODELS: dict[str, dict[str, Any]] = {
    "sudoku": {"vocab_size": 11, "hidden_size": 256, "intermediate_size": 768, "num_layers": 8, "num_heads": 8,
               "qkv_bias": True, "learned_positions": True, "length": 162, "prompt": 81},
    "tinygsm": {"vocab_size": 151_645, "hidden_size": 512, "intermediate_size": 1536, "num_layers": 14, "num_heads": 8,
                "qkv_bias": True, "tie_embeddings": True, "length": 512, "prompt": 256},
    "tiny": {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 24, "num_layers": 1, "num_heads": 2,
             "length": 12, "prompt": 4},
}  # fmt: skip
SMALL = ("--length", "16", "--vocab-size", "50", "--hidden-size", "16")
SECONDS = {
    "capability": 60, "exact": 90, "sudoku": 150, "tinygsm": 150, "sampling": 90, "host": 60, "head": 60, "tests": 120,
    "published": 150,
}  # fmt: skip


class Rows(Dataset[dict[str, Tensor]]):
    """Random sequences of one length, a batch of which is made at once."""

    one_length = True

    def __init__(self, model: dict[str, Any], size: int = 4096) -> None:
        self.tokens = torch.randint(model["vocab_size"] - 1, (size, model["length"]))
        self.given = torch.arange(model["length"]) < model["prompt"]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "prompt_mask": self.given}


class Clock(pl.Callback):
    """The time from one optimizer step to another, when the device has done all of it; and the host's time for it."""

    every_step = True

    def __init__(self, start: int, end: int, device: str) -> None:
        self.start, self.end, self.device = start, end, device
        self.seconds = self.host = 0.0
        self.losses: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].detach())
        if trainer.global_step not in (self.start, self.end):
            return
        queued = time.perf_counter()
        synchronise(self.device)
        self.host = queued - self.host if trainer.global_step == self.end else time.perf_counter()
        self.seconds = time.perf_counter() - self.seconds


def run(args: argparse.Namespace, model: str, process: Any, steps: int, warm: int = 60, **options: Any) -> Clock:
    """Train a model of the paper under a Trainer, as the shipped configs do."""
    settings = dict(MODELS["tiny" if args.tiny else model])
    length, _ = settings.pop("length"), settings.pop("prompt")
    pl.seed_everything(0, verbose=False)
    compiled = options.pop("compile", args.device == "cuda")
    large = model == "tinygsm"
    module = MaskedDiffusion(
        TransformerBackbone(**settings, max_length=length, compile=compiled),
        settings["vocab_size"] - 1,
        process,
        optimizer=partial(torch.optim.AdamW, lr=3e-4, weight_decay=0.01, fused=True),
        scheduler=partial(WarmupCosine, warmup_steps=10),
        captured=options.pop("captured", False),
        steps_per_execution=options.pop("executions", 1),
    )
    if large and args.tiny:
        module.large_vocabulary = 1
    clock = Clock(warm, warm + steps, args.device)
    callbacks = [clock, *options.pop("callbacks", [])]
    if large:
        callbacks.append(EMAWeightAveraging(use_buffers=False, decay=0.9999))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint = options.pop("ckpt_path", None)
        trainer = pl.Trainer(
            accelerator="gpu" if args.device == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed" if args.device == "cuda" else "32-true",
            default_root_dir=folder,
            max_steps=options.pop("until", warm + steps),
            gradient_clip_val=1.0,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=options.pop("logger", True),
            callbacks=callbacks,
            **{"log_every_n_steps": 20, "enable_checkpointing": False, **options},
        )
        rows = Rows(MODELS["tiny" if args.tiny else model])
        trainer.fit(module, DataLoader(rows, 32, shuffle=True), ckpt_path=checkpoint)
    return clock


def timed(args: argparse.Namespace, model: str, sides: dict[str, dict[str, Any]], steps: int) -> dict[str, Any]:
    """Milliseconds of a step of each side, and how many times as fast as the others the first is."""
    found: dict[str, Any] = {}
    for name, options in sides.items():
        if options.get("captured") and args.device != "cuda":
            found[name] = {"skipped": "a CUDA graph needs a GPU"}
            continue
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        clock = run(args, model, options.pop("process"), steps, **options)
        found[name] = {
            "ms_a_step": round(1e3 * clock.seconds / steps, 3),
            "ms_of_the_host": round(1e3 * clock.host / steps, 3),
        }
        if args.device == "cuda":
            found[name]["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        say(name, found[name])
    return found


# The parts -------------------------------------------------------------------------------------------------------


def capability(args: argparse.Namespace) -> dict[str, Any]:
    """Name, memory, products in bfloat16 and bandwidth, as measured."""
    if args.device != "cuda":
        return {"skipped": "no GPU"}
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    big = torch.empty(2**30, device="cuda", dtype=torch.float32)
    product, copy = partial(torch.mm, a, a), partial(big.mul_, 1.0)
    seconds = {}
    for name, work in (("product", product), ("copy", copy)):
        times = []
        for _ in range(12):
            synchronise("cuda")
            start = time.perf_counter()
            work()
            synchronise("cuda")
            times.append(time.perf_counter() - start)
        seconds[name] = statistics.median(times[2:])
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "cuda": torch.version.cuda,
        "tflops": round(2 * 8192**3 / seconds["product"] / 1e12, 1),
        "tbytes": round(2 * big.nbytes / seconds["copy"] / 1e12, 3),
    }


def exact(args: argparse.Namespace) -> dict[str, Any]:
    """Whether recorded steps are the unrecorded ones, and a resumed recorded run the uninterrupted one."""
    if args.device != "cuda":
        return {"skipped": "a CUDA graph needs a GPU"}
    process = ProgressiveUnmasking(8, threshold=0.9)
    with tempfile.TemporaryDirectory() as folder:
        saves = ModelCheckpoint(folder, "saved", every_n_train_steps=24, save_top_k=-1)
        common: dict[str, Any] = {"captured": True, "until": 48, "logger": False, "compile": False}
        whole = losses(run(args, "sudoku", process, 48, 0, callbacks=[saves], enable_checkpointing=True, **common))
        saved = next(Path(folder).glob("saved*.ckpt"))
        rest = losses(run(args, "sudoku", process, 48, 0, ckpt_path=saved, executions=4, **common))
        with unrecorded():
            plain = losses(run(args, "sudoku", process, 48, 0, **common))
    return {
        "largest_difference_of_recorded_and_unrecorded": difference(whole, plain),
        "largest_difference_of_resumed_and_uninterrupted": difference(whole[-len(rest) :], rest),
        "steps_resumed": len(rest),
    }


def sudoku(args: argparse.Namespace) -> dict[str, Any]:
    """The paper's Sudoku step under a Trainer, with callbacks."""
    puma, steps = partial(ProgressiveUnmasking, 8), 40 if args.tiny else 400
    sides: dict[str, dict[str, Any]] = {
        "PUMA, recorded, 20 in an execution": {"process": puma(), "captured": True, "executions": 20},
        "PUMA, recorded": {"process": puma(), "captured": True},
        "baseline, recorded, 20 in an execution": {"process": RandomMasking(), "captured": True, "executions": 20},
        "PUMA, compiled": {"process": puma()},
        "PUMA": {"process": puma(), "compile": False},
        "baseline, compiled": {"process": RandomMasking()},
    }
    for options in sides.values():
        options["callbacks"] = [LearningRateMonitor(), ChainDiagnostics()]
    found = timed(args, "sudoku", sides, steps)
    first = found["PUMA, recorded, 20 in an execution"].get("ms_a_step")
    baseline = found["baseline, recorded, 20 in an execution"].get("ms_a_step")
    if first:
        found["PUMA over baseline, recorded"] = round(first / baseline, 3)
        found["minutes_of_112000_steps"] = round(112_000 * first / 6e4, 1)
    return found


def tinygsm(args: argparse.Namespace) -> dict[str, Any]:
    """The paper's TinyGSM step of 125M parameters, 32 x 512, with EMA."""
    process, steps = partial(ProgressiveUnmasking, 12, threshold=0.9), 20 if args.tiny else 80
    found = timed(
        args,
        "tinygsm",
        {
            "recorded, 20 in an execution": {"process": process(), "captured": True, "executions": 20, "warm": 40},
            "compiled": {"process": process(), "warm": 20},
        },
        steps,
    )
    if args.tiny:
        return found
    counted = ROOT / "benchmarks/results/bytes.json"
    teraflop = json.loads(counted.read_text())["shapes"]["tinygsm"]["parts"]["all"]["teraflop"]
    for side in found.values():
        if "ms_a_step" in side:
            side["tflops"] = round(teraflop / side["ms_a_step"] * 1e3, 1)
            side["tokens_a_second"] = round(32 * 512 / side["ms_a_step"] * 1e3)
    return found


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The paper's six samplers on 256 puzzles; and a text, 2 positions in a pass, beside the textbook's way."""
    settings = dict(MODELS["tiny" if args.tiny else "sudoku"])
    length, prompt = settings.pop("length"), settings.pop("prompt")
    module = MaskedDiffusion(TransformerBackbone(**settings, max_length=length), settings["vocab_size"] - 1)
    module = module.to(args.device).eval()
    x0 = torch.randint(settings["vocab_size"] - 1, (256, length), device=args.device)
    given = (torch.arange(length, device=args.device) < prompt).expand(x0.shape)
    samplers = [Sampler(policy, number) for policy in (Confidence(), Margin()) for number in (1, 2, 3)]
    times = []
    for _ in range(2 if args.tiny else 4):
        synchronise(args.device)
        start = time.perf_counter()
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            for sampler in samplers:
                module.sample(x0, given, sampler)
        synchronise(args.device)
        times.append(time.perf_counter() - start)
    found: dict[str, Any] = {"six_samplers_seconds": {"first": round(times[0], 3), "then": round(min(times[1:]), 3)}}
    words = ["--device", args.device, "--tokens-per-step", "2"]
    if args.device == "cuda":
        words += ["--precision", "bf16", "--length", "512", "--vocab-size", "151645", "--hidden-size", "512"]
    if args.tiny:
        words += [*SMALL, "--num-layers", "1", "--num-heads", "2"]
    return found | {"text": another("sampling.py", *words, *reference(args))}


def host(args: argparse.Namespace) -> dict[str, Any]:
    """What a step costs the host, around a model too small to matter."""
    return another("host.py", *(["--rounds", "1", "--steps", "64"] if args.tiny else ["--rounds", "3"]))


def head(args: argparse.Namespace) -> dict[str, Any]:
    """The output layer of a large vocabulary, beside the textbook's."""
    words = ["--device", args.device]
    if args.tiny:
        words += [*SMALL, "--full-batch-size", "0", "--rounds", "1"]
    elif args.device == "cuda":
        words += ["--precision", "bf16"]
    return another("head.py", *words)


def tests(args: argparse.Namespace) -> dict[str, Any]:
    """The tests that need a GPU."""
    files = sorted(path for path in ROOT.glob("tests/**/test_*.py") if "cuda.is_available" in path.read_text())
    chosen = "on_a_gpu or cuda" if not args.tiny else "on_a_gpu_the_refill"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-k", chosen, *map(str, files)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout)}
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR", "E  "))]
    return {**counts, "failures": failed[:40]}


def published(args: argparse.Namespace) -> dict[str, Any]:
    """The step beside that of the published code, for which ``--reference`` is needed."""
    if args.reference is None:
        return {"skipped": "give --reference, a checkout of JaeyeonKim01/PUMA"}
    words = ["--device", args.device, "--shapes", "sudoku", "--memory-batch-sizes", "--rounds", "20"]
    words += ["--precision", "bf16-mixed", "--compile"] if args.device == "cuda" else []
    return another("train_step.py", *words, *reference(args))


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "capability": capability, "exact": exact, "sudoku": sudoku, "tinygsm": tinygsm, "sampling": sampling, "host": host,
    "head": head, "tests": tests, "published": published,
}  # fmt: skip


def losses(clock: Clock) -> list[float]:
    return [float(loss) for loss in clock.losses]


def difference(one: list[float], other: list[float]) -> float:
    """The largest difference, in parts of the value; 0 says that they are the same."""
    return max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True))


@contextmanager
def unrecorded() -> Iterator[None]:
    """Take steps that are made to be recorded as they are."""
    before = RowsOnDevice._is_usual
    RowsOnDevice._is_usual = lambda rows, group: False  # type: ignore[method-assign]
    try:
        yield
    finally:
        RowsOnDevice._is_usual = before  # type: ignore[method-assign]


def reference(args: argparse.Namespace) -> list[str]:
    return [] if args.reference is None else ["--reference", str(args.reference)]


def another(script: str, *words: str) -> dict[str, Any]:
    """Run another of the benchmarks, and return its report."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        command = [sys.executable, str(Path(__file__).with_name(script)), *words, "--out", str(path)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        report: dict[str, Any] = json.loads(path.read_text())
        return report


def say(*words: Any) -> None:
    print(*words, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=10, help="after which no part begins, and a running one ends")
    parser.add_argument("--reference", type=Path, help="a checkout of JaeyeonKim01/PUMA, to compare with it too")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models and few steps, to try this script")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        warnings.filterwarnings("ignore")
        print(json.dumps(PARTS[args.part](args)))
        return
    report: dict[str, Any] = {"command": command_line(), **environment(args.device), "parts": {}}
    end = time.monotonic() + 60 * args.minutes
    for number, name in enumerate(args.only):
        left = end - time.monotonic()
        limit = min(left, SECONDS[name])
        say(f"[{number + 1}/{len(args.only)}] {name}: at most {limit:.0f} s, {left / 60:.1f} min left")
        began = time.monotonic()
        report["parts"][name] = {"skipped": "no time left"} if left <= 0 else part(name, limit)
        report["parts"][name]["seconds"] = round(time.monotonic() - began, 1)
        write(args.out / "gpu.json", report)


def part(name: str, seconds: float) -> dict[str, Any]:
    """Run a part in a process of its own, and return what it found, or what became of it."""
    command = [sys.executable, __file__, *sys.argv[1:], "--part", name]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"not over after {seconds:.0f} s"}
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"failed": f"ended with {done.returncode}"}
    return found


if __name__ == "__main__":
    main()

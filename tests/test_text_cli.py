"""The text configs, run in process as a user would run them: five ways to train one model."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from puma_lightning import AutoregressiveLM, MaskedDiffusion, TransformerBackbone
from puma_lightning.cli import main
from puma_lightning.data.word_problems import make_problems

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = [
    "--model.init_args.backbone.init_args.hidden_size=16",
    "--model.init_args.backbone.init_args.intermediate_size=16",
    "--model.init_args.backbone.init_args.num_layers=1",
    "--model.init_args.backbone.init_args.num_heads=2",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.accelerator=cpu",
    "--trainer.precision=32-true",
]
WORDS = [
    "--data.num_train=60",
    "--data.num_val=6",
    "--data.num_test=5",
    "--data.batch_size=4",
    "--data.eval_batch_size=4",
    "--data.vocab_size=300",
    "--data.sequence_length=256",
    "--model.init_args.backbone.init_args.max_length=256",
]
NAMES = ("ar", "mdm", "puma", "mdm_from_ar", "puma_from_ar")
BLOCK_NAMES = {"tinygsm": ("block_mdm", "block_puma"), "words": ("block_mdm", "block_puma", "block_curriculum")}


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def tinygsm_files():
    """Rows in TinyGSM's and GSM8K's format, and flags that put them in the place of the hub's."""
    program = "def simple_math_problem() -> int:\n    result = {0} + 1\n    return result\n"
    rows = [{"question": f"What comes after {i}?", "code": program.format(i)} for i in range(40)]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    gold = [{"question": f"What comes after {i}?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(50, 53)]
    Path("gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in gold))
    return [
        "--data.train_file=train.jsonl", "--data.gsm8k_file=gsm8k.jsonl", "--data.tokenizer=null",
        "--data.mask_token=<|mask|>", "--data.vocab_size=300", "--data.sequence_length=96", "--data.num_val=4",
        "--data.batch_size=4", "--data.eval_batch_size=4", "--data.num_workers=0",
    ]  # fmt: skip


def start_weights(**changes):
    """An autoregressive checkpoint of the size of `SMALL`."""
    sizes = dict(hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, qkv_bias=True, tie_embeddings=True)
    backbone = TransformerBackbone(300, causal=True, **{**sizes, **changes})
    torch.save({"state_dict": AutoregressiveLM(backbone, 1, 0).state_dict()}, "ar.ckpt")
    return ["--model.init_args.init_from=ar.ckpt"]


METHODS = [path for path in sorted(CONFIGS.glob("[tw]*/*.yaml")) if "model:" in path.read_text()]


@pytest.mark.parametrize("path", METHODS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_config_runs(path):
    scale, name = path.parent.name, path.stem
    assert name in (*NAMES, *BLOCK_NAMES[scale])
    options = tinygsm_files() if scale == "tinygsm" else WORDS
    if name.endswith("from_ar"):
        options = options + start_weights()
    if scale == "tinygsm" and name in BLOCK_NAMES[scale]:
        options = [*options, "--model.init_args.block_size=48"]
    if name == "block_curriculum":
        options = [*options, "--model.init_args.block_size=[[0,4],[150,16],[300,256]]"]
    main(["fit", "--config", str(CONFIGS / scale / f"{name}.yaml"), *SMALL, *options, "--trainer.fast_dev_run=2"])
    assert not Path("runs").exists()


@pytest.mark.parametrize("scale", ["tinygsm", "words"])
def test_configs_differ_in_what_they_are_named_for_only(scale, parsed):
    configs = {name: parsed(CONFIGS / scale / f"{name}.yaml") for name in NAMES}
    for name, config in configs.items():
        model = config["model"]["init_args"]
        assert (model.get("init_from") is not None) == model.get("shifted", False) == name.endswith("from_ar")
        for key in ("init_from", "shifted"):
            model.pop(key, None)
        process = model.pop("forward_process", {}).get("class_path", "").removeprefix("puma_lightning.")
        assert process == ("" if name == "ar" else "RandomMasking" if "mdm" in name else "ProgressiveUnmasking")
        assert model["backbone"]["init_args"].pop("causal") == (name == "ar")
    assert all(configs[name] == configs["mdm"] for name in NAMES if name != "ar")
    for part in (configs["ar"], configs["mdm"]):
        del part["model"]["class_path"], part["model"]["init_args"]["sampler"]
        callbacks = part["trainer"]["callbacks"]
        part["trainer"]["callbacks"] = [c for c in callbacks if not c.get("init_args", {}).get("monitor")]
        del part["trainer"]["callbacks"][0]["init_args"]["samplers"]
    assert configs["ar"] == configs["mdm"]


def whole(value):
    """A config of the words with its parts."""
    if isinstance(value, dict):
        return {name: whole(inner) for name, inner in value.items()}
    named = isinstance(value, str) and value.endswith(".yaml")
    return whole(yaml.safe_load((CONFIGS / "words" / value).read_text())) if named else value


def write_config(name, changes=()):
    """A config of the words, but 2 steps, validated and saved after both; `changes` are pairs of old and new text."""
    text = yaml.safe_dump(whole(f"{name}.yaml"), default_flow_style=None, width=1000)
    replaced = [("max_steps: 1200", "max_steps: 2"), ("val_check_interval: 300", "val_check_interval: 2")]
    for old, new in [*replaced, ("every_n_train_steps: 100", "every_n_train_steps: 2"), *changes]:
        assert old in text
        text = text.replace(old, new)
    Path("configs/words").mkdir(parents=True, exist_ok=True)
    Path(f"configs/words/{name}.yaml").write_text(text)
    return ["fit", "--config", f"configs/words/{name}.yaml", *SMALL, *WORDS]


def fit(name, *options):
    main([*write_config(name), *options])
    return Path("runs/words") / name / "version_0"


def test_from_autoregressive_weights_to_judged_predictions(capsys):
    ar = fit("ar")
    run = fit("puma_from_ar")  # finds the other's checkpoint by its place
    said = capsys.readouterr().out
    assert "left_to_right        program_accuracy" in said and "confidence_2         program_accuracy" in said
    text = (run / "samples.md").read_text()
    assert "## Step 2" in text and "### confidence_2 1, " in text and "answer: " in text
    model = MaskedDiffusion.load_from_checkpoint(run / "checkpoints/last.ckpt")
    assert model.shifted and model.mask_id == 1
    assert AutoregressiveLM.load_from_checkpoint(ar / "checkpoints/last.ckpt").eos_id == 0

    for name, folder in (("ar", ar), ("puma_from_ar", run)):
        checkpoint = str(folder / "checkpoints/last.ckpt")
        main(["predict", "--config", f"configs/words/{name}.yaml", *SMALL, *WORDS, "--ckpt_path", checkpoint])
        (written,) = Path("runs/words", name).rglob("predictions.jsonl")
        lines = [json.loads(line) for line in written.read_text().splitlines()]
        assert len(lines) == 5
        for line in lines:
            assert line["prompt"].endswith("?\n") and isinstance(line["completion"], str)
            assert line["outcome"] in ("ok", "unparsable", "crashed", "timed_out")
            assert line["correct"] in (True, False) and float(line["answer"]) > 0 and line["nfe"] > 0
            assert "program_result" in line


def test_answers_end_at_the_eos_of_the_data():
    """If the sampler is to end there; the command line links it, and a checkpoint keeps it."""
    run = fit("mdm")
    saved = f"{run}/checkpoints/last.ckpt"
    base = ["predict", "--config", "configs/words/mdm.yaml", *SMALL, *WORDS, "--ckpt_path", saved]
    nfe = []
    for name, ends in (("off", "false"), ("on", "true")):
        main([*base, f"--name={name}", f"--model.init_args.sampler.init_args.end_at_eos={ends}"])
        (written,) = Path("runs", name).rglob("predictions.jsonl")
        nfe.append([json.loads(line)["nfe"] for line in written.read_text().splitlines()])
    assert all(on <= off for off, on in zip(*nfe, strict=True))
    assert MaskedDiffusion.load_from_checkpoint(saved).eos_id == 0


def test_a_checkpoint_of_another_tokenizer_is_refused(refused):
    fit("ar")
    with refused(r"tokenizer: expected .*use the tokenizer it was trained with"):
        fit("mdm_from_ar", "--data.seed=1")  # other training problems, so another trained tokenizer


def test_a_missing_or_misshapen_start_is_told_before_training(refused):
    with refused(r"found no file at runs/words/ar/version_0/checkpoints/last.ckpt"):
        fit("puma_from_ar")
    with refused(r"is \(300, 24\) instead of \(300, 16\)"):
        fit("puma_from_ar", *start_weights(hidden_size=24))
    assert not list(Path("runs").rglob("*.ckpt"))


def test_the_sampler_of_another_model_is_told_by_name(refused):
    with refused(r"a LeftToRightSampler for AutoregressiveLM, got a Sampler"):
        fit("ar", "--trainer.callbacks+=GenerationEvaluation", "--trainer.callbacks.metrics={p: ProgramAccuracy}",
            "--trainer.callbacks.samplers=[{policy: Confidence}]")  # fmt: skip


def test_the_environment_of_the_trainer_stays(monkeypatch):
    before = dict(os.environ)
    fit("ar")
    assert {name: os.environ.get(name) for name in before} == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ar", "puma"])
def test_a_resumed_run_has_the_losses_of_the_uninterrupted_one(name):
    """Through validation, generation and the text cache."""
    every = [("filename: last", 'filename: "{step}", save_top_k: -1'), ("max_steps: 2", "max_steps: 4")]
    command = [*write_config(name, every), "--trainer.log_every_n_steps=1"]
    main(command)
    whole = losses(name, "version_0")
    assert list(whole) == ["0", "1", "2", "3"] and len(set(whole.values())) == 4
    main([*command, "--ckpt_path", f"runs/words/{name}/version_0/checkpoints/step=2.ckpt"])
    # The batch after which the checkpoint was saved, before it was logged, is logged again.
    assert losses(name, "version_1") == {step: whole[step] for step in ("1", "2", "3")}


def losses(name, version):
    """Every training loss of a run, all digits, by step."""
    with Path("runs/words", name, version, "metrics.csv").open() as file:
        return {row["step"]: row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]}


COUNTED = """
import os
from pathlib import Path
from puma_lightning import ProgramAccuracy

class Counted(ProgramAccuracy):
    def update(self, completions: list[str], answers: list[str]) -> None:
        super().update(completions, answers)
        with Path(f"judged{os.environ.get('LOCAL_RANK', 0)}").open("a") as file:
            file.writelines(f"{answer}\\n" for answer in answers)

    def compute(self):
        return {**super().compute(), "total": self.total}
"""


@pytest.mark.slow
def test_two_processes_judge_every_problem_once():
    """As a user runs it; each rank runs the programs of its own half, and the accuracy is of both halves."""
    Path("counted.py").write_text(COUNTED)
    command = [*write_config("puma", [("program: ProgramAccuracy", "program: counted.Counted")]), "--data.num_val=10"]
    two = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PL_", "LOCAL_RANK"))}
    done = subprocess.run(
        [sys.executable, "-m", "puma_lightning", *command, *two], capture_output=True, text=True, timeout=240,
        env={**environment, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Trained for 2 optimizer steps" in done.stdout and "(10 sequences" in done.stdout
    with Path("runs/words/puma/version_0/metrics.csv").open() as file:
        (total,) = (row["val/program_total/confidence_2"] for row in csv.DictReader(file) if row["val/loss"])
    assert float(total) == 10
    judged = [Path(f"judged{rank}").read_text().split() for rank in (0, 1)]
    assert [len(answers) for answers in judged] == [5, 5]
    assert sorted(judged[0] + judged[1]) == sorted(row["answer"] for row in make_problems(10, 0, "val"))

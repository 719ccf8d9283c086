"""The command line, run in process as a user would run it."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from puma_lightning import MaskedDiffusion, ProgressiveUnmasking
from puma_lightning.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"
TINY = [
    "--data.order=4",
    "--data.clues=6",
    "--data.num_train=40",
    "--data.num_val=10",
    "--data.num_test=10",
    "--data.batch_size=8",
    "--data.eval_batch_size=8",
    "--model.init_args.backbone.init_args.hidden_size=16",
    "--model.init_args.backbone.init_args.intermediate_size=16",
    "--model.init_args.backbone.init_args.num_layers=1",
    "--model.init_args.backbone.init_args.num_heads=2",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.accelerator=cpu",
]


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(command, *options, config="quickstart.yaml"):
    main([command, "--config", str(config if isinstance(config, Path) else CONFIGS / config), *TINY, *options])


def quick():
    """The quickstart, but 6 steps, validated and saved every 3."""
    text = (CONFIGS / "quickstart.yaml").read_text()
    for name, number in (("max_steps: 1200", 6), ("val_check_interval: 300", 3), ("every_n_train_steps: 300", 3)):
        assert name in text
        text = text.replace(name, f"{name.split(':')[0]}: {number}")
    Path("configs").mkdir(exist_ok=True)
    Path("configs/quickstart.yaml").write_text(text)
    return Path("configs/quickstart.yaml")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder that ``fit()`` leaves behind."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        fit()
    return folder


def as_trained(trained):
    """Here, what ``fit()`` leaves behind: as good as calling it, where only what it leaves is looked at."""
    shutil.copytree(trained, Path(), dirs_exist_ok=True)
    return Path("runs/quickstart/version_0")


def fit(*options):
    run("fit", *options, config=quick())
    return max(Path("runs/quickstart").iterdir(), key=lambda version: int(version.name.split("_")[1]))


def evaluated(folder):
    """The last validation in a run's metrics.csv."""
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    return {name: float(value) for row in rows for name, value in row.items() if name.startswith("val/") and value}


@pytest.mark.parametrize(
    "config",
    sorted(
        str(path.relative_to(CONFIGS))
        for path in CONFIGS.rglob("*.yaml")
        if path.parent.name in ("configs", "sudoku") and "model:" in path.read_text()
    ),
)
def test_every_config_runs(config):
    # A pool has no more chains than there are puzzles, of which there are few here.
    pool = ["--model.init_args.forward_process.init_args.pool=16"] if "pool" in config else []
    run("fit", "--trainer.fast_dev_run=2", *pool, config=config)
    assert {path.name for path in Path().iterdir()} <= {"cache"}  # a trial run leaves nothing behind


@pytest.mark.parametrize(
    ("name", "process"),
    [
        ("puma", "ProgressiveUnmasking"),
        ("small_puma", "ProgressiveUnmasking"),
        ("small_pool", "ProgressiveUnmasking"),
        ("small_mixed", "MixedMasking"),
        ("small_self_aligned", "SelfAlignedMasking"),
    ],
)
def test_baseline_and_others_differ_in_one_block(name, process, parsed):
    names = ("small_mdm" if "small" in name else "mdm", name)
    mdm, other = (parsed(CONFIGS / "sudoku" / f"{name}.yaml") for name in names)
    for config, expected in zip((mdm, other), ("RandomMasking", process), strict=True):
        assert config["model"]["init_args"].pop("forward_process")["class_path"] == f"puma_lightning.{expected}"
    assert mdm == other


@pytest.mark.parametrize(
    ("config", "options", "folder"),
    [
        ("configs/sudoku/mine.yaml", (), "sudoku/mine"),
        ("mine.yaml", (), "mine"),
        ("mine.yaml", ("--name", "a/b"), "a/b"),
    ],
)
def test_a_run_has_a_name(config, options, folder):
    """By default that of its config; both loggers use it, and what was saved goes on under it."""
    Path(config).parent.mkdir(parents=True, exist_ok=True)
    Path(config).write_text(quick().read_text())
    tiny = ("--trainer.max_steps=1", "--trainer.val_check_interval=5", "--trainer.log_every_n_steps=1", *options)
    run("fit", *tiny, config=Path(config))
    saved = Path("runs", folder, "version_0")
    assert yaml.safe_load((saved / "config.yaml").read_text())["name"] == folder
    assert (saved / "metrics.csv").exists() and list(saved.glob("events.out.tfevents.*"))
    main(["fit", "--config", str(saved / "config.yaml")])
    assert (Path("runs", folder, "version_1") / "metrics.csv").exists()


@pytest.mark.parametrize("name", ["", "/somewhere", "../other", "a/../../b", "a//b", "a/"])
def test_a_name_that_leads_out_of_the_folder_is_refused(name, capsys):
    with pytest.raises(SystemExit):
        run("fit", "--name", name, "--trainer.max_steps=1")
    assert "name: expected a path below runs/" in capsys.readouterr().err


def test_a_config_may_be_given_as_text():
    """It has no path to be named by."""
    main(["fit", "--config", quick().read_text(), *TINY, "--trainer.max_steps=1", "--trainer.val_check_interval=5"])
    assert Path("runs/unnamed/version_0/config.yaml").exists()


def test_a_logger_that_is_given_wins():
    run(
        "fit",
        "--trainer.logger=CSVLogger",
        "--trainer.logger.save_dir=logs",
        "--trainer.max_steps=1",
        "--trainer.log_every_n_steps=1",
    )
    assert not Path("runs").exists() and list(Path("logs").rglob("metrics.csv"))


def test_a_config_finds_its_parts_from_anywhere_and_they_can_be_overridden(parsed, capsys):
    """By flags and by a second config."""
    changes = {
        "data": {"init_args": {"seed": 7}},
        "model": {"init_args": {"backbone": {"init_args": {"num_layers": 3}}}},
    }
    Path("changes.yaml").write_text(yaml.safe_dump(changes))
    config = CONFIGS / "sudoku" / "puma.yaml"
    flags = ["--trainer.max_steps=5", "--data.augment=3", "--trainer.callbacks+=DeviceStatsMonitor"]
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(config), "--config", "changes.yaml", *flags, "--print_config"])
    got, expected = yaml.safe_load(capsys.readouterr().out), parsed(config)
    expected["data"]["init_args"].update(seed=7, augment=3)
    expected["model"]["init_args"]["backbone"]["init_args"]["num_layers"] = 3
    expected["trainer"]["max_steps"] = 5
    assert got["trainer"]["callbacks"].pop()["class_path"].endswith("DeviceStatsMonitor")
    assert got == expected


@pytest.mark.parametrize(
    "given",
    [["--model.init_args.forward_process.init_args.threshold", "null"], ["--model.forward_process.threshold=null"]],
)
def test_null_can_be_given_for_what_is_deep_in_a_config(given, capsys):
    """As for what is not."""
    config = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    config["model"]["init_args"]["forward_process"]["init_args"]["threshold"] = 0.9
    Path("mine.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit):
        main(["fit", "--config", "mine.yaml", *given, "--model.init_args.scheduler=null", "--print_config"])
    settings = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert settings["forward_process"]["init_args"]["threshold"] is None and settings["scheduler"] is None


def test_fit_leaves_everything_a_user_needs(capsys):
    folder = fit()
    for name in ("config.yaml", "metrics.csv", "unmasking_order.png", "checkpoints/best.ckpt", "checkpoints/last.ckpt"):
        assert (folder / name).stat().st_size > 0, name
    assert list(folder.glob("events.out.tfevents.*"))
    assert [version.name for version in folder.parent.iterdir()] == ["version_0"]  # one for all loggers
    said = capsys.readouterr().out
    assert "Trained for 6 optimizer steps" in said
    assert "confidence_1         solved" in said
    for line in ("last checkpoint .*last.ckpt", "best checkpoint .*best.ckpt", "unmasking order .*unmasking_order.png"):
        assert re.search(line, said)


def test_the_saved_config_runs_again_and_checkpoints_rebuild_the_model(trained):
    folder = as_trained(trained)
    main(["test", "--config", str(folder / "config.yaml"), "--ckpt_path", str(folder / "checkpoints/last.ckpt")])
    model = MaskedDiffusion.load_from_checkpoint(folder / "checkpoints/last.ckpt")
    assert isinstance(model.forward_process, ProgressiveUnmasking)
    assert model.mask_id == 5
    assert model.vocab_size == 6


@pytest.mark.parametrize("option", [None, "--ckpt_path", "--model.init_args.init_from"])
def test_weights_come_from_where_it_says_or_it_is_said_that_they_are_random(trained, option):
    checkpoint = as_trained(trained) / "checkpoints/last.ckpt"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run("validate", *([option, str(checkpoint)] if option else []), config=quick())
    assert any("weights are random" in str(warning.message) for warning in said) == (option is None)
    saved, found = (evaluated(folder) for folder in sorted(Path("runs/quickstart").iterdir()))
    assert (found["val/loss"] == saved["val/loss"]) == (option is not None)


def test_training_in_half_precision_runs_as_the_configs_are():
    """A fused optimizer, whose gradients are clipped."""
    fit("--trainer.precision=bf16-mixed")


def test_the_command_line_wins_over_the_checkpoint(trained):
    folder = as_trained(trained)
    checkpoint = folder / "checkpoints/last.ckpt"
    again = fit(
        "--ckpt_path", str(checkpoint), "--trainer.max_steps=9",
        "--model.init_args.forward_process.init_args.num_stages=3",
    )  # fmt: skip
    saved = torch.load(again / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 9
    assert saved["puma_lightning"]["ranks"][0]["stream"]["groups"][0]["num_stages"] == 3


def test_predict_writes_one_json_line_a_puzzle(trained):
    folder = as_trained(trained)
    Path("puzzles.txt").write_text("1...\n" * 3 + "................\n")
    Path("puzzles.txt").write_text("1000003000020400\n" * 11)
    run(
        "predict", "--ckpt_path", str(folder / "checkpoints/last.ckpt"), "--data.predict_file=puzzles.txt",
        "--model.init_args.sampler={policy: Margin, tokens_per_step: 4}",
    )  # fmt: skip
    (written,) = Path("runs").rglob("predictions.jsonl")
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(11))
    for line in lines:
        assert line["nfe"] == 3  # 12 empty cells, 4 at a time
        assert line["tokens"][0] == 1 and line["reveal_step"][0] == -1
        assert 5 not in line["tokens"]
        assert line["text"] == "".join(map(str, line["tokens"]))


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("--model.init_args.forward_process.init_args.thresold=0.9", "Option 'thresold' is not accepted"),
        (
            "--model.init_args.forward_process.init_args.threshold=1.5",
            r"threshold: expected .*, got 1.5",
        ),
        (
            "--model.init_args.forward_process.init_args.num_stages=0",
            "num_stages: expected .* got 0",
        ),
        (
            "--model.init_args.forward_process.init_args.num_stages=[[0, 4], [0, 6]]",
            "num_stages: expected steps that increase",
        ),
        ("--model.init_args.sampler.init_args.top_p=0", r"top_p: expected .*, got 0"),
        ("--trainer.max_steps=many", "max_steps.*\n.*int"),
        ("--data.order=5", "order: expected.*5"),
        ("--model.init_args.forward_process=NoSuchProcess", "NoSuchProcess"),
    ],
)
def test_bad_settings_are_refused_by_name(option, named, capsys):
    with pytest.raises((SystemExit, ValueError)) as refusal:
        run("fit", option)
    said = capsys.readouterr().err + str(refusal.value)
    assert re.search(named, said.split("error:")[-1]), said[-2000:]
    assert not Path("runs").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", None])
def test_a_damaged_or_foreign_checkpoint_is_refused_by_name(content, refused):
    if content is None:
        torch.save({"weights": torch.zeros(2)}, "damaged.ckpt")
    else:
        Path("damaged.ckpt").write_bytes(content)
    with refused(r"damaged\.ckpt"):
        run("fit", "--ckpt_path=damaged.ckpt")
    assert not Path("runs").exists()


def test_own_classes_replace_ours_from_yaml(tmp_path, monkeypatch):
    """A forward process, a policy, a backbone and a DataModule of the user's own, in a file of their own."""
    (tmp_path / "mine.py").write_text(
        """
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from puma_lightning import ForwardProcess

def rightmost_first(logits: torch.Tensor, xt: torch.Tensor) -> torch.Tensor:
    return torch.arange(xt.shape[1]).expand(xt.shape).float()

class MaskEverything(ForwardProcess):
    def start(self, chains, generator=None):
        return chains

class Bag(torch.nn.Module):
    def __init__(self, vocab_size: int, width: int = 8):
        super().__init__()
        self.vocab_size = vocab_size
        self.embed = torch.nn.Embedding(vocab_size, width)
        self.head = torch.nn.Linear(width, vocab_size)
    def forward(self, xt):
        x = self.embed(xt)
        return self.head(x + x.mean(1, keepdim=True))

class Numbers(pl.LightningDataModule):
    vocab_size, mask_id = 6, 5
    def train_dataloader(self):
        return DataLoader([{"input_ids": torch.randint(0, 5, (9,))} for _ in range(32)], batch_size=4)
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = {
        "model": {
            "class_path": "MaskedDiffusion",
            "init_args": {
                "backbone": {"class_path": "mine.Bag", "init_args": {"width": 4}},
                "forward_process": {"class_path": "mine.MaskEverything"},
                "sampler": {"policy": "mine.rightmost_first"},
            },
        },
        "data": {"class_path": "mine.Numbers"},
        "trainer": {"max_steps": 3, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"},
    }
    Path("mine.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "mine.yaml", "--trainer.enable_progress_bar=false"])
    puma = {"class_path": "ProgressiveUnmasking", "init_args": {"num_stages": 3, "policy": "mine.rightmost_first"}}
    config["model"]["init_args"]["forward_process"] = puma
    Path("mine.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "mine.yaml"])


@pytest.mark.slow
def test_two_processes_share_the_work_and_resume_exactly():
    """As a user runs it: the launcher starts `python -m puma_lightning` again for the second process.

    Of the fast tests, ``test_old_runs`` resumes two such processes, and ``test_resume`` looks at what each one holds.
    """
    quick()
    command = [
        sys.executable,
        "-m",
        "puma_lightning",
        "fit",
        "--config=configs/quickstart.yaml",
        *TINY,
        "--data.batch_size=4",
    ]
    two = ["--trainer.devices=2", "--trainer.strategy=ddp"]

    def weights(*options):
        subprocess.run([*command, *two, *options], check=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
        folder = max(Path("runs/quickstart").iterdir())
        assert (folder / "unmasking_order.png").exists()
        return folder / "checkpoints/last.ckpt"

    whole = weights()
    half = weights("--trainer.max_steps=3", "--model.init_args.scheduler.init_args.total_steps=6")
    resumed = weights("--ckpt_path", str(half))
    first, second = (torch.load(path, weights_only=True) for path in (whole, resumed))
    assert first["global_step"] == second["global_step"] == 6
    assert first["puma_lightning"]["world_size"] == len(first["puma_lightning"]["ranks"]) == 2
    for name, tensor in first["state_dict"].items():
        assert torch.equal(tensor, second["state_dict"][name])
    # Sharding the validation over two processes changes nothing but who does it.
    two_processes = evaluated(whole.parents[1])
    run("validate", "--ckpt_path", str(whole), config=Path("configs/quickstart.yaml"))
    one_process = evaluated(max(Path("runs/quickstart").iterdir()))
    assert one_process.keys() == two_processes.keys() >= {"val/cells/confidence_1", "val/nfe/confidence_1"}
    for name, value in one_process.items():
        if name not in ("val/loss", "val/perplexity"):  # their masks are drawn for each batch and rank
            assert value == pytest.approx(two_processes[name]), name
    folder = fit("--data.batch_size=4", "--ckpt_path", str(half))
    alone = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert alone["global_step"] == 6 and alone["puma_lightning"]["world_size"] == 1

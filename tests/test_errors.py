"""What is refused on purpose is a sentence on the command line, whenever it comes; everything else is a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from puma_lightning.cli import main
from puma_lightning.data.base import at_least
from puma_lightning.errors import last_words, sentence_of

MINE = """
import os
import signal
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from puma_lightning.data.base import at_least

class Rows(torch.utils.data.Dataset):
    def __init__(self, fault: str):
        self.fault = fault
    def __len__(self):
        return 32
    def __getitem__(self, index):
        row = {"input_ids": torch.full((9,), index % 5)}
        if self.fault == "mask" or (self.fault == "late" and index == 5):
            row["input_ids"][3] = 5
        if self.fault == "ragged" and index % 2:
            row["input_ids"] = row["input_ids"][:4]
        if self.fault == "of ours":
            at_least("length", 0, 1)
        if self.fault == "bug":
            row["input_ids"] = row["nothing"]
        if self.fault == "own":
            raise ValueError("of the data set")
        return row

def wrong_shape(logits: torch.Tensor, xt: torch.Tensor) -> torch.Tensor:
    return logits

class Stop(pl.Callback):
    def on_after_backward(self, trainer, pl_module):
        os.kill(os.getpid(), signal.SIGTERM)

class Data(pl.LightningDataModule):
    vocab_size, mask_id = 6, 5
    def __init__(self, train: str = "", val: str = "", workers: int = 0):
        super().__init__()
        self.train, self.val = train, val
        self.workers = workers
    def train_dataloader(self):
        return DataLoader(Rows(self.train), batch_size=4, num_workers=self.workers)
    def val_dataloader(self):
        return DataLoader(Rows(self.val), batch_size=4, num_workers=self.workers)
"""
TINY = {"vocab_size": 6, "hidden_size": 16, "intermediate_size": 16, "num_layers": 1, "num_heads": 2}
RUN = {
    "accelerator": "cpu", "max_steps": 6, "val_check_interval": 3, "num_sanity_val_steps": 0, "logger": False,
    "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    Path("mine.py").write_text(MINE)


def configured(**data) -> list[str]:
    """The arguments of a run of the DataModule above."""
    backbone = {"class_path": "TransformerBackbone", "init_args": {k: v for k, v in TINY.items() if k != "vocab_size"}}
    config = {
        "model": {"class_path": "MaskedDiffusion", "init_args": {"backbone": backbone}},
        "data": {"class_path": "mine.Data", "init_args": data},
        "trainer": RUN,
    }
    Path("mine.yaml").write_text(yaml.safe_dump(config))
    return ["--config", "mine.yaml"]


CASES = {
    "setup": ({}, ["--trainer.reload_dataloaders_every_n_epochs=1"], "reload_dataloaders_every_n_epochs: expected 0"),
    "loader": ({}, ["--trainer.accumulate_grad_batches=20"], "batch_size: expected at least 80 training sequences"),
    "preflight": (
        {},
        ["--model.init_args.forward_process.class_path=ProgressiveUnmasking",
         "--model.init_args.forward_process.init_args.policy=mine.wrong_shape"],
        "policy: expected scores (B, L) = (4, 9), got (4, 9, 6)",
    ),
    "first batch": ({"train": "mask"}, [], "input_ids: expected clean data without the mask token 5"),
    "later batch": ({"train": "late"}, [], "input_ids: expected clean data without the mask token 5"),
    "validation": ({"val": "mask"}, [], "input_ids: expected clean data without the mask token 5"),
    "worker": ({"train": "of ours", "workers": 1}, [], "length: expected at least 1, got 0; raise it (batch"),
    "worker of validation": ({"val": "of ours", "workers": 1}, [], "length: expected at least 1, got 0; raise it"),
    "ragged, in a worker": ({"train": "ragged", "workers": 1}, [], "input_ids: expected sequences of one length"),
    "checkpoint": ({}, ["--ckpt_path=none.ckpt"], "ckpt_path: expected a checkpoint, found no file at none.ckpt"),
}  # fmt: skip


# What the Trainer and the optimizer refuse.
OF_OTHERS = {
    "a setting": ({}, ["--trainer.max_steps=-5"], "`max_steps` must be a non-negative integer or -1"),
    "an interval": ({}, ["--trainer.val_check_interval=10000"], "`val_check_interval` (10000) must be less than"),
    "a checkpoint": ({}, ["--ckpt_path=best"], '`.fit(ckpt_path="best")` is set but'),
    "a last checkpoint": ({}, ["--ckpt_path=last"], "ckpt_path: expected a last checkpoint in"),
    "an algorithm": ({}, ["--trainer.gradient_clip_algorithm=norn"], "`gradient_clip_algorithm` norn is invalid"),
    "a rate": (
        {}, ["--model.init_args.optimizer={class_path: torch.optim.AdamW, init_args: {lr: -1.0}}"],
        "optimizer: expected settings that it takes, got others: Invalid learning rate: -1.0; correct them",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OF_OTHERS)
def test_what_the_trainer_or_the_optimizer_refuses_is_one_sentence_too(case, capfd):
    """In their words."""
    data, options, said = OF_OTHERS[case]
    with pytest.raises(SystemExit) as ended:
        main(["fit", *configured(**data), *options])
    error = capfd.readouterr().err
    assert ended.value.code == 1 and "Traceback" not in error
    assert error.rstrip().splitlines()[-1].startswith(f"puma: error: {said}")


@pytest.mark.parametrize("case", CASES)
def test_what_is_refused_is_one_sentence(case, capfd):
    """While Lightning sets up, before training, in it, in validation, and in another process."""
    data, options, said = CASES[case]
    with pytest.raises(SystemExit) as ended:
        main(["fit", *configured(**data), *options])
    assert ended.value.code == 1
    error = capfd.readouterr().err
    (line,) = (line for line in error.splitlines() if line.startswith("puma: error: "))
    assert line.startswith(f"puma: error: {said}")
    assert "; " in line and "Traceback" not in error and error.rstrip().endswith(line)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("fault", "kind"), [("bug", KeyError), ("own", ValueError)])
def test_what_is_not_ours_keeps_its_traceback(fault, kind, workers):
    """A bug, and what a data set of somebody else's refuses: it says itself where, and we say which batch."""
    with pytest.raises(kind) as raised:
        main(["fit", *configured(train=fault, workers=workers)])
    assert "__getitem__" in [entry.name for entry in raised.traceback] or "in __getitem__" in str(raised.value)
    if fault == "own":
        assert any("batch after 0 training sequences" in note for note in raised.value.__notes__)


def test_a_traceback_is_shown_on_request(capfd, monkeypatch):
    """And the sentence is the last line all the same."""
    monkeypatch.setenv("PUMA_TRACEBACK", "1")
    for options, code in (CASES["setup"][1], 1), (["--model.init_args.sampler.init_args.top_p=0"], 2):
        with pytest.raises(SystemExit) as ended:
            main(["fit", *configured(), *options])
        assert ended.value.code == code
        error = capfd.readouterr().err
        assert "Traceback (most recent call last)" in error and "error: " in error.splitlines()[-1]


def test_a_run_that_is_asked_to_end_is_no_error(capfd):
    """It keeps its exit code."""
    with pytest.raises(SystemExit) as ended:
        main(["fit", *configured(), "--trainer.callbacks=mine.Stop"])
    assert ended.value.code == 143 and "error" not in capfd.readouterr().err


def test_only_a_raise_of_ours_is_ours():
    """Not what a built-in function refuses in our code, a broken invariant, or an error of a caller's."""

    def of(function, *args):
        with pytest.raises(BaseException) as raised:
            function(*args)
        return sentence_of(raised.value)

    def theirs():
        raise ValueError("theirs")

    assert of(at_least, "n", 0, 1) == "n: expected at least 1, got 0; raise it"
    assert of(at_least, "n", 1, "low") is None  # TypeError of a comparison
    assert of(theirs) is None
    assert of(torch.zeros(2).view, 3) is None
    assert last_words(RuntimeError("a: b")) == "a: b"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("who", "said"),
    [("1", ["puma: error (process 1): "]), ("0 1", ["puma: error: "])],
    ids=["one process", "both processes"],
)
def test_processes_say_it_once_and_none_is_left(who, said):
    """The first one for all; another one by its number."""
    Path("mine.py").write_text(
        MINE.replace(
            "self.train, self.val = train, val",
            """
        self.train, self.val = train if os.environ.get("LOCAL_RANK", "0") in os.environ["WHO"] else "", val""",
        )
    )
    command = [sys.executable, "-m", "puma_lightning", "fit", *configured(train="mask"), "--trainer.devices=2"]
    done = subprocess.run(
        [*command, "--trainer.strategy=ddp"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "WHO": who},
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("puma: error")]
    assert len(lines) == len(said) and all(map(str.startswith, lines, said)), done.stderr[-3000:]
    assert done.returncode

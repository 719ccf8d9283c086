"""A run that is resumed into the folder it logged to has the rows of the undisturbed run, each of them once."""

import csv
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from puma_lightning import MaskedDiffusion, ProgressiveUnmasking

V, MASK, LENGTH = 6, 5, 8


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vocab_size = V
        self.embed = nn.Embedding(V, 8)
        self.out = nn.Linear(8, V)

    def forward(self, xt: Tensor) -> Tensor:
        h = self.embed(xt)
        return self.out(h + h.mean(1, keepdim=True))


class Late(pl.Callback):
    """Logs another column from some step on, and once more than Lightning does."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step > 9:
            pl_module.log("late", 1.0)


def run(folder: Path, steps: int = 16, ckpt: Any = None, callbacks: Any = (), **logger: Any) -> Path:
    """Train 12 batches an epoch; log every 2, validate and save every 4 and in between."""
    pl.seed_everything(0, verbose=False)
    x0 = torch.randint(MASK, (24, LENGTH), generator=torch.Generator().manual_seed(0))
    loader = DataLoader([{"input_ids": row} for row in x0], 2)
    process, optimizer = ProgressiveUnmasking(3), partial(torch.optim.AdamW, lr=0.01)
    module = MaskedDiffusion(Backbone(), MASK, process, optimizer=optimizer, scheduler=None)
    save = ModelCheckpoint(folder / "saved", filename="{step}", every_n_train_steps=1, save_top_k=-1, save_last=True)
    after = ModelCheckpoint(folder / "saved", filename="validated-{step}", save_top_k=-1)
    average = EMAWeightAveraging(use_buffers=False, decay=0.9)
    log = CSVLogger(folder, **{"name": "logs", "version": 0, "flush_logs_every_n_steps": 3, **logger})
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, val_check_interval=4, log_every_n_steps=2, num_sanity_val_steps=0,
        logger=log, callbacks=[Late(), average, save, after, *callbacks], enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader, loader, ckpt_path=ckpt)
    return Path(log.log_dir, "metrics.csv")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return [{name: value for name, value in sorted(row.items()) if value} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder and the rows of a run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, rows(run(folder))


@pytest.mark.parametrize("name", ["step=3", "step=4", "validated-step=4", "step=9", "step=12", "validated-step=12"])
def test_rows_before_the_checkpoint_stay_and_those_after_it_come_once(tmp_path, whole, name):
    """Whatever was logged after the checkpoint was saved, and whatever had not been logged yet when it was."""
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    resumed = run(tmp_path, ckpt=tmp_path / f"saved/{name}.ckpt")
    assert rows(resumed) == whole[1]
    assert rows(run(tmp_path, 20, tmp_path / "saved/last.ckpt"))[: len(whole[1])] == whole[1]  # and again


class Interrupted(pl.Callback):
    """Stops a run that has been resumed and has not begun to train."""

    def on_train_start(self, trainer, pl_module):
        raise KeyboardInterrupt


def test_an_exception_before_a_resumed_run_begins_changes_no_row(tmp_path, whole):
    """What is saved then goes on as the checkpoint would have, whatever rows the file still has."""
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    with pytest.raises(SystemExit):
        run(tmp_path, ckpt=tmp_path / "saved/step=9.ckpt", callbacks=[Interrupted(), OnExceptionCheckpoint(tmp_path)])
    assert rows(run(tmp_path, ckpt=tmp_path / "on_exception.ckpt")) == whole[1]


def test_rows_that_are_lost_stop_no_run(tmp_path, whole):
    """They are told of."""
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "logs/version_0/metrics.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    with pytest.warns(UserWarning, match=r"metrics.csv: expected the \d+ rows of this run, got 2; some are lost"):
        resumed = run(tmp_path, ckpt=tmp_path / "saved/step=9.ckpt")
    assert rows(resumed)[:2] == whole[1][:2] and rows(resumed)[2]["step"] > "8"


@pytest.mark.parametrize("options", [{"name": "", "version": ""}, {"name": "logs", "version": "here"}])
def test_a_folder_may_have_any_name(tmp_path, options):
    """Also that of the run itself."""
    run(tmp_path, 8, **options)
    resumed = run(tmp_path, 16, tmp_path / "saved/last.ckpt", **options)
    assert [row["step"] for row in rows(resumed)] == [row["step"] for row in rows(run(tmp_path / "whole", **options))]


def test_a_checkpoint_that_does_not_say_how_many_rows_there_were_goes_by_the_step(tmp_path, whole):
    """As those of earlier versions."""
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "saved/step=9.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["puma_lightning"]["rows"]
    torch.save(checkpoint, path)
    assert rows(run(tmp_path, ckpt=path)) == whole[1]


def test_a_run_that_is_refused_leaves_the_rows_as_they_were(tmp_path, whole):
    """Here by those of another run."""
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "logs/version_0/metrics.csv"
    path.write_text("step,train/loss\n1000,1.0\n")
    with pytest.raises(ValueError, match=r"logger: expected .*metrics.csv to have what this run logged up to step"):
        run(tmp_path, ckpt=tmp_path / "saved/step=9.ckpt")
    assert path.read_text() == "step,train/loss\n1000,1.0\n"
    assert [file.name for file in path.parent.glob("metrics*")] == ["metrics.csv"]


def test_a_run_that_is_not_resumed_begins_a_new_file(tmp_path, whole):
    """As Lightning has it."""
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    assert rows(run(tmp_path)) == whole[1]


def test_a_new_version_holds_its_own_rows_alone(tmp_path, whole):
    """As ever."""
    resumed = run(tmp_path, ckpt=whole[0] / "saved/step=9.ckpt", version=None)
    assert rows(resumed) == [row for row in whole[1] if int(row["step"]) >= 9]

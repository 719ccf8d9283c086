"""Checkpoints of which each process writes its part: safe as files are, and a run goes on from them exactly."""

import os
import subprocess
import sys
from pathlib import Path
from traceback import StackSummary
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from puma_lightning import MaskedDiffusion, TransformerBackbone
from puma_lightning.cli import newest_checkpoint
from puma_lightning.training.checkpoints import ShardedFolders, load_checkpoint

SCRIPT = """
import sys
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed._composable.fsdp import fully_shard
from torch.utils.data import DataLoader
from puma_lightning import MaskedDiffusion, TransformerBackbone

class Sharded(MaskedDiffusion):
    shards = False

    def configure_model(self):
        if not self.shards:
            fully_shard(self.backbone, mesh=self.device_mesh["data_parallel"])
            self.shards = True

class Losses(pl.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        with open(f"{folder}/losses.{trainer.global_rank}", "a") as file:
            print(trainer.fit_loop.epoch_loop.total_batch_idx, outputs["loss"].item().hex(), file=file)

if __name__ == "__main__":
    folder, steps, start = sys.argv[1], int(sys.argv[2]), (sys.argv[3:] or [None])[0]
    torch.set_num_threads(1)
    pl.seed_everything(0)
    x0 = torch.randint(5, (32, 8), generator=torch.Generator().manual_seed(0))
    backbone = TransformerBackbone(6, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, max_length=8)
    pl.Trainer(
        accelerator="cpu", devices=2, strategy=ModelParallelStrategy(2, 1), max_steps=steps, logger=False,
        accumulate_grad_batches=2, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[Losses(), ModelCheckpoint(folder, save_last=True, every_n_train_steps=2)],
    ).fit(Sharded(backbone, 5, scheduler=None), DataLoader([{"input_ids": row} for row in x0], 4), ckpt_path=start)
"""


def run(folder: Path, steps: int, start: Path | None = None) -> str:
    script = folder.parent / "sharded.py"
    script.write_text(SCRIPT)
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(script), str(folder), str(steps), *([str(start)] if start else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.mark.slow
def test_a_run_goes_on_exactly_from_a_sharded_checkpoint(tmp_path):
    """The checkpoint is a folder, whole, beside nothing half-written; what needs all weights at once refuses it."""
    run(tmp_path / "alone", 6)
    run(tmp_path / "parts", 4)
    last = tmp_path / "parts" / "last.ckpt"
    run(tmp_path / "parts", 6, last)
    for rank in range(2):
        alone, parts = ((tmp_path / name / f"losses.{rank}").read_text() for name in ("alone", "parts"))
        assert parts == alone
    assert sorted(os.listdir(last)) == [".metadata", "__0_0.distcp", "__1_0.distcp", "meta.pt"]
    assert not [name for name in os.listdir(last.parent) if name.startswith(".")]
    assert load_checkpoint(last)["global_step"] == 6
    version = tmp_path / "run" / "version_0"
    version.mkdir(parents=True)
    last.rename(version / "last.ckpt")
    assert newest_checkpoint(tmp_path / "run") == version / "last.ckpt"
    backbone = TransformerBackbone(6, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, max_length=8)
    with pytest.raises(ValueError, match=r"init_from: expected a checkpoint in one file.*consolidate_checkpoint"):
        MaskedDiffusion(backbone, 5, init_from=str(version / "last.ckpt")).load_weights(str(version / "last.ckpt"))
    assert torch.load(version / "last.ckpt" / "meta.pt", weights_only=True)["global_step"] == 6


class Strategy:
    """What a sharded save needs of a strategy, with one process, and a save that goes wrong."""

    is_global_zero = True

    def __init__(self, error: BaseException | None) -> None:
        self.error = error

    def broadcast(self, value: Any) -> Any:
        return value

    def barrier(self) -> None: ...

    def save_checkpoint(self, checkpoint: dict, folder: Path, storage_options: Any = None) -> None:
        (Path(folder) / "shard").write_text(checkpoint["text"])
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left"),
        RuntimeError("No space left"),
        CheckpointException("save", {0: (OSError("full"), StackSummary())}),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_save_that_fails_leaves_the_earlier_folder_and_says_so(tmp_path, error):
    """PyTorch says that a disk is full in more than one way, one of which is no Exception."""
    ShardedFolders(Strategy(None))({"text": "old"}, tmp_path / "last.ckpt")
    with pytest.raises(OSError, match=r"checkpoint: expected to write .*last\.ckpt.*what was there before is whole"):
        ShardedFolders(Strategy(error))({"text": "new"}, tmp_path / "last.ckpt")
    assert os.listdir(tmp_path) == ["last.ckpt"]
    assert (tmp_path / "last.ckpt" / "shard").read_text() == "old"


def test_a_folder_that_cannot_be_made_stops_all_processes(tmp_path):
    """The first one tells the others, which would wait for it."""
    (tmp_path / "file").write_text("")
    told = []

    class First(Strategy):
        def broadcast(self, value: Any) -> Any:
            told.append(value)
            return value

    class Other(Strategy):
        is_global_zero = False

        def broadcast(self, value: Any) -> Any:
            return told.pop(0)

    for strategy in (First(None), Other(None)):
        with pytest.raises(OSError, match=r"expected to write .*nothing was there before"):
            ShardedFolders(strategy)({"text": "new"}, tmp_path / "file" / "last.ckpt")

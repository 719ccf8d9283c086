"""Checkpoint files: written whole or not at all, and checked before anything is taken from them."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities import rank_zero_warn
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.strategies import Strategy
from torch.distributed.checkpoint.api import CheckpointException
from tqdm import tqdm

from puma_lightning.files import clear_unfinished, replacing, replacing_folder
from puma_lightning.training.lightning_internals import shares_weights_out

CHECKPOINT_KEY = "puma_lightning"
_NOT_SHARDED = "meta.pt"  # where Lightning writes what is not cut into shards
LARGE_FILE = 2**30  # bytes from which checking one takes long enough to be watched


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's checkpoint files, of which a damaged one is never read and a good one never lost.

    One is written beside the file that it replaces, which stays as it was until the new one is whole and on the disk;
    and all checksums in one are compared before anything in it is used. Paths that are not local are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint, unless a better one would be lost, see ``ExactResume.save``.

        Raises:
            OSError: If it could not be written. The earlier file is still there.
        """
        if storage_options is not None or not _is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        if problem := checkpoint.get(CHECKPOINT_KEY, {}).get("not_to_be_written"):
            rank_zero_warn(f"no checkpoint saved at {path}: {problem}")
            return
        try:
            with replacing(Path(path)) as temporary, temporary.open("wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # PyTorch reports a full disk as a RuntimeError
            raise _unwritten(path, error) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint whose checksums are right.

        Raises:
            ValueError: If it is damaged.
        """
        if _is_local(path) and Path(path).is_file():
            check_sums(path)
            clear_unfinished(Path(path).parent)
        try:
            loaded: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only)
        except Exception as error:
            raise _unreadable(path, error) from error
        return loaded


def _unwritten(path: str | Path, error: BaseException) -> OSError:
    earlier = "what was there before is whole" if Path(path).exists() else "nothing was there before"
    return OSError(
        f"checkpoint: expected to write {path}, which failed ({_reason(error)}); {earlier}. Make room, or save "
        "to another disk (the dirpath of ModelCheckpoint), and go on from the last checkpoint with --ckpt_path"
    )


class ShardedFolders:
    """The ``save_checkpoint`` of a strategy that writes a folder, to which each process adds its shards.

    The earlier folder stays until the new one is whole, as with ``CheckpointFiles``.
    """

    def __init__(self, strategy: Strategy) -> None:
        self._strategy, self._save = strategy, strategy.save_checkpoint

    def __call__(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint, on all processes.

        Raises:
            OSError: If it could not be written. The earlier one is still there.
        """
        path = Path(self._strategy.broadcast(str(filepath)))
        with ExitStack() as stack:
            folder = self._on_first(path, lambda: stack.enter_context(replacing_folder(path)))
            try:
                self._save(checkpoint, folder, storage_options)
            except (OSError, RuntimeError, CheckpointException) as error:
                raise _unwritten(path, error) from error
            self._strategy.barrier()
            self._on_first(path, stack.close)

    def _on_first(self, path: Path, do: Callable[[], Any]) -> Any:
        """Do something in the first process; return what came of it, or raise what it raised, in all of them."""
        result, problem = None, None
        if self._strategy.is_global_zero:
            try:
                result = do()
            except OSError as error:
                problem = str(error)
        result, problem = self._strategy.broadcast((result, problem))
        if problem is not None:
            raise _unwritten(path, OSError(problem))
        return result


def _is_local(path: str | Path) -> bool:
    return "://" not in str(path)


def _reason(error: BaseException) -> str:
    """Return the first thing that went wrong: PyTorch's own message hides that a disk is full."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).splitlines()[0]


def make_saving_safe(trainer: pl.Trainer) -> None:
    """Have a Trainer read and write checkpoints by ``CheckpointFiles``, unless the user has chosen something else.

    With several processes nothing is saved on an exception: it stops one of them, which would wait for the others for
    ever, and could not save where they are.

    Raises:
        ValueError: If there is a callback for that alone.
    """
    if trainer.ckpt_path and _is_local(trainer.ckpt_path):
        clear_unfinished(Path(trainer.ckpt_path).parent)
    if shares_weights_out(trainer):
        if not isinstance(trainer.strategy.save_checkpoint, ShardedFolders):
            trainer.strategy.save_checkpoint = ShardedFolders(trainer.strategy)  # type: ignore[method-assign]
    elif type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = CheckpointFiles()
    if trainer.world_size == 1:
        return
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, OnExceptionCheckpoint):
            raise ValueError(
                f"callbacks: expected no OnExceptionCheckpoint with {trainer.world_size} processes, as an exception "
                "stops one of them and the others cannot be saved; save every n steps with ModelCheckpoint instead"
            )
        if isinstance(callback, ModelCheckpoint) and callback.save_on_exception:
            callback.save_on_exception = False
            rank_zero_warn("save_on_exception: without effect with several processes; the last checkpoint is kept")


def is_sharded(path: str | Path) -> bool:
    """Tell whether a checkpoint is a folder of shards, which only the strategy that wrote them can put together."""
    return (Path(path) / _NOT_SHARDED).is_file()


def check_sums(path: str | Path) -> None:
    """Compare the checksums in a checkpoint, which is a zip archive, with what the file holds.

    Raises:
        ValueError: If one differs, or the archive is not whole.
    """
    status = os.stat(path)
    _check_sums(str(path), status.st_size, status.st_mtime_ns, status.st_ino)


@lru_cache(maxsize=8)  # the command line looks at a file, Lightning reads it: one look is enough
def _check_sums(path: str, size: int, *unchanged: int) -> None:
    if not _is_archive(path):
        return  # PyTorch's format before 1.6, which has no checksums; or no checkpoint, which whoever reads it will say
    try:
        with (
            ZipFile(path) as archive,
            tqdm(total=size, desc=f"Checking {path}", unit="B", unit_scale=True, disable=size < LARGE_FILE) as bar,
        ):
            for entry in archive.infolist():
                with archive.open(entry) as file:
                    while chunk := file.read(2**20):
                        bar.update(len(chunk))
    except Exception as error:  # a damaged archive makes zipfile raise whatever its damage happens to look like
        raise ValueError(
            f"{path}: expected a whole checkpoint, got a damaged one: {error}; go on from another checkpoint, or from "
            "a copy of this one"
        ) from error


def _is_archive(path: str | Path) -> bool:
    try:
        return is_zipfile(path)
    except BadZipFile:  # a damaged one
        return True


def _unreadable(path: str | Path, error: Exception) -> ValueError:
    whole = _is_local(path) and _is_archive(path)
    cause = "it holds more than tensors and plain types" if whole else "it is truncated, or no checkpoint at all"
    return ValueError(f"{path}: expected a checkpoint, got a file that cannot be read as one: {cause}\n({error})")


def latest_checkpoint(trainer: pl.Trainer) -> Path | None:
    """Return the checkpoint written last in this run, by any ModelCheckpoint; else the one that it was resumed from."""
    paths = [
        Path(path)
        for callback in trainer.checkpoint_callbacks
        for path in (getattr(callback, "last_model_path", ""), getattr(callback, "best_model_path", ""))
        if path and Path(path).exists()
    ]
    resumed_from = Path(trainer.ckpt_path) if trainer.ckpt_path and Path(trainer.ckpt_path).exists() else None
    return max(paths, key=lambda path: path.stat().st_mtime, default=resumed_from)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a Lightning checkpoint on the CPU, without running any code in it; of a sharded one all but the weights.

    Raises:
        ValueError: If the file is missing, truncated, damaged or not a Lightning checkpoint.
    """
    clear_unfinished(Path(path).parent)
    if is_sharded(path):
        path = Path(path) / _NOT_SHARDED
    if not Path(path).is_file():
        raise ValueError(f"ckpt_path: expected a checkpoint, found no file at {path}; check the path")
    check_sums(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise _unreadable(path, error) from error
    if not isinstance(checkpoint, dict) or ("state_dict" not in checkpoint and Path(path).name != _NOT_SHARDED):
        raise ValueError(f"{path}: expected a Lightning checkpoint, got a file without a state_dict; check the path")
    return checkpoint

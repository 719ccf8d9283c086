"""Reading checkpoints, with errors that say what is wrong with one."""

from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import lightning.pytorch as pl
import torch
from torch import Tensor, nn


def latest_checkpoint(trainer: pl.Trainer) -> Path | None:
    """The checkpoint written last in this run, by any ModelCheckpoint."""
    paths = [
        Path(path)
        for callback in trainer.checkpoint_callbacks
        for path in (getattr(callback, "last_model_path", ""), getattr(callback, "best_model_path", ""))
        if path and Path(path).is_file()
    ]
    return max(paths, key=lambda path: path.stat().st_mtime, default=None)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a Lightning checkpoint on the CPU, without running any code in it.

    Raises:
        ValueError: If the file is missing, truncated or not a Lightning checkpoint.
    """
    if not Path(path).is_file():
        raise ValueError(f"no checkpoint at {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        whole = is_zipfile(path)
        cause = "damaged, or holds more than tensors and plain types" if whole else "truncated, or no checkpoint at all"
        raise ValueError(f"{path} cannot be read as a checkpoint: it is {cause}\n({error})") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{path} is not a Lightning checkpoint: it has no state_dict")
    return checkpoint


def check_weights(module: nn.Module, weights: dict[str, Tensor], origin: str) -> None:
    """Check that weights fit a module.

    Raises:
        ValueError: If names or shapes differ; says which.
    """
    own = module.state_dict()
    problems = [f"{name} is missing" for name in own if name not in weights]
    problems += [f"{name} is unknown" for name in weights if name not in own]
    problems += [
        f"{name} is {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"{origin} does not fit this model: {', '.join(problems[:3])}{more}; use the settings it was trained with"
        )

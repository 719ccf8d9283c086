"""Where callbacks put the pictures they draw during training."""

from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure


def save_picture(trainer: pl.Trainer, name: str, draw: Callable[[], Figure] | None) -> Path | None:
    """Draw a picture in the log directory, over an earlier one, and in TensorBoard. Call it on all ranks; rank 0 draws.

    Args:
        trainer: The Trainer that has the log directory.
        name: Name of the file, without its ending.
        draw: Returns the picture; None if there is nothing to draw.

    Returns:
        The file; None where nothing was drawn, as in a trial run.
    """
    folder = trainer.log_dir  # asks all ranks, so it must not be left to rank 0
    if draw is None or folder is None or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    figure = draw()
    path = Path(folder) / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(name, figure, trainer.global_step)
    return path

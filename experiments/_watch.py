"""What ``regimes.py`` adds to a run: its values after every validation, and an end in time."""

import csv
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

VALUES, DONE = "values.csv", "done"
Value = tuple[int, float, str, float]  # optimizer step, seconds, metric, value


class Watch(Callback):
    """Writes what is validated to ``values.csv`` of a folder, and an empty file ``done`` when a run is whole.

    Args:
        folder: Of the run.
        deadline: When to stop, in seconds of ``time.monotonic``; null for never.
    """

    def __init__(self, folder: str, deadline: float | None = None) -> None:
        self.folder = Path(folder)
        self.deadline = deadline
        self._before, self._began = 0.0, 0.0  # seconds that the run took before it was resumed, and when that was

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget what a resumed run does again."""
        kept = [value for value in read_values(self.folder) if value[0] <= trainer.global_step]
        self._before = max((seconds for _, seconds, _, _ in kept), default=0.0)
        self._began = time.monotonic()
        self._write("w", kept)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what was validated, and what the chains did."""
        seconds = round(self._before + time.monotonic() - self._began, 1)
        found = sorted(trainer.callback_metrics.items())
        self._write(
            "a",
            [
                (trainer.global_step, seconds, name, round(float(value), 6))
                for name, value in found
                if name.startswith(("val/", "chain/"))
            ],
        )

    def _write(self, mode: str, values: list[Value]) -> None:
        with (self.folder / VALUES).open(mode, newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(values)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop if it is time; the next process goes on from the last validation."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            trainer.should_stop = True

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say that the run is whole."""
        if trainer.global_step >= trainer.max_steps:
            (self.folder / DONE).touch()


def read_values(folder: Path) -> list[Value]:
    """Return what ``Watch`` has written."""
    path = folder / VALUES
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [(int(row[0]), float(row[1]), row[2], float(row[3])) for row in csv.reader(file)]

"""Several optimizer steps for each time that callbacks and loggers have a turn."""

import math
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from puma_lightning.training.lightning_internals import StepsBetween, saving_intervals

MOST = 64  # steps of an execution whose number is chosen here


class Executions:
    """Has a run take N optimizer steps in an execution, after which callbacks and loggers have their turn.

    Between them a step is what it is without: batches, seeds, clipping, optimizer, schedulers, averaged weights and the
    hooks of the module itself. So weights and losses are the same to the last bit, and counters, checkpoints and
    resumes mean the same. Callbacks see the last batch of each execution; one with an attribute ``every_step = True``
    has its ``on_train_batch_end`` called after every batch. An execution ends early at the end of an epoch and before a
    validation; the first batch of a resumed run is one of its own. What stops a run between turns, ``should_stop`` or a
    time limit, does so a little later than without.

    Args:
        steps: N; ``auto`` for the largest number up to 64 that divides all intervals that are set.

    Attributes:
        losses: Of every batch of the last execution, (n,), once it is over.

    Raises:
        ValueError: If the number is below 1.
    """

    def __init__(self, steps: int | Literal["auto"] = 1) -> None:
        if steps != "auto" and (type(steps) is not int or steps < 1):
            raise ValueError(
                f"steps_per_execution: expected a number of optimizer steps, or auto, got {steps!r}; 1 is a turn for "
                "callbacks after every step"
            )
        self.steps = steps
        self.losses: Tensor | None = None
        self._number = 1
        self._noted: list[Tensor] = []
        self._between: StepsBetween | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Executions, (self.steps,)  # a run is not part of copies of a module

    def set_up(self, trainer: pl.Trainer) -> None:
        """Find N for a fit.

        Raises:
            ValueError: If it does not divide an interval that is set.
        """
        self._number = self.number(trainer)

    def begin(self, trainer: pl.Trainer, on_device: bool = False) -> None:
        """Take N steps at a time from now on.

        Args:
            trainer: The Trainer of a run that begins.
            on_device: Whether batches are on the device, and as they are to be.
        """
        self.end()
        if self._number > 1:
            self._between = StepsBetween(trainer, self._number, on_device)

    def end(self) -> None:
        """Leave the Trainer as it was."""
        if self._between is not None:
            self._between.remove()
        self._between, self._noted = None, []

    def number(self, trainer: pl.Trainer) -> int:
        """Return N; 1 in a trial run of a few batches (``fast_dev_run``).

        Raises:
            ValueError: If it does not divide an interval that is set.
        """
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return 1
        intervals = _intervals(trainer)
        if self.steps == "auto":
            common = math.gcd(*(interval // batches for interval, batches in intervals.values()))
            return max(n for n in range(1, MOST + 1) if common % n == 0)
        for name, (interval, batches) in intervals.items():
            if interval % (whole := self.steps * batches):
                what = f"steps_per_execution {self.steps}" + (f" x accumulation {batches}" if batches > 1 else "")
                raise ValueError(
                    f"{name}: expected a multiple of {what}, as nothing happens within an execution, got {interval}; "
                    f"give {max(1, round(interval / whole)) * whole}, or steps_per_execution "
                    f"{math.gcd(interval // batches, self.steps)} or auto"
                )
        return self.steps

    def note(self, loss: Tensor) -> Tensor | None:
        """Note the loss of a batch; at the end of an execution return the mean over it, to be logged."""
        if self._between is None:
            self.losses = loss.detach()[None]
            return loss
        self._noted.append(loss.detach())
        if self._between.within:
            return None
        self.losses, self._noted = torch.stack(self._noted), []
        return self.losses.mean()


def _intervals(trainer: pl.Trainer) -> dict[str, tuple[int, int]]:
    """Return after what something happens, by what it is set with, and how many of that are an optimizer step."""
    found = {name: (steps, 1) for name, steps in saving_intervals(trainer).items()}
    every: Any = trainer.log_every_n_steps  # type: ignore[attr-defined]
    if trainer.loggers and every:
        found["log_every_n_steps"] = (every, 1)
    if trainer.max_steps > 0:
        found["max_steps"] = (trainer.max_steps, 1)
    # In batches. One that falls into an accumulation window ends an execution early, as the end of an epoch does.
    batches, parts = getattr(trainer, "val_check_interval", None), trainer.accumulate_grad_batches  # or a time
    if type(batches) is int and batches % parts == 0 and trainer.limit_val_batches:
        found["val_check_interval"] = (batches, parts)
    return found

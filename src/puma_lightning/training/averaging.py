"""The moving average of the weights as a part of the step, of few kernels and without a look at a counter."""

from collections.abc import Iterator

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from torch import Tensor

from puma_lightning.training.lightning_internals import (
    average_of,
    has_own_device,
    is_average_due,
    note_average,
)

GROUP_BYTES = 2**26  # of the terms that are added to the averages at a time


class AverageInStep:
    """Does what Lightning's ``EMAWeightAveraging`` does after a step, to the last bit, before it has its turn.

    Args:
        callback: The callback, whose average exists.
        module: The module whose weights it averages.
    """

    def __init__(self, callback: EMAWeightAveraging, module: pl.LightningModule) -> None:
        self._callback = callback
        average = average_of(callback)
        assert average is not None and average.avg_fn is not None
        self._count: Tensor = average.n_averaged
        self.is_first = not int(self._count)  # whether the next update is a copy, as there is no average yet
        # avg_fn is decay * average + (1 - decay) * weight.
        one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        self._decay = float(average.avg_fn(one, zero, self._count))
        averaged: list[Tensor] = list(average.module.parameters())
        weights: list[Tensor] = list(module.parameters())
        kept, buffers = list(average.module.buffers()), list(module.buffers())
        if average.use_buffers:
            averaged, weights, kept, buffers = averaged + kept, weights + buffers, [], []
        pairs = [(a.detach(), w.detach()) for a, w in zip(averaged, weights, strict=True)]
        # Numbers that join 16-bit tensors would be rounded to 16 bits first.
        exact = (torch.float32, torch.float64)
        self._groups = list(_in_groups([pair for pair in pairs if pair[0].dtype in exact]))
        self._others = [pair for pair in pairs if pair[0].dtype not in exact]
        self._copied = list(zip(kept, buffers, strict=True))

    def is_due(self, trainer: pl.Trainer) -> bool:
        """Tell whether an update follows the optimizer step that is being taken."""
        due = is_average_due(self._callback, trainer.global_step + 1)
        if due and self.is_first:
            self.is_first = not int(self._count)  # the callback may have made one at the end of an epoch
        return due

    def update(self) -> None:
        """Update the average; work on tensors that stay where they are."""
        for averages, weights in self._groups:
            if self.is_first:
                torch._foreach_copy_(averages, weights)
            else:
                torch._foreach_mul_(averages, self._decay)
                torch._foreach_add_(averages, torch._foreach_mul(weights, 1 - self._decay))
        for average, weight in self._others:
            average.copy_(weight if self.is_first else self._decay * average + (1 - self._decay) * weight)
        for average, buffer in self._copied:
            average.copy_(buffer)
        self._count.add_(1)

    def note(self, trainer: pl.Trainer) -> None:
        """Have the callback know that the update has been made."""
        self.is_first = False
        note_average(self._callback, trainer.global_step + 1)


def averages_in_step(trainer: pl.Trainer, module: pl.LightningModule) -> list[AverageInStep]:
    """Return the averages of a run that can be part of its steps; others are made by their callbacks as ever.

    Lightning makes an average before it moves the module, and so on the CPU. It comes to where the module is, unless
    the callback was given a device.
    """
    found = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = average_of(callback) if isinstance(callback, EMAWeightAveraging) else None
        if average is not None and not has_own_device(callback):
            average.to(module.device)
        if average is None or average.avg_fn is None or average.n_averaged.device != module.device:
            continue
        if type(callback).on_train_batch_end is WeightAveraging.on_train_batch_end:
            found.append(AverageInStep(callback, module))
    return found


def _in_groups(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield averages and weights, some megabytes of them at a time."""
    averages: list[Tensor] = []
    weights: list[Tensor] = []
    size = 0
    for average, weight in pairs:
        averages, weights = [*averages, average], [*weights, weight]
        size += average.nbytes
        if size >= GROUP_BYTES:
            yield averages, weights
            averages, weights, size = [], [], 0
    if averages:
        yield averages, weights

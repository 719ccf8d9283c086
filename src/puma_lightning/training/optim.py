"""The optimizer of a run: its learning-rate schedule, and clipping."""

import math
import os
import pickle
from collections.abc import Iterable
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from puma_lightning.errors import sentence_of


class WarmupCosine(LRScheduler):
    """Linear warm-up, then a cosine down to ``min_ratio`` of the peak at the last step.

    Args:
        optimizer: Its learning rate is the peak.
        warmup_steps: Optimizer steps until the peak; if null, a tenth of the run, but at most 1000.
        total_steps: Optimizer steps of the whole run; if null, the run's real number of steps.
        min_ratio: Final learning rate as a fraction of the peak.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int | None = None,
        total_steps: int | None = None,
        min_ratio: float = 0.0,
    ) -> None:
        if warmup_steps is not None and warmup_steps < 0:
            raise ValueError(
                f"warmup_steps: expected at least 0, got {warmup_steps}; null takes a tenth of the run, 1000 at most"
            )
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"total_steps: expected at least 1, got {total_steps}; null takes the length of the run")
        if not 0 <= min_ratio <= 1:
            raise ValueError(f"min_ratio: expected a share in [0, 1], got {min_ratio}; 0 ends at a learning rate of 0")
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.min_ratio = min_ratio
        super().__init__(optimizer)

    def set_total_steps(self, total_steps: int) -> None:
        """Set the length of the run, before its first step."""
        self.total_steps = total_steps
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate

    def get_lr(self) -> list[Any]:
        """Return the learning rate of each parameter group at the current step."""
        return [base * self._ratio(self.last_epoch) for base in self.base_lrs]

    def _ratio(self, step: int) -> float:
        warmup = self.warmup_steps
        if warmup is None:
            warmup = min(1000, 1000 if self.total_steps is None else self.total_steps // 10)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.total_steps is None:
            return 1.0
        progress = (step - warmup) / max(1, self.total_steps - warmup)
        return self.min_ratio + (1 - self.min_ratio) * (1 + math.cos(math.pi * min(1.0, progress))) / 2

    def state_dict(self) -> dict[str, Any]:
        """Return the position only: a resumed run may be given another length."""
        settings = ("warmup_steps", "total_steps", "min_ratio")
        return {key: value for key, value in super().state_dict().items() if key not in settings}


class Optimization:
    """Optimizer and scheduler of a run, made when the Trainer asks for them.

    Args:
        optimizer: Called with the parameters.
        scheduler: Called with the optimizer and stepped every optimizer step; None for a constant rate.
    """

    def __init__(self, optimizer: OptimizerCallable, scheduler: LRSchedulerCallable | None) -> None:
        self.optimizer = optimizer
        self.scheduler = scheduler

    def __getstate__(self) -> dict[str, Any]:
        """Refuse to be sent to a spawned process, if it is made of what cannot be; copies hold anything.

        Raises:
            ValueError: Then.
        """
        if get_spawning_popen() is not None:
            for name in ("optimizer", "scheduler"):
                _check_pickles(name, getattr(self, name))
        return vars(self)

    def configure(self, parameters: Iterable[nn.Parameter], trainer: pl.Trainer) -> OptimizerLRScheduler:
        """Make optimizer and scheduler, in the form that Lightning wants.

        Raises:
            ValueError: If the optimizer refuses its settings or is none for chains, gradients could not be clipped, or
                the schedule has no end.
        """
        try:
            optimizer = self.optimizer(parameters)
        except ValueError as error:
            if (reason := sentence_of(error, os.path.join(Path(torch.__file__).parent, ""))) is None:
                raise
            raise ValueError(
                f"optimizer: expected settings that it takes, got others: {reason}; correct them"
            ) from error
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                "optimizer: expected one that looks at a batch once in each step, got LBFGS, which does so up to 20 "
                "times, and the chains would move on each time; take another, such as AdamW"
            )
        if (clip := trainer.gradient_clip_val) and clip < 0:
            raise ValueError(
                f"gradient_clip_val: expected at least 0, got {clip}, which turns gradients around; leave it out for "
                "none"
            )
        scaled = trainer.precision == "16-mixed" and trainer.gradient_clip_val
        if scaled and any(group.get("fused") for group in optimizer.param_groups):
            raise ValueError(
                "gradient_clip_val: expected null with float16 and a fused optimizer, which scales gradients back "
                f"within its step, so that they cannot be clipped before, got {trainer.gradient_clip_val}; set fused "
                "to false, use bf16-mixed precision, or leave out gradient_clip_val"
            )
        if self.scheduler is None:
            return optimizer
        scheduler = self.scheduler(optimizer)
        if isinstance(scheduler, WarmupCosine) and scheduler.total_steps is None:
            steps = trainer.estimated_stepping_batches
            if steps == float("inf"):
                raise ValueError(
                    "total_steps: expected a run of known length for WarmupCosine, got one without an end; set "
                    "max_steps, max_epochs or total_steps"
                )
            scheduler.set_total_steps(int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _check_pickles(name: str, function: Any) -> None:
    try:
        pickle.dumps(function)
    except Exception as error:  # whatever an object raises that cannot be pickled
        raise ValueError(
            f"{name}: expected one that spawned processes can be given, got one that cannot be pickled ({error}); use "
            "strategy 'ddp', in a notebook 'ddp_notebook', or give functools.partial(torch.optim.AdamW, lr=3e-4)"
        ) from error


def clip_unscaled(trainer: pl.Trainer, optimizer: Optimizer, clip_val: float | None, algorithm: str | None) -> bool:
    """Clip gradients of mixed precision that are not scaled, and tell whether these were such.

    Lightning refuses to clip with mixed precision and a fused optimizer. That is right where gradients are scaled, as
    in float16, and needless with bfloat16.
    """
    plugin = trainer.precision_plugin
    unscaled = isinstance(plugin, MixedPrecision) and plugin.scaler is None
    if unscaled:
        Precision.clip_gradients(
            plugin, optimizer, clip_val or 0.0, GradClipAlgorithmType(algorithm or GradClipAlgorithmType.NORM)
        )
    return unscaled

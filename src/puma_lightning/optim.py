"""The learning-rate schedule."""

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


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
            raise ValueError(f"warmup_steps must be at least 0 or null, got {warmup_steps}")
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"total_steps must be at least 1 or null, got {total_steps}")
        if not 0 <= min_ratio <= 1:
            raise ValueError(f"min_ratio must be in [0, 1], got {min_ratio}")
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.min_ratio = min_ratio
        super().__init__(optimizer)

    def set_total_steps(self, total_steps: int) -> None:
        """Say how long the run is, before its first step."""
        self.total_steps = total_steps
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate

    def get_lr(self) -> list[Any]:
        """The learning rate of each parameter group at the current step."""
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
        """The position only: a resumed run may be given another length."""
        settings = ("warmup_steps", "total_steps", "min_ratio")
        return {key: value for key, value in super().state_dict().items() if key not in settings}

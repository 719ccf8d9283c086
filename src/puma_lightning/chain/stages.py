"""Stages: how much of an answer is revealed how far along its chain, and numbers that grow during training."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def target_count(
    stage: Tensor, num_stages: int | Tensor, answer_length: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Draw how many answer positions are revealed at a stage (section 3.2 of arXiv 2602.10314).

    ``min(round(r * A), A - 1)`` with r drawn uniformly from [s / K, (s + 1) / K).

    Args:
        stage: s in 0..K-1, any shape, int64.
        num_stages: K, of all chains or of each.
        answer_length: A, the same shape as ``stage``, int64.
        generator: Source of r, on the device of ``stage``.

    Returns:
        Counts in 0..A-1, the shape of ``stage``, int64.

    Example:
        >>> count = target_count(torch.tensor([0, 3]), 4, torch.tensor([100, 100]))
        >>> bool(0 <= count[0] <= 25 and 75 <= count[1] <= 99)
        True
    """
    uniform = torch.rand(stage.shape, dtype=torch.float, device=stage.device, generator=generator)
    count = ((stage + uniform) / num_stages * answer_length).round().long()
    return torch.minimum(count, answer_length - 1)


def stage_of(revealed: Tensor, num_stages: int | Tensor, answer_length: Tensor) -> Tensor:
    """Return the stage that a number of revealed positions belongs to.

    Stage s holds the counts with s / K < revealed / A <= (s + 1) / K, and 0 belongs to stage 0. The upper end is
    included because ``target_count`` rounds. There is one exception: A - 1 and A always belong to the last stage, K -
    1. No target is larger than A - 1, so a chain that has reached it must be at its end. Where A = K the rule above
    would put A - 1 at stage K - 2, and a chain whose stage is told by what is revealed would stay there for ever.

    Args:
        revealed: Revealed answer positions, any shape, int64.
        num_stages: K, of all chains or of each.
        answer_length: A, the same shape as ``revealed``, int64.

    Returns:
        Stages in 0..K-1, the shape of ``revealed``, int64.

    Example:
        >>> stage_of(torch.tensor([0, 25, 26, 99]), 4, torch.tensor(100))
        tensor([0, 0, 1, 3])
    """
    # Less than num_stages already: revealed <= answer_length.
    stage = ((revealed * num_stages - 1) // answer_length.clamp_min(1)).clamp_min(0)
    return torch.where(revealed >= answer_length - 1, num_stages - 1, stage)


class StepSchedule:
    """A whole number that grows with the optimizer step, such as the number of stages K.

    Args:
        name: The argument's name, for error messages.
        value: A positive integer; or ``[optimizer step, value]`` pairs, each of which holds from its step on, with
            strictly increasing steps from 0 and increasing values.

    Raises:
        ValueError: If a value is below 1, the first step is not 0, or steps or values do not increase.

    Example:
        >>> schedule = StepSchedule("num_stages", [[0, 12], [60_000, 15]])
        >>> schedule.at(59_999), schedule.at(60_000)
        (12, 15)
    """

    def __init__(self, name: str, value: int | Sequence[Sequence[int]]) -> None:
        try:
            pairs = [(0, value)] if isinstance(value, int) else [(step, number) for step, number in value]
        except (TypeError, ValueError):
            pairs = []
        advice = "give a number such as 8, or pairs such as [[0, 4], [1000, 8]]"
        if not pairs or any(type(number) is not int for pair in pairs for number in pair):
            raise ValueError(f"{name}: expected an integer or [step, value] pairs, got {value}; {advice}")
        self.steps: list[int] = [step for step, _ in pairs]
        self.values: list[int] = [number for _, number in pairs]
        if min(self.values) < 1:
            raise ValueError(f"{name}: expected values of at least 1, got {value}; {advice}")
        if self.steps[0] != 0:
            raise ValueError(f"{name}: expected a schedule whose first step is 0, got {value}; {advice}")
        for column, what in ((self.steps, "steps"), (self.values, "values")):
            if any(a >= b for a, b in pairwise(column)):
                raise ValueError(f"{name}: expected {what} that increase, got {value}; {advice}")

    def at(self, step: int) -> int:
        """Return the value at an optimizer step."""
        return self.values[bisect_right(self.steps, step) - 1]

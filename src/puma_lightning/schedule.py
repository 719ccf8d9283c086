"""Integers that grow with the optimizer step, such as the number of stages K."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise


class StepSchedule:
    """A constant, or ``[optimizer step, value]`` pairs: each value holds from its step on.

    Args:
        name: The argument's name, for error messages.
        value: A positive integer, or pairs with strictly increasing steps from 0 and increasing values.

    Raises:
        ValueError: If a value is below 1, the first step is not 0, or steps or values do not increase.
    """

    def __init__(self, name: str, value: int | Sequence[Sequence[int]]) -> None:
        try:
            pairs = [(0, value)] if isinstance(value, int) else [(step, number) for step, number in value]
        except (TypeError, ValueError):
            pairs = []
        if not pairs or any(type(number) is not int for pair in pairs for number in pair):
            raise ValueError(f"{name} must be an integer or [step, value] pairs, got {value}")
        self.steps: list[int] = [step for step, _ in pairs]
        self.values: list[int] = [number for _, number in pairs]
        if min(self.values) < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
        if self.steps[0] != 0:
            raise ValueError(f"{name}: the first step of a schedule must be 0, got {value}")
        for column, what in ((self.steps, "steps"), (self.values, "values")):
            if any(a >= b for a, b in pairwise(column)):
                raise ValueError(f"{name}: the {what} of a schedule must increase, got {value}")

    def at(self, step: int) -> int:
        """The value at an optimizer step."""
        return self.values[bisect_right(self.steps, step) - 1]

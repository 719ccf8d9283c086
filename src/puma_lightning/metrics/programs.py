"""How many generated programs compute the right answer."""

import math
from collections import Counter
from typing import Any, get_args

import torch
from torch import Tensor
from torchmetrics import Metric

from puma_lightning.programs import Outcome, parse_number, run_programs, same_number
from puma_lightning.programs.runner import check_filter, default_workers


class ProgramAccuracy(Metric):
    """Shares of generated programs that return the right number, and of those that fail, by kind of failure.

    The function ``simple_math_problem`` of each completion is run in an isolated process (see ``run_programs``).
    Every rank judges its own rows.

    Args:
        timeout: Seconds a program may take.
        memory_mb: MiB of address space a program may use.
        workers: Programs run at a time; null for the cores of this rank, at most 8.
        unsafe_without_filter: Run programs where the system has no filter of system calls to hold them, such as macOS.

    Raises:
        ValueError: If a limit is too low, or such a filter is missing.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None  # accuracy should rise, the other shares fall
    total: Tensor
    correct: Tensor
    unparsable: Tensor
    crashed: Tensor
    timed_out: Tensor

    def __init__(
        self,
        timeout: float = 2.0,
        memory_mb: int = 256,
        workers: int | None = None,
        unsafe_without_filter: bool = False,
    ) -> None:
        super().__init__()
        if not (math.isfinite(timeout) and timeout > 0):
            raise ValueError(f"timeout: expected more than 0 seconds, got {timeout}; 2 is enough for word problems")
        if memory_mb < 64:
            raise ValueError(
                f"memory_mb: expected at least 64, which Python itself needs, got {memory_mb}; set it to 256"
            )
        if workers is not None and workers < 1:
            raise ValueError(
                f"workers: expected at least 1 or null, got {workers}; leave it out to use the cores there are"
            )
        check_filter(unsafe_without_filter)
        self.timeout, self.memory_mb, self.workers = timeout, memory_mb, workers
        self.unsafe_without_filter = unsafe_without_filter
        for name in ("total", "correct", "unparsable", "crashed", "timed_out"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def judge(self, completions: list[str], answers: list[str] | None) -> list[dict[str, Any]]:
        """Run the programs without counting them.

        Args:
            completions: What the model wrote.
            answers: The right numbers, as many; None if they are not known.

        Returns:
            A row each: ``program_result`` (number, string or None), ``outcome`` and ``correct`` (None without answers).

        Raises:
            ValueError: If the lengths differ, or an answer is no number.
        """
        golds = None if answers is None else _numbers(answers, len(completions))
        # torchrun says how many ranks this machine has; without it, share with all there are.
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        workers = self.workers or default_workers(ranks)
        runs = run_programs(completions, self.timeout, self.memory_mb, workers, self.unsafe_without_filter)
        return [
            {
                "program_result": _plain(run.result),
                "outcome": run.outcome,
                "correct": None if golds is None else run.outcome == "ok" and same_number(run.result, golds[i]),
            }
            for i, run in enumerate(runs)
        ]

    def update(self, completions: list[str], answers: list[str]) -> None:
        """Run and count programs; raise as ``judge`` does."""
        rows = self.judge(completions, answers)
        outcomes = Counter(row["outcome"] for row in rows)
        self.total += len(rows)
        self.correct += sum(row["correct"] for row in rows)
        for outcome in get_args(Outcome):
            if outcome != "ok":
                setattr(self, outcome, getattr(self, outcome) + outcomes[outcome])

    def compute(self) -> dict[str, Tensor]:
        """Return the shares among all programs so far, float scalars; NaN if there are none."""
        counts = {"accuracy": self.correct, "unparsable": self.unparsable}
        counts |= {"crashed": self.crashed, "timed_out": self.timed_out}
        return {name: count / self.total for name, count in counts.items()}


def _plain(result: int | float | str | None) -> int | float | str | None:
    """Return the result as JSON can hold it: NaN and infinities as text."""
    return str(result) if isinstance(result, float) and not math.isfinite(result) else result


def _numbers(answers: list[str], size: int) -> list[int | float]:
    if len(answers) != size:
        raise ValueError(f"answers: expected one for each of {size} completions, got {len(answers)}; pass equal lists")
    numbers = []
    for i, answer in enumerate(answers):
        number = parse_number(answer)
        if number is None:
            raise ValueError(
                f"answers: expected a number such as '72', '1,234' or '$10.50' as answer {i}, got {answer[:80]!r}; "
                "pass the final number alone"
            )
        numbers.append(number)
    return numbers

"""What curves of several seeds say: mean and range, and how many times sooner one way to train gets somewhere."""

import random
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from _runs import Point
from matplotlib.axes import Axes

Curve = dict[int, float]  # value by optimizer step


def curves(points: Sequence[Point], run: str, metric: str) -> list[Curve]:
    """One value for each seed."""
    by_seed: dict[int, Curve] = {}
    for point in points:
        if point.run == run and point.metric == metric:
            by_seed.setdefault(point.seed, {})[point.step] = point.value
    return list(by_seed.values())


def mean(of: Sequence[Curve]) -> Curve:
    """At the steps that all have."""
    steps = sorted(set.intersection(*map(set, of)))
    return {step: statistics.mean(curve[step] for curve in of) for step in steps}


def first_reach(curve: Curve, level: float) -> float | None:
    """Optimizer steps until a curve first is at a level, linear between validations; None if it never is."""
    before: tuple[int, float] | None = None
    for step, value in sorted(curve.items()):
        if value >= level:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (level - before[1]) / (value - before[1])
        before = (step, value)
    return None


def speed_up(
    baseline: Sequence[Curve], other: Sequence[Curve], resamples: int = 2000, paired: bool = False
) -> dict[str, Any]:
    """How many times sooner another way reaches the baseline's final value than the baseline itself first does.

    Of the mean curves over seeds. The interval is that of a bootstrap over seeds, of both sides: its ends are the 2.5th
    and 97.5th percentile. A resample in which the other never gets there counts as 0, and is counted.

    Args:
        baseline: A curve for each seed.
        other: The same.
        resamples: Of the bootstrap.
        paired: Whether both sides have the same seeds, in this order, which are drawn together then: a seed says
            what the first weights are, on which more depends than on how they are trained.

    Returns:
        ``speed_up`` (None if never reached or the level is 0), ``interval`` (None of fewer than 3 seeds, or if the
        level is 0 in some resample), ``level``, ``steps`` of both, ``never`` (the share of resamples in which the other
        never gets there), and ``at_first_validation`` (it may have been earlier).
    """

    def once(one: Sequence[Curve], two: Sequence[Curve]) -> tuple[float, float, float | None]:
        curve = mean(one)
        level = curve[max(curve)]
        reached = first_reach(curve, level)
        assert reached is not None
        return level, reached, first_reach(mean(two), level)

    level, steps, others = once(baseline, other)
    rng = random.Random(0)
    ratios, lowest = [], level
    for _ in range(resamples):
        if paired:
            drawn = rng.choices(range(len(baseline)), k=len(baseline))
            resampled = [[side[i] for i in drawn] for side in (baseline, other)]
        else:
            resampled = [rng.choices(side, k=len(side)) for side in (baseline, other)]
        reached, one, two = once(*resampled)
        lowest = min(lowest, reached)
        ratios.append(0.0 if two is None else one / two)
    ratios.sort()
    enough = lowest > 0 and min(len(baseline), len(other)) >= 3
    return {
        "speed_up": None if others is None or level == 0 else round(steps / others, 3),
        "interval": [round(ratios[int(share * (resamples - 1))], 3) for share in (0.025, 0.975)] if enough else None,
        "level": round(level, 4),
        "steps": {"baseline": round(steps), "other": None if others is None else round(others)},
        "never": ratios.count(0.0) / resamples,
        "at_first_validation": others is not None and others <= min(mean(other)),
    }


def difference(baseline: Sequence[Curve], other: Sequence[Curve], resamples: int = 2000) -> dict[str, Any]:
    """How much higher the final value of the other is, seed by seed; the interval is that of a bootstrap over seeds."""
    each = [two[max(two)] - one[max(one)] for one, two in zip(baseline, other, strict=True)]
    rng = random.Random(0)
    means = sorted(statistics.mean(rng.choices(each, k=len(each))) for _ in range(resamples))
    ends = [round(means[int(share * (resamples - 1))], 4) for share in (0.025, 0.975)]
    return {"difference": round(statistics.mean(each), 4), "interval": ends if len(each) >= 3 else None}


def draw(axis: Axes, by_label: Mapping[str, Sequence[Curve]], x_label: str, y_label: str) -> None:
    """Mean and range of the seeds. A label has the colour of its place, also where others have no curves."""
    for place, (label, of) in enumerate(by_label.items()):
        if not of:
            continue
        middle, color = mean(of), f"C{place}"
        steps = list(middle)
        axis.plot(steps, list(middle.values()), marker="o", markersize=3, label=label, color=color)
        low, high = ([edge(curve[step] for curve in of) for step in steps] for edge in (min, max))
        axis.fill_between(steps, low, high, alpha=0.15, color=color)
    axis.set(xlabel=x_label, ylabel=y_label)
    axis.grid(alpha=0.3)

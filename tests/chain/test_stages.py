"""Stages: how much is revealed at each, which one a count belongs to; and numbers that grow with the step."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puma_lightning.chain.stages import StepSchedule, stage_of, target_count


@given(value=st.integers(1, 100), step=st.integers(0, 10**7))
def test_a_constant_holds_at_every_step(value, step):
    """An integer is a schedule of one value."""
    schedule = StepSchedule("num_stages", value)
    assert schedule.at(step) == value


@given(
    st.lists(st.integers(1, 1000), unique=True, max_size=5),
    st.lists(st.integers(1, 99), unique=True, min_size=6, max_size=6),
    st.integers(0, 1200),
)
def test_each_value_holds_from_its_step_until_the_next(later_steps, values, step):
    """The value at a step is that of the last pair whose step is not later."""
    pairs = list(zip([0, *sorted(later_steps)], sorted(values), strict=False))
    schedule = StepSchedule("num_stages", pairs)
    assert schedule.at(step) == [value for start, value in pairs if start <= step][-1]


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (0, "at least 1"),
        (-3, "at least 1"),
        ([], "pairs"),
        ([[0, 0], [5, 3]], "at least 1"),
        ([[1, 8]], "first step .* 0"),
        ([[0, 8], [5]], "pairs"),
        ([[0, 8, 3]], "pairs"),
        ([[0, 8], [0, 9]], "steps .* increase"),
        ([[0, 8], [9, 9], [5, 10]], "steps .* increase"),
        ([[0, 8], [5, 8]], "values .* increase"),
        ([[0, 8], [5, 3]], "values .* increase"),
    ],
)
def test_a_bad_schedule_is_refused_by_name(value, why):
    """The error names the argument, what is wrong, and what came."""
    with pytest.raises(ValueError, match=f"num_stages.*{why}.*"):
        StepSchedule("num_stages", value)


@pytest.mark.parametrize("value", [[12, 15], 2.5, None])
def test_what_is_no_schedule_at_all_is_refused_by_name(value):
    """A list of bare values, a fraction or null get the same kind of answer."""
    with pytest.raises(ValueError, match="num_stages"):
        StepSchedule("num_stages", value)


seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=40, deadline=None)


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rounding_range(stage: int, num_stages: int, length: int) -> tuple[int, int]:
    """The least and greatest round(r * A), at most A - 1, for r in [s / K, (s + 1) / K]."""
    low = math.ceil(Fraction(stage * length, num_stages) - Fraction(1, 2))
    high = math.floor(Fraction((stage + 1) * length, num_stages) + Fraction(1, 2))
    return min(low, length - 1), min(high, length - 1)


@few
@given(seed=seeds, num_stages=st.integers(1, 20), length=st.integers(1, 60))
def test_target_count_rounds_a_fraction_of_its_stage(seed, num_stages, length):
    """min(round(r * A), A - 1) with r in [s / K, (s + 1) / K): something is always left to predict."""
    stage = torch.arange(num_stages).repeat(20)
    count = target_count(stage, num_stages, torch.full_like(stage, length), gen(seed))
    assert count.dtype == torch.long
    for s, n in zip(stage.tolist(), count.tolist(), strict=True):
        low, high = rounding_range(s, num_stages, length)
        assert max(low, 0) <= n <= high <= length - 1


def test_target_count_is_uniform_within_its_stage():
    """At K = 2, A = 100 the second stage's counts average 75 and reach from 50 to 99."""
    stage = torch.ones(20000, dtype=torch.long)
    count = target_count(stage, 2, torch.full_like(stage, 100), gen(0)).float()
    assert abs(count.mean() - 75) < 0.5
    assert (count.min(), count.max()) == (50, 99)


@given(num_stages=st.integers(1, 60), length=st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_stage_of_is_the_right_closed_bucket(num_stages, length):
    """s / K < revealed / A <= (s + 1) / K in exact fractions; nothing revealed is stage 0, A - 1 the last stage."""
    revealed = torch.arange(length + 1)
    expected = [0] + [
        next(
            s for s in range(num_stages) if Fraction(s, num_stages) < Fraction(n, length) <= Fraction(s + 1, num_stages)
        )
        for n in range(1, length + 1)
    ]
    expected[length - 1] = num_stages - 1
    assert stage_of(revealed, num_stages, torch.full_like(revealed, length)).tolist() == expected


def test_stage_of_takes_each_rows_own_length():
    """Three revealed of 5 are further along than three of 12."""
    assert stage_of(torch.tensor([3, 3]), 4, torch.tensor([5, 12])).tolist() == [2, 0]

"""Schedules: integers that grow with the optimizer step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puma_lightning.chain.stages import StepSchedule


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

"""The learning-rate schedule."""

import math
from itertools import pairwise

import pytest
import torch

from puma_lightning.training.optim import WarmupCosine


def optimizer(*rates: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


def rates(scheduler: WarmupCosine, steps: int) -> list[float]:
    """The learning rate that each of the next optimizer steps uses."""
    used = []
    for _ in range(steps):
        used.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return used


def test_the_rate_rises_linearly_to_its_peak():
    """Equal increments from above zero; the peak comes right after the warm-up."""
    used = rates(WarmupCosine(optimizer(0.5), warmup_steps=4, total_steps=20), 5)
    assert used == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def test_then_it_falls_along_a_cosine_to_min_ratio():
    """Half way down in the middle, min_ratio at the end and ever after."""
    scheduler = WarmupCosine(optimizer(1.0), warmup_steps=10, total_steps=110, min_ratio=0.1)
    used = rates(scheduler, 150)
    for step in range(10, 110):
        assert used[step] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * (step - 10) / 100)) / 2)
    assert used[60] == pytest.approx(0.55)
    assert used[110:] == pytest.approx([0.1] * 40)
    assert all(a > b for a, b in pairwise(used[10:111]))


def test_each_parameter_group_keeps_its_own_peak():
    """The schedule multiplies; it doesn't set."""
    scheduler = WarmupCosine(optimizer(1.0, 0.2), warmup_steps=3, total_steps=9)
    for _ in range(12):
        first, second = scheduler.get_last_lr()
        assert second == pytest.approx(0.2 * first, abs=1e-9)
        scheduler.optimizer.step()
        scheduler.step()


def test_without_warmup_it_starts_at_the_peak():
    """warmup_steps=0 is allowed."""
    assert rates(WarmupCosine(optimizer(1.0), warmup_steps=0, total_steps=2), 3) == pytest.approx([1, 0.5, 0])


@pytest.mark.parametrize("length", [30, 100])
def test_a_resumed_run_goes_on_with_the_length_it_is_given(length):
    """The state holds the position; the length is the new run's own."""
    old = WarmupCosine(optimizer(1.0), warmup_steps=2, total_steps=30)
    rates(old, 12)
    new = WarmupCosine(optimizer(1.0), warmup_steps=2, total_steps=length)
    new.load_state_dict(old.state_dict())
    new.optimizer.load_state_dict(old.optimizer.state_dict())
    fresh = WarmupCosine(optimizer(1.0), warmup_steps=2, total_steps=length)
    # The very next step still uses the rate that the checkpoint's optimizer holds.
    assert rates(new, 20)[1:] == pytest.approx(rates(fresh, 32)[13:])


def test_the_state_is_plain_values():
    """It goes through torch.load(weights_only=True)."""
    state = WarmupCosine(optimizer(1.0), warmup_steps=2, total_steps=30).state_dict()
    assert not {"warmup_steps", "total_steps", "min_ratio"} & set(state)
    assert all(isinstance(value, int | float | bool | list | None) for value in state.values())


@pytest.mark.parametrize(
    "bad", [{"warmup_steps": -1}, {"total_steps": 0}, {"min_ratio": -0.1}, {"min_ratio": 1.5}], ids=str
)
def test_bad_arguments_are_refused_by_name(bad):
    """The error names the argument and its value."""
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        WarmupCosine(optimizer(1.0), **bad)


def test_without_a_warm_up_given_it_is_a_tenth_of_a_short_run():
    """At most 1000 steps; the first step already uses the rate for the real length."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = WarmupCosine(optimizer)
    schedule.set_total_steps(50)
    rates = []
    for _ in range(50):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(1 / 6)
    assert max(range(50), key=rates.__getitem__) == 5
    assert rates[-1] < 0.01

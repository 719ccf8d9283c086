"""Losses that are not numbers, looked at late where looking would make the host wait."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from puma_lightning.training import finite
from puma_lightning.training.finite import FiniteCheck


class Far(torch.Tensor):
    """A loss on another device than the CPU, as far as a check can tell."""

    device = SimpleNamespace(type="far")  # type: ignore[assignment]


def far(value: float) -> torch.Tensor:
    return torch.tensor(value).as_subclass(Far)


def trainer(every: int) -> Any:
    return SimpleNamespace(
        global_step=0, log_every_n_steps=every, world_size=1, checkpoint_callbacks=[], ckpt_path=None
    )


@pytest.mark.parametrize("bad", [0, 1, 4, 5])
def test_the_step_is_named_in_which_a_loss_was_no_number_first(bad):
    """Although it is looked at with the others of its execution only."""
    check, run = FiniteCheck(), trainer(every=6)
    with pytest.raises(ValueError, match=rf"loss: expected numbers.*by optimizer step {bad}; go on from the last good"):
        for run.global_step in range(20):
            check.observe(far(math.nan if run.global_step in (bad, bad + 1) else 1.0), run)
    assert run.global_step == 5


def test_what_is_seen_once_stays_seen():
    """Also when a checkpoint was refused for it before."""
    check, run = FiniteCheck(), trainer(every=50)
    check.observe(far(math.inf), run)
    assert not check.all_finite
    check.observe(far(1.0), run)
    assert not check.all_finite
    check.reset()
    assert check.all_finite


def test_losses_that_nobody_logs_are_looked_at_now_and_then(monkeypatch):
    monkeypatch.setattr(finite, "MOST_UNSEEN", 10)
    check, run = FiniteCheck(), trainer(every=0)
    with pytest.raises(ValueError, match="by optimizer step 3"):
        for run.global_step in range(100):
            check.observe(far(math.nan if run.global_step == 3 else 1.0), run)
    assert run.global_step == 9

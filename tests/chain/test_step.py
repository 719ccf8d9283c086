"""The step that both chains take: the policy and the threshold together."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puma_lightning.chain.policies import Confidence, Entropy, LeftToRight, Margin, Policy, RandomOrder
from puma_lightning.chain.reveal import reveal
from puma_lightning.chain.step import Unmasking
from puma_lightning.output.prediction import statistics

V, MASK = 6, 5
seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=40, deadline=None)
policies = st.sampled_from([Confidence(), Margin(), Entropy(), RandomOrder(), LeftToRight()])


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(seed: int, batch: int, length: int):
    x0 = torch.randint(MASK, (batch, length), generator=gen(seed))
    xt = x0.masked_fill(torch.rand(batch, length, generator=gen(seed + 1)) < 0.7, MASK)
    logits = 3 * torch.randn(batch, length, V, generator=gen(seed + 2))
    count = torch.randint(0, length + 1, (batch,), generator=gen(seed + 3))
    return x0, xt, logits.index_fill(2, torch.tensor([MASK]), float("-inf")), count


@few
@given(seed=seeds, batch=st.integers(1, 4), length=st.integers(1, 8), policy=policies, tau=st.floats(0.1, 1.0))
def test_a_step_reveals_the_best_and_all_above_the_threshold(seed, batch, length, policy, tau):
    x0, xt, logits, count = problem(seed, batch, length)
    also = statistics(logits, ("log_prob",)).log_prob.exp() > tau
    expected = reveal(xt, x0, policy(logits, xt), count, MASK, also, gen(seed))
    assert torch.equal(Unmasking(policy, tau).step(xt, x0, logits, count, MASK, gen(seed)), expected)


@few
@given(seed=seeds, policy=policies, tau=st.one_of(st.none(), st.floats(0.1, 1.0)))
def test_statistics_do_as_well_as_logits(seed, policy, tau):
    """For a policy that names what it reads."""
    x0, xt, logits, count = problem(seed, 3, 8)
    unmasking = Unmasking(policy, tau)
    found = statistics(logits, unmasking.reads())
    by_logits, by_statistics = (unmasking.step(xt, x0, said, count, MASK, gen(seed)) for said in (logits, found))
    assert torch.equal(by_logits, by_statistics)


class OwnCall(Confidence):
    def __call__(self, logits, xt):
        return super().__call__(logits, xt)


class NoStatistics(Policy):
    def __call__(self, logits, xt):
        return logits.amax(-1)


@pytest.mark.parametrize(
    ("policy", "threshold", "reads"),
    [
        (RandomOrder(), None, set()),
        (RandomOrder(), 0.5, {"log_prob"}),
        (Margin(), None, {"margin"}),
        (Margin(), 0.5, {"margin", "log_prob"}),
        (lambda logits, xt: logits.amax(-1), None, None),
        (OwnCall(), 0.5, None),
        (NoStatistics(), None, None),
    ],
)
def test_a_step_says_what_it_reads(policy, threshold, reads):
    """Logits, if nobody can say that less would do."""
    found = Unmasking(policy, threshold).reads()
    assert (None if found is None else set(found)) == reads


@pytest.mark.parametrize("threshold", [0.0, -0.5, 1.5, float("nan")])
def test_a_threshold_that_is_no_probability_is_refused(threshold):
    with pytest.raises(ValueError, match="threshold: expected a probability"):
        Unmasking(Confidence(), threshold)

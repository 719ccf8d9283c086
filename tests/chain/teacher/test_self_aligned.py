"""Two steps a sequence: over-noised, then with the easiest positions revealed."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from puma_lightning.chain.chains import Chains
from puma_lightning.chain.policies import Confidence, Margin
from puma_lightning.chain.teacher import SelfAlignedMasking

V = 6
MASK = V - 1
seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=40, deadline=None)


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def begin(process: SelfAlignedMasking, batch: int, length: int, seed: int, stage: int = 0) -> Chains:
    x0 = torch.randint(MASK, (batch, length), generator=gen(seed))
    prompt = torch.rand(batch, length, generator=gen(seed + 1)) < 0.3
    prompt[:, 0] = False
    return process.start(Chains.fully_masked(x0, prompt, MASK, 2, torch.full((batch,), stage)), gen(seed + 2))


def predictions(chains: Chains, seed: int) -> Tensor:
    logits = 3 * torch.randn(*chains.x0.shape, V, generator=gen(seed))
    return logits.index_fill(2, torch.tensor([MASK]), float("-inf"))


@few
@given(seed=seeds, batch=st.integers(1, 4), length=st.integers(1, 9))
def test_a_sequence_trains_twice_on_masks_within_masks(seed, batch, length):
    process = SelfAlignedMasking()
    first = begin(process, batch, length, seed)
    second = process.advance(first, predictions(first, seed), 0, gen(seed))
    third = process.advance(second, predictions(second, seed), 1, gen(seed))
    assert not first.done.any() and not second.done.any() and third.done.all()
    for chains in (first, second):
        masked = chains.xt == MASK
        assert masked.any(1).all() and not (masked & chains.prompt_mask).any()
        assert torch.equal(chains.xt[~masked], chains.x0[~masked])
    assert not ((second.xt == MASK) & (first.xt != MASK)).any()


@few
@given(seed=seeds, length=st.integers(2, 9), policy=st.sampled_from([Margin(), Confidence()]))
def test_what_the_policy_scores_highest_is_revealed(seed, length, policy):
    process = SelfAlignedMasking(policy)
    first = begin(process, 3, length, seed)
    logits = predictions(first, seed)
    second = process.advance(first, logits, 0, gen(seed))
    scores = policy(logits, first.xt)
    revealed, still = (first.xt == MASK) & (second.xt != MASK), second.xt == MASK
    for row in range(3):
        if revealed[row].any():
            assert scores[row][revealed[row]].min() >= scores[row][still[row]].max()


@pytest.mark.parametrize("late", [False, True], ids=["through both steps", "entering late"])
def test_the_counts_are_the_larger_and_the_smaller_of_two_uniform_ones(late):
    """So that together they are uniform in 1..A; also of sequences that enter at the second step."""
    rows, answer = 20_000, 5
    process = SelfAlignedMasking()
    x0 = torch.zeros(rows, answer, dtype=torch.long)
    blank = Chains.fully_masked(x0, torch.zeros_like(x0).bool(), MASK, 2)
    chains = process.start(blank, gen(0))
    larger = chains.masked.sum(1)
    if late:
        smaller = process.start(replace(blank, stage=blank.stage + 1), gen(1)).masked.sum(1)
    else:
        smaller = process.advance(chains, predictions(chains, 0), 0, gen(1)).masked.sum(1)
        pairs = torch.bincount(larger * (answer + 1) + smaller, minlength=(answer + 1) ** 2).view(answer + 1, -1)
        n1, n2 = torch.meshgrid(torch.arange(answer + 1), torch.arange(answer + 1), indexing="ij")
        expected = rows / answer**2 * (1 * (n1 == n2) + 2 * (n1 > n2)) * (n2 > 0)
        there = expected > 0
        assert not pairs[~there].any()
        assert ((pairs - expected)[there] ** 2 / expected[there]).sum() < 40  # chi-square, 14 degrees of freedom
    counts = torch.bincount(torch.cat([larger, smaller]), minlength=answer + 1)[1:]
    expected = 2 * rows / answer
    assert ((counts - expected) ** 2 / expected).sum() < 27  # chi-square, 4 degrees of freedom


def test_a_sequence_without_an_answer_is_left_alone():
    """As the blocks of a block model may be."""
    process = SelfAlignedMasking()
    x0 = torch.zeros(1, 4, dtype=torch.long)
    given_all = torch.ones_like(x0).bool()
    chains = process.start(Chains.fully_masked(x0, given_all, MASK, 2), gen(0))
    after = process.advance(chains, predictions(chains, 0), 0, gen(0))
    assert torch.equal(chains.xt, x0) and torch.equal(after.xt, x0)


def test_what_is_not_a_policy_is_refused():
    with pytest.raises(ValueError, match="policy"):
        SelfAlignedMasking("margin")

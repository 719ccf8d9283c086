"""Two steps a sequence: a random mask, then its complement."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from some_chains import MASK, begin, gen, predictions, sequences

from puma_lightning.chain.chains import Chains
from puma_lightning.chain.teacher import ComplementaryMasking

few = settings(max_examples=40, deadline=None)
PROCESS = ComplementaryMasking()


@few
@given(seed=st.integers(0, 2**31 - 1), batch=st.integers(1, 4), length=st.integers(1, 9))
def test_every_answer_position_is_masked_in_one_of_two_steps(seed, batch, length):
    """In just one, unless all were masked at once; then the same mask comes twice."""
    x0, prompt = sequences(seed, batch, length)
    first = begin(PROCESS, x0, prompt, seed)
    second = PROCESS.advance(first, predictions(x0, seed), 0, gen(seed))
    third = PROCESS.advance(second, predictions(x0, seed), 1, gen(seed))
    assert not first.done.any() and not second.done.any() and third.done.all()
    whole = (first.masked == ~prompt).all(1)
    assert torch.equal(second.masked[whole], first.masked[whole])
    assert torch.equal(second.masked[~whole], (~prompt & ~first.masked)[~whole])
    for chains in (first, second):
        assert chains.masked.any(1).all() and torch.equal(chains.xt[~chains.masked], x0[~chains.masked])


def test_the_counts_are_uniform_in_both_steps():
    """So are those of sequences that enter at the second step, in the first batch of a run."""
    rows, answer = 12_000, 6
    x0 = torch.zeros(rows, answer, dtype=torch.long)
    nothing = torch.zeros_like(x0).bool()
    first = begin(PROCESS, x0, nothing, 0)
    second = PROCESS.advance(first, predictions(x0[:1], 0), 0, gen(0))
    for chains in (first, second, begin(PROCESS, x0, nothing, 1, stage=1)):
        counts = torch.bincount(chains.masked.sum(1), minlength=answer + 1)
        expected = rows / answer
        assert not counts[0] and ((counts[1:] - expected) ** 2 / expected).sum() < 27  # chi-square, 5 degrees


def test_a_sequence_without_an_answer_is_left_alone():
    x0 = torch.zeros(1, 4, dtype=torch.long)
    chains = PROCESS.start(Chains.fully_masked(x0, torch.ones_like(x0).bool(), MASK, 2), gen(0))
    after = PROCESS.advance(chains, predictions(x0, 0), 0, gen(0))
    assert torch.equal(chains.xt, x0) and torch.equal(after.xt, x0)

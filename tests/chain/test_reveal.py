"""What a reveal uncovers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from puma_lightning.chain.reveal import reveal, reveal_at_random
from puma_lightning.graphs import NoLooks

V = 6
MASK = V - 1
seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=40, deadline=None)


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def board(seed: int, batch: int = 4, length: int = 7) -> tuple[Tensor, Tensor]:
    """Clean tokens and the same with random positions masked."""
    generator = gen(seed)
    x0 = torch.randint(MASK, (batch, length), generator=generator)
    return x0, x0.masked_fill(torch.rand(batch, length, generator=generator) < 0.6, MASK)


@few
@given(seed=seeds, batch=st.integers(1, 4), length=st.integers(1, 9), with_also=st.booleans())
def test_reveal_uncovers_count_masked_positions_and_changes_no_other(seed, batch, length, with_also):
    """Exactly min(count, masked) positions become their token; those in ``also`` come on top."""
    x0, xt = board(seed, batch, length)
    tokens = (x0 + 1) % MASK
    scores = torch.randn(xt.shape, generator=gen(seed))
    count = torch.randint(0, length + 3, (batch,), generator=gen(seed))
    also = torch.rand(xt.shape, generator=gen(seed)) < 0.3 if with_also else None
    masked = xt == MASK
    out = reveal(xt, tokens, scores, count, MASK, also, gen(seed))
    changed = out != xt
    assert not (changed & ~masked).any()
    assert (out[changed] == tokens[changed]).all()
    by_count = reveal(xt, tokens, scores, count, MASK, None, gen(seed)) != xt
    assert torch.equal(by_count.sum(1), torch.minimum(count, masked.sum(1)))
    assert torch.equal(changed, by_count if also is None else by_count | (also & masked))


@few
@given(seed=seeds, count=st.integers(0, 8))
def test_reveal_takes_the_best_scored_masked_positions(seed, count):
    """No position that stays masked has a higher score than one that is revealed."""
    x0, xt = board(seed)
    scores = torch.randn(xt.shape, generator=gen(seed))
    out = reveal(xt, x0, scores, torch.full((len(xt),), count), MASK)
    for row in range(len(xt)):
        revealed, left = scores[row][out[row] != xt[row]], scores[row][out[row] == MASK]
        if len(revealed) and len(left):
            assert revealed.min() > left.max()


def test_reveal_breaks_ties_uniformly():
    """Among equal scores every pair is revealed equally often, also below a clear winner."""
    rows = 6000
    xt = torch.full((rows, 5), MASK)
    scores = torch.zeros(rows, 5)
    scores[:, 2] = 1.0
    out = reveal(xt, torch.zeros_like(xt), scores, torch.full((rows,), 3), MASK, generator=gen(0))
    assert (out[:, 2] == 0).all()
    ties = (out[:, [0, 1, 3, 4]] == 0).long() @ torch.tensor([1, 2, 4, 8])
    counts = torch.bincount(ties, minlength=16)[[3, 5, 6, 9, 10, 12]]
    assert counts.sum() == rows
    assert ((counts - rows / 6) ** 2 / (rows / 6)).sum() < 25  # chi-square, 5 degrees of freedom


@few
@given(seed=seeds, batch=st.integers(1, 4))
def test_a_masked_position_scored_minus_infinity_is_still_revealed(seed, batch):
    """It comes before every position that is not masked, whatever that is scored."""
    x0, xt = board(seed, batch)
    scores = torch.where(xt == MASK, float("-inf"), 5.0)
    out = reveal(xt, x0, scores, (xt == MASK).sum(1), MASK)
    assert torch.equal(out, x0)


def test_count_and_also_are_per_row():
    """Every row has its own count, 0 included."""
    xt = torch.full((3, 4), MASK)
    out = reveal(xt, torch.zeros_like(xt), torch.zeros(3, 4), torch.tensor([0, 2, 9]), MASK)
    assert (out == 0).sum(1).tolist() == [0, 2, 4]


@few
@given(seed=seeds)
def test_a_reveal_is_determined_by_its_generator(seed):
    """The same generator breaks ties in the same way, and the global one is not touched."""
    x0, xt = board(seed)
    before = torch.get_rng_state()
    a, b = (reveal(xt, x0, torch.zeros(xt.shape), torch.full((4,), 2), MASK, generator=gen(seed)) for _ in "ab")
    assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), before)


@few
@given(seed=seeds, length=st.integers(1, 9))
def test_reveal_at_random_masks_the_whole_answer_but_count(seed, length):
    """Prompts stay, exactly count answer positions are uncovered."""
    x0 = torch.randint(MASK, (3, length), generator=gen(seed))
    prompt = torch.rand(3, length, generator=gen(seed)) < 0.4
    answer = (~prompt).sum(1)
    count = torch.minimum(torch.randint(0, length + 1, (3,), generator=gen(seed)), answer)
    xt = reveal_at_random(x0.masked_fill(~prompt, MASK), x0, count, MASK, gen(seed))
    assert torch.equal(xt[prompt], x0[prompt])
    assert torch.equal((xt == MASK).sum(1), answer - count)


def test_scores_of_another_shape_or_without_a_value_are_refused():
    xt, one = torch.tensor([[5, 5, 1]]), torch.ones(1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"\(1, 3\), got \(3,\)"):
        reveal(xt, xt, torch.zeros(3), one, 5)
    with pytest.raises(ValueError, match="NaN"):
        reveal(xt, xt, torch.tensor([[0.0, float("nan"), 0.0]]), one, 5)
    reveal(xt, xt, torch.tensor([[0.0, 0.0, float("nan")]]), one, 5)  # not masked, so nobody reads it


def test_it_looks_at_no_value():
    """Neither at the scores, whose NaN is an error on a CPU, nor at what is masked."""
    x0, xt = board(0)
    also = torch.rand(xt.shape, generator=gen(1)) < 0.2
    with NoLooks():
        after = reveal(xt, x0, torch.rand(xt.shape, generator=gen(2)), torch.ones(len(xt)), MASK, also, gen(3))
    assert ((after == MASK).sum() < (xt == MASK).sum()) and torch.equal(after[xt != MASK], xt[xt != MASK])

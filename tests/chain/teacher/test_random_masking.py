"""Random masks: how many positions are masked, and which."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from some_chains import MASK, begin, gen, predictions, sequences

from puma_lightning.chain.chains import Chains
from puma_lightning.chain.teacher import RandomMasking
from puma_lightning.chain.teacher.random_masking import stratified_masking

seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=40, deadline=None)


def test_random_masking_masks_a_uniform_number_of_uniformly_chosen_positions():
    """n is uniform on 1..A, and given n every answer position is as likely as any other."""
    rows, answer = 12000, 6
    x0 = torch.randint(MASK, (rows, 8), generator=gen(0))
    prompt = torch.zeros(rows, 8, dtype=torch.bool)
    prompt[:, [0, 3]] = True
    masked = begin(RandomMasking(), x0, prompt, 1).xt == MASK
    counts = torch.bincount(masked.sum(1), minlength=answer + 1)
    assert counts[0] == 0
    expected = rows / answer
    assert ((counts[1:] - expected) ** 2 / expected).sum() < 27  # chi-square, 5 degrees of freedom
    assert not masked[:, [0, 3]].any()
    single = masked[masked.sum(1) == 1].sum(0)[[1, 2, 4, 5, 6, 7]]
    expected = single.sum() / 6
    assert ((single - expected) ** 2 / expected).sum() < 27


@few
@given(seed=seeds, batch=st.integers(1, 4), length=st.integers(1, 9))
def test_random_masking_masks_something_and_no_prompt(seed, batch, length):
    """Every row has 1..A masks, the rest is x0, and every chain is over after its step."""
    x0, prompt = sequences(seed, batch, length)
    process = RandomMasking()
    chains = begin(process, x0, prompt, seed)
    masked = chains.xt == MASK
    assert masked.any(1).all()
    assert not (masked & prompt).any()
    assert torch.equal(chains.xt[~masked], x0[~masked])
    after = process.advance(chains, predictions(x0, seed), 0, gen(seed))
    assert after.done.all()
    assert process.num_stages_at(0) == 1


@few
@given(seed=seeds, length=st.integers(1, 8), times=st.integers(1, 5))
def test_stratified_masking_holds_every_n_equally_often(seed, length, times):
    """A batch of a multiple of A rows without prompts masks each n of 1..A in the same number of rows."""
    x0 = torch.randint(MASK, (length * times, length), generator=gen(seed))
    n = stratified_masking(Chains.fully_masked(x0, torch.zeros_like(x0).bool(), MASK), gen(seed)).masked.sum(1)
    assert sorted(n.tolist()) == [i + 1 for i in range(length) for _ in range(times)]


@few
@given(seed=seeds, batch=st.integers(1, 9), length=st.integers(1, 9))
def test_stratified_masking_covers_the_strata_of_any_batch(seed, batch, length):
    """The i-th smallest n lies in the i-th of B equal parts of 1..A."""
    x0 = torch.randint(MASK, (batch, length), generator=gen(seed))
    blank = Chains.fully_masked(x0, torch.zeros_like(x0).bool(), MASK)
    n = stratified_masking(blank, gen(seed)).masked.sum(1).sort().values
    for i, count in enumerate(n.tolist()):
        assert i * length // batch + 1 <= count <= min((i + 1) * length // batch + 1, length)


def test_stratified_masking_averages_to_uniform():
    """Over many small batches n is uniform on 1..A in every row, as in training."""
    x0 = torch.zeros(3, 4, dtype=torch.long)
    generator = gen(0)
    blank = Chains.fully_masked(x0, x0.bool(), MASK)
    n = torch.stack([stratified_masking(blank, generator).masked.sum(1) for _ in range(2000)])
    for row in range(3):
        counts = torch.bincount(n[:, row], minlength=5)[1:]
        assert ((counts - 500) ** 2 / 500).sum() < 22  # chi-square, 3 degrees of freedom


def test_stratified_counts_have_the_same_expectation_and_less_variance():
    """Every row's count is uniform in 1..A as without; in each batch they are spread evenly."""
    rows, answer = 8, 16
    x0 = torch.zeros(rows, answer, dtype=torch.long)
    nothing = torch.zeros_like(x0).bool()
    counts = {}
    for stratified in (False, True):
        process = RandomMasking(stratified)
        counts[stratified] = torch.stack([begin(process, x0, nothing, seed).masked.sum(1) for seed in range(3000)])
        for row in counts[stratified].T:
            seen = torch.bincount(row, minlength=answer + 1)
            expected = 3000 / answer
            assert not seen[0] and ((seen[1:] - expected) ** 2 / expected).sum() < 45  # chi-square, 15 degrees
    for batch in counts[True]:
        assert torch.equal((batch.sort().values - 1) // 2, torch.arange(rows))
    variance = {name: each.float().mean(1).var() for name, each in counts.items()}
    assert variance[True] < variance[False] / 8

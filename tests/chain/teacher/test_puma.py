"""What the model trains on: how chains start, how they move on, and when they are over."""

import math
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from some_chains import MASK, V, begin, chain, gen, predictions, revealed, sequences

from puma_lightning.chain.policies import Confidence, Entropy, LeftToRight, Margin, RandomOrder
from puma_lightning.chain.stages import stage_of
from puma_lightning.chain.teacher import ProgressiveUnmasking

POLICIES = [Confidence(), Margin(), Entropy(), RandomOrder(), LeftToRight()]
seeds = st.integers(0, 2**31 - 1)
thresholds = st.one_of(st.none(), st.floats(0.05, 1.0))
few = settings(max_examples=40, deadline=None)


shapes = given(
    seed=seeds,
    batch=st.integers(1, 4),
    length=st.integers(1, 12),
    num_stages=st.integers(1, 9),
    policy=st.sampled_from(POLICIES),
    threshold=thresholds,
)


@few
@shapes
def test_along_a_chain_masks_only_decrease_and_tokens_are_x0(seed, batch, length, num_stages, policy, threshold):
    """Prompts are never masked, what is uncovered stays uncovered, and it is the teacher's token."""
    x0, prompt = sequences(seed, batch, length)
    process = ProgressiveUnmasking(num_stages, policy, threshold)
    seen = chain(process, x0, prompt, seed, 2 * num_stages)
    for before, after in pairwise(seen):
        masked = after.xt == MASK
        assert not (masked & prompt).any()
        assert not (masked & (before.xt != MASK)).any()
        assert torch.equal(after.xt[~masked], x0[~masked])


@few
@shapes
def test_a_chain_that_is_not_done_has_something_to_predict(seed, batch, length, num_stages, policy, threshold):
    """There is no idle step with zero loss."""
    x0, prompt = sequences(seed, batch, length)
    for chains in chain(ProgressiveUnmasking(num_stages, policy, threshold), x0, prompt, seed, 2 * num_stages):
        assert ((chains.xt == MASK).any(1) | chains.done).all()
        assert ((chains.stage >= 0) & (chains.stage < num_stages)).all()


@few
@given(seed=seeds, batch=st.integers(1, 4), length=st.integers(1, 12), num_stages=st.integers(1, 9))
def test_without_a_threshold_a_sequence_trains_exactly_k_times(seed, batch, length, num_stages):
    """Once in each stage, in order, with as many positions uncovered as that stage has."""
    x0, prompt = sequences(seed, batch, length)
    seen = chain(ProgressiveUnmasking(num_stages), x0, prompt, seed, num_stages)
    answer = (~prompt).sum(1).tolist()
    for stage, chains in enumerate(seen[:-1]):
        assert not chains.done.any()
        assert (chains.stage == stage).all()
        for count, size in zip(revealed(chains).tolist(), answer, strict=True):
            low = math.ceil(Fraction(stage * size, num_stages) - Fraction(1, 2))
            high = math.floor(Fraction((stage + 1) * size, num_stages) + Fraction(1, 2))
            assert min(low, size - 1) <= count <= min(high, size - 1)
    assert seen[-1].done.all()


@few
@given(seed=seeds, batch=st.integers(1, 4), length=st.integers(2, 12), num_stages=st.integers(1, 9))
def test_the_teacher_reveals_the_best_scored_positions(seed, batch, length, num_stages):
    """What one step uncovers scores at least as high as what it leaves masked."""
    x0, prompt = sequences(seed, batch, length)
    process = ProgressiveUnmasking(num_stages, Margin())
    chains = begin(process, x0, prompt, seed)
    logits = predictions(x0, seed)
    after = process.advance(chains, logits, 0, gen(seed))
    scores = Margin()(logits, chains.xt)
    for row in range(batch):
        new, left = scores[row][after.xt[row] != chains.xt[row]], scores[row][after.xt[row] == MASK]
        assert not len(new) or not len(left) or new.min() >= left.max()


@few
@given(seed=seeds, batch=st.integers(1, 4), length=st.integers(1, 12), num_stages=st.integers(1, 9), tau=thresholds)
def test_the_threshold_reveals_every_confident_position(seed, batch, length, num_stages, tau):
    """Top-1 probability > tau is uncovered; the stage is the bucket of what is; with nothing masked a chain is over."""
    tau = 0.5 if tau is None else tau
    x0, prompt = sequences(seed, batch, length)
    process = ProgressiveUnmasking(num_stages, Margin(), tau)
    chains = begin(process, x0, prompt, seed)
    logits = predictions(x0, seed)
    after = process.advance(chains, logits, 0, gen(seed))
    masked = after.xt == MASK
    assert not (masked & (logits.softmax(-1).amax(-1) > tau + 1e-5)).any()
    answer_length = (~prompt).sum(1)
    stages = torch.minimum(answer_length, torch.tensor(num_stages))  # no more than there are positions
    assert torch.equal(after.stage, stage_of(revealed(after), stages, answer_length))
    assert torch.equal(after.done, ~masked.any(1) | (chains.stage + 1 >= stages))


def steps_until_done(length: int, num_stages: int, threshold: float | None, limit: int) -> int:
    """How long 64 chains take, when the model is sure of nothing."""
    x0 = torch.zeros(64, length, dtype=torch.long)
    seen = chain(ProgressiveUnmasking(num_stages, threshold=threshold), x0, x0.bool(), 0, limit)
    return next((step for step, chains in enumerate(seen) if chains.done.all()), limit)


def test_with_a_threshold_that_nothing_exceeds_a_chain_ends_too():
    """The stage is set back where a target fell on its bucket's lower end, but not for ever."""
    assert steps_until_done(length=40, num_stages=8, threshold=1.0, limit=32) <= 12


def test_with_a_threshold_a_chain_ends_even_if_k_is_the_answer_length():
    """K may be as large as the answer; without a threshold it takes K steps."""
    assert steps_until_done(length=8, num_stages=8, threshold=None, limit=100) == 8
    assert steps_until_done(length=8, num_stages=8, threshold=1.0, limit=100) < 100


def test_a_model_that_is_sure_of_everything_finishes_in_one_step():
    """With a threshold, and not without one."""
    x0, prompt = sequences(0, 4, 8)
    logits = 50 * torch.nn.functional.one_hot(x0, V).float()
    for threshold, over in ((0.9, True), (None, False)):
        process = ProgressiveUnmasking(4, threshold=threshold)
        assert process.advance(begin(process, x0, prompt, 0), logits, 0, gen(0)).done.all() == over


@few
@given(seed=seeds, before=st.integers(1, 5), more=st.integers(1, 6), length=st.integers(6, 12))
def test_when_k_grows_the_chains_stay_as_masked_as_they_are(seed, before, more, length):
    """Nothing is masked again or replaced; the stage goes on from the revealed fraction, counted in the new K."""
    after = before + more
    process = ProgressiveUnmasking([(0, before), (10, after)])
    x0, prompt = sequences(seed, 6, length)
    chains = begin(process, x0, prompt, seed, torch.arange(6) % before)
    answer = (~prompt).sum(1)
    moved = process.advance(chains, predictions(x0, seed), 10, gen(seed))
    assert (chains.num_stages, moved.num_stages) == (before, after)
    assert torch.equal(moved.x0, x0)
    kept = chains.xt != MASK
    assert torch.equal(moved.xt[kept], chains.xt[kept])
    stage = stage_of(revealed(chains), after, answer) + 1
    assert torch.equal(moved.done, stage >= after)
    assert torch.equal(moved.stage[~moved.done], stage[~moved.done])


def test_k_follows_the_optimizer_step():
    """Between switches nothing is recomputed."""
    process = ProgressiveUnmasking([(0, 3), (10, 5)])
    assert [process.num_stages_at(step) for step in (0, 9, 10, 99)] == [3, 3, 5, 5]


@few
@given(seed=seeds, num_stages=st.integers(1, 8), length=st.integers(1, 10))
def test_sequences_enter_with_uniformly_chosen_positions_of_their_stage(seed, num_stages, length):
    """Also at later stages, in the staggered first fill, there is something left to predict."""
    x0, prompt = sequences(seed, num_stages, length)
    process = ProgressiveUnmasking(num_stages)
    chains = begin(process, x0, prompt, seed, torch.arange(num_stages))
    assert torch.equal(chains.xt[chains.xt != MASK], x0[chains.xt != MASK])
    assert torch.equal(chains.xt[prompt], x0[prompt])
    for stage, count, size in zip(range(num_stages), revealed(chains).tolist(), (~prompt).sum(1).tolist(), strict=True):
        assert stage * size / num_stages - 0.51 <= count + (count == size - 1)
        assert count <= min((stage + 1) * size / num_stages + 0.5, size - 1)


def test_a_plain_function_is_a_policy():
    """The chain follows a user's own callable."""

    def rightmost(logits, xt):
        return torch.arange(xt.shape[1]).expand(xt.shape)

    x0, prompt = torch.zeros(2, 8, dtype=torch.long), torch.zeros(2, 8, dtype=torch.bool)
    process = ProgressiveUnmasking(4, rightmost)
    chains = replace(begin(process, x0, prompt, 0), xt=torch.full((2, 8), MASK))
    for step in range(3):
        chains = process.advance(chains, predictions(x0, step), step, gen(step))
        masked = (chains.xt == MASK).long()
        assert (masked.diff() <= 0).all()
    assert (masked.sum(1) < 8).all()


@pytest.mark.parametrize(
    ("bad", "name"),
    [
        ({"num_stages": 0}, "num_stages"),
        ({"num_stages": [[5, 8]]}, "num_stages"),
        ({"num_stages": [[0, 8], [5, 4]]}, "num_stages"),
        ({"num_stages": [[0, 8], [5]]}, "num_stages"),
        ({"threshold": 0.0}, "threshold"),
        ({"threshold": -0.5}, "threshold"),
        ({"threshold": 1.5}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"policy": "confidence"}, "policy"),
        ({"pool": 0}, "pool"),
        ({"pool": "some"}, "pool"),
        ({"pool": True}, "pool"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_by_name(bad, name):
    """When the process is made, not when it is first used."""
    with pytest.raises(ValueError, match=name):
        ProgressiveUnmasking(**bad)


@few
@given(seed=seeds, length=st.integers(1, 12), num_stages=st.integers(1, 50), threshold=thresholds)
def test_a_chain_ends_however_few_positions_it_has(seed, length, num_stages, threshold):
    """Also of a model that is never sure, with more stages than positions: about one stage a position then."""
    x0, prompt = sequences(seed, 4, length)
    process = ProgressiveUnmasking(num_stages, threshold=threshold)
    chains = begin(process, x0, prompt, seed)
    uniform = torch.zeros(4, length, V).index_fill(2, torch.tensor([MASK]), float("-inf"))
    for step in range(num_stages + 60 * length):
        chains = process.advance(chains, uniform, step, gen(seed + step))
        if chains.done.all():
            return
    raise AssertionError("a chain does not end")

"""The chain that training and sampling share: what a policy scores, what a reveal uncovers, what a stage is."""

import inspect
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from puma_lightning.chain.policies import Confidence, Entropy, LeftToRight, Margin, Policy, RandomOrder, policy_name
from puma_lightning.chain.reveal import reveal, reveal_at_random
from puma_lightning.chain.stages import stage_of, target_count
from puma_lightning.chain.student import Sampler
from puma_lightning.chain.teacher import ProgressiveUnmasking

V = 6
MASK = V - 1
POLICIES: list[Policy] = [Confidence(), Margin(), Entropy(), RandomOrder(), LeftToRight()]
seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=40, deadline=None)


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def board(seed: int, batch: int = 4, length: int = 7) -> tuple[Tensor, Tensor]:
    """Clean tokens and the same with random positions masked."""
    generator = gen(seed)
    x0 = torch.randint(MASK, (batch, length), generator=generator)
    return x0, x0.masked_fill(torch.rand(batch, length, generator=generator) < 0.6, MASK)


# --- reveal ---


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


# --- policies ---


def probabilities(seed: int, with_inf: bool) -> tuple[Tensor, Tensor, Tensor]:
    logits = 3 * torch.randn(2, 5, V, generator=gen(seed))
    if with_inf:
        logits[..., MASK] = float("-inf")
    return logits, logits.double().softmax(-1), board(seed, 2, 5)[1]


@few
@given(seed=seeds, with_inf=st.booleans())
def test_policies_are_their_definitions(seed, with_inf):
    """Confidence is p1, Margin p1 - p2, Entropy sum p log p, all of softmax(logits); -inf means p = 0."""
    logits, p, xt = probabilities(seed, with_inf)
    first, second = p.sort(-1, descending=True).values[..., :2].unbind(-1)
    expected = {Confidence: first, Margin: first - second, Entropy: torch.xlogy(p, p).sum(-1)}
    for policy, value in expected.items():
        torch.testing.assert_close(policy()(logits, xt).double(), value, atol=1e-5, rtol=1e-4)


@few
@given(seed=seeds, constant=st.floats(-50, 50), with_inf=st.booleans())
def test_policies_ignore_a_constant_added_to_the_logits(seed, constant, with_inf):
    """Scores are functions of the probabilities, not of the logits' level."""
    logits, _, xt = probabilities(seed, with_inf)
    for policy in POLICIES:
        torch.testing.assert_close(policy(logits + constant, xt), policy(logits, xt), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_scores_are_numbers_in_half_precision_too(policy):
    """(B, L) floats without NaN for bfloat16 logits with the mask token at -inf."""
    logits = torch.randn(2, 5, V).bfloat16()
    logits[..., MASK] = float("-inf")
    scores = policy(logits, torch.full((2, 5), MASK))
    assert scores.shape == (2, 5)
    assert scores.is_floating_point()
    assert not scores.isnan().any()


@pytest.mark.parametrize("policy", [Confidence(), Margin(), Entropy()], ids=repr)
def test_the_most_certain_position_comes_first(policy):
    """The order of positions whose predictions get sharper and sharper."""
    logits = torch.tensor([[[0.0, 0, 0], [4.0, 0, 0], [1.0, 0, 0], [9.0, 0, 0]]])
    assert policy(logits, torch.full((1, 4), 2)).argsort(descending=True).tolist() == [[3, 1, 2, 0]]


def test_left_to_right_takes_the_leftmost_masked_position():
    """One position at a time, from the left, prompts skipped."""
    xt = torch.tensor([[MASK, 0, MASK, MASK]])
    order = []
    while (xt == MASK).any():
        out = reveal(xt, torch.ones_like(xt), LeftToRight()(torch.zeros(1, 4, V), xt), torch.tensor([1]), MASK)
        order.append(int((out != xt).nonzero()[0, 1]))
        xt = out
    assert order == [0, 2, 3]


def test_random_order_is_uniform():
    """Whatever the logits, each masked position is as likely as any other to be next."""
    rows = 4000
    xt = torch.full((rows, 4), MASK)
    logits = torch.randn(1, 4, V, generator=gen(0)).expand(rows, -1, -1)
    out = reveal(xt, xt * 0, RandomOrder()(logits, xt), torch.ones(rows).long(), MASK, generator=gen(1))
    counts = (out == 0).sum(0)
    assert ((counts - rows / 4) ** 2 / (rows / 4)).sum() < 22  # chi-square, 3 degrees of freedom


def test_a_plain_function_is_a_policy():
    """A user's own callable needs nothing but the signature."""

    def rightmost(logits: Tensor, xt: Tensor) -> Tensor:
        return torch.arange(xt.shape[1]).expand(xt.shape)

    xt = torch.full((2, 4), MASK)
    out = reveal(xt, xt * 0, rightmost(torch.zeros(2, 4, V), xt), torch.tensor([1, 2]), MASK)
    assert (out == 0).tolist() == [[False, False, False, True], [False, False, True, True]]
    assert policy_name(rightmost) == "rightmost"
    assert policy_name(Confidence()) == "confidence"


@pytest.mark.parametrize("policy", [Policy, *map(type, POLICIES)])
def test_a_policy_never_sees_x0(policy):
    """Logits and xt are all it gets, or the propositions of the paper would not hold."""
    assert list(inspect.signature(policy.__call__).parameters) == ["self", "logits", "xt"]


# --- stages ---


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


@pytest.mark.parametrize("policy", [Confidence, "Confidence", None])
def test_a_policy_must_be_an_instance_or_a_function(policy):
    for owner in (ProgressiveUnmasking, Sampler):
        with pytest.raises(ValueError, match="policy: expected an instance"):
            owner(policy=policy)


def test_scores_of_another_shape_or_without_a_value_are_refused():
    xt, one = torch.tensor([[5, 5, 1]]), torch.ones(1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"\(1, 3\), got \(3,\)"):
        reveal(xt, xt, torch.zeros(3), one, 5)
    with pytest.raises(ValueError, match="NaN"):
        reveal(xt, xt, torch.tensor([[0.0, float("nan"), 0.0]]), one, 5)
    reveal(xt, xt, torch.tensor([[0.0, 0.0, float("nan")]]), one, 5)  # not masked, so nobody reads it

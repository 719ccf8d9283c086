"""What a policy scores: the definitions, and the order that they lead to."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from puma_lightning.chain.policies import Confidence, Entropy, LeftToRight, Margin, Policy, RandomOrder, policy_name
from puma_lightning.chain.reveal import reveal
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


@pytest.mark.parametrize("policy", [Confidence, "Confidence", None])
def test_a_policy_must_be_an_instance_or_a_function(policy):
    for owner in (ProgressiveUnmasking, Sampler):
        with pytest.raises(ValueError, match="policy: expected an instance"):
            owner(policy=policy)

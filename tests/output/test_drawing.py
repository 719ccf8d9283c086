"""Drawing tokens: their distribution, and that the mask token is never drawn."""

import pytest
import torch
from torch import Tensor

from puma_lightning.output.drawing import draw

V = 7
MASK = 3  # not the last token, so that nothing may rely on that


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def frequencies(logits: Tensor, temperature: float, top_p: float, rows: int = 20000) -> Tensor:
    drawn = draw(logits.expand(rows, 1, -1), MASK, temperature, top_p, gen(0))
    return torch.bincount(drawn.flatten(), minlength=V) / rows


LOGITS = torch.tensor([1.0, 2.0, 0.5, 9.0, 0.0, float("-inf"), -1.0])  # the mask token is the likeliest


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_distribution(temperature):
    """softmax(logits / temperature) over everything but the mask token."""
    expected = (LOGITS.index_fill(0, torch.tensor([MASK]), float("-inf")) / temperature).softmax(0)
    torch.testing.assert_close(frequencies(LOGITS, temperature, 1.0), expected, atol=0.015, rtol=0)


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.8, 0.95])
def test_top_p_draws_from_the_smallest_sufficient_set(top_p):
    """The likeliest tokens until their probability reaches top_p, renormalised; never an empty set."""
    p = LOGITS.index_fill(0, torch.tensor([MASK]), float("-inf")).softmax(0)
    kept, total = torch.zeros(V), 0.0
    for i in p.argsort(descending=True).tolist():
        if total < top_p:
            kept[i] = p[i]
        total += p[i].item()
    torch.testing.assert_close(frequencies(LOGITS, 1.0, top_p), kept / kept.sum(), atol=0.015, rtol=0)


def test_temperature_zero_takes_the_likeliest_token():
    """The likeliest but the mask token, and nothing random about it."""
    assert draw(LOGITS.expand(2, 3, -1), MASK).eq(1).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_certain_of_the_mask_token_still_gets_another_one(temperature):
    """With mask_id 0 and every other logit at -inf a sampler would never end."""
    logits = torch.full((1, 2, V), float("-inf"))
    logits[..., 0] = 0.0
    assert not (draw(logits, 0, temperature) == 0).any()


@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_of_numbers_that_are_none_some_token_is_drawn(top_p):
    """A run stops at them with an error that says so, if not at once; reading beyond the vocabulary would end worse."""
    tokens = draw(torch.full((1, 2, V), float("nan")), MASK, 1.0, top_p, gen(0))
    assert ((tokens >= 0) & (tokens < V)).all()


@pytest.mark.parametrize("temperature", [0.0, 0.3, 0.5, 3.0])
@pytest.mark.parametrize("top_p", [0.2, 1.0])
@pytest.mark.parametrize("mask_id", [0, 3])
def test_the_mask_is_never_drawn_even_where_nothing_else_has_a_probability(temperature, top_p, mask_id):
    logits = torch.full((2, 50, 4), float("-inf"))
    logits[..., mask_id] = 0.0
    assert (draw(logits, mask_id, temperature, top_p, torch.Generator().manual_seed(0)) != mask_id).all()

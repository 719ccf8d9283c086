"""Drawing tokens from predictions."""

import torch
from torch import Tensor

from puma_lightning.output.prediction import exclude_token


def check_draw(temperature: float, top_p: float) -> None:
    """Check how tokens are to be drawn.

    Raises:
        ValueError: If the temperature is negative or infinite, or top_p is not in (0, 1].
    """
    if not 0 <= temperature < float("inf"):
        raise ValueError(
            f"temperature: expected a finite number, 0 or above, got {temperature}; 0 takes the most likely token"
        )
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a probability in (0, 1], got {top_p}; 1 draws from all tokens")


def draw(
    logits: Tensor,
    mask_id: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a token for every position, never the mask token.

    Args:
        logits: (B, L, V).
        mask_id: The mask token.
        temperature: 0 takes the most likely token; otherwise draw from softmax(logits / temperature).
        top_p: Draw only from the smallest set of tokens with at least this probability.
        generator: Source of the draws, on the device of ``logits``.

    Returns:
        Tokens, (B, L) int64.
    """
    # Finite, so that even where nothing else has a probability the mask token is the worst choice.
    logits = exclude_token(logits.float().clamp_min(torch.finfo(torch.float).min), mask_id)
    if temperature == 0:
        return logits.argmax(-1)
    uniform = torch.rand(logits.shape[:2], dtype=torch.float, device=logits.device, generator=generator)
    return draw_at(logits.flatten(0, 1), uniform.flatten(), temperature, top_p).view(uniform.shape)


def draw_at(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """Draw a token for every row of logits, by inverting its cumulative distribution at a given number.

    Args:
        logits: (N, V) float32; in every row one is finite.
        uniform: Uniform numbers in [0, 1), (N,) float32.
        temperature: Above 0.
        top_p: Draw only from the smallest set of tokens with at least this probability.

    Returns:
        Tokens, (N,) int64.
    """
    # Less the maximum first: a small temperature would make infinities.
    probability = (logits - logits.amax(-1, keepdim=True)).div_(temperature).softmax(-1)
    order = None
    if top_p < 1:
        probability, order = probability.sort(dim=-1, descending=True)
        before = probability.cumsum(-1).sub_(probability)
        probability.masked_fill_(before >= top_p, 0.0)
    cumulative = probability.cumsum(-1)
    total = cumulative[:, -1]
    # Below the total even if the product is rounded up to it, so that the token found has a probability.
    point = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    # NaN has no place in the distribution: the search then ends behind the last token.
    place = torch.searchsorted(cumulative, point[:, None], right=True).clamp_max(logits.shape[-1] - 1)
    # A parallel sum may fall by a rounding error, so that the place found has no probability.
    place = torch.where(probability.gather(1, place) > 0, place, probability.argmax(-1, keepdim=True))
    return (place if order is None else order.gather(1, place))[:, 0]

"""What the model says about positions: statistics of its predictions, without their logits."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Statistic = Literal["token", "log_prob", "margin", "entropy"]


@dataclass(frozen=True)
class Prediction:
    """What the model says about positions, without gradient. A field that nobody asked for is None.

    Attributes:
        nll: -log p(target) in nats, (...) float32.
        token: The most likely token, (...) int64.
        log_prob: Log-probability of the most likely token, (...) float32.
        margin: Probability of the most likely token minus that of the second, (...) float32.
        entropy: Entropy of the distribution, in nats, (...) float32.
        drawn: A token drawn from the distribution, (...) int64.
    """

    nll: Tensor | None = None
    token: Tensor | None = None
    log_prob: Tensor | None = None
    margin: Tensor | None = None
    entropy: Tensor | None = None
    drawn: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Prediction":
        """Apply a function to every field that is not None."""
        return Prediction(**{name: function(value) for name, value in vars(self).items() if value is not None})


def apply(function: Callable[[Tensor], Tensor], predictions: Tensor | Prediction) -> Tensor | Prediction:
    """Apply a function of rows to predictions, whether they are logits, (B, L, V), or statistics, (B, L) each."""
    return function(predictions) if isinstance(predictions, Tensor) else predictions.map(function)


def statistics(logits: Tensor, names: Collection[Statistic]) -> Prediction:
    """Compute statistics of logits, (..., V)."""
    logits = logits.float()
    found: dict[str, Tensor] = {}
    if "token" in names:
        found["token"] = logits.argmax(-1)
    if "log_prob" in names:
        found["log_prob"] = logits.amax(-1) - logits.logsumexp(-1)
    if "margin" in names:
        top = (logits.topk(2, dim=-1).values - logits.logsumexp(-1, keepdim=True)).exp()
        found["margin"] = top[..., 0] - top[..., 1]
    if "entropy" in names:
        found["entropy"] = torch.special.entr(logits.softmax(-1)).sum(-1)
    return Prediction(**found)


def exclude_token(logits: Tensor, token: int) -> Tensor:
    """Give a token, such as the mask, probability 0.

    Args:
        logits: (..., V).
        token: Its id.

    Returns:
        Logits with -inf for the token, (..., V).
    """
    return logits.masked_fill(torch.arange(logits.shape[-1], device=logits.device) == token, float("-inf"))


def exclude_token_(logits: Tensor, token: int) -> None:
    """Give a token probability 0 in place, which is quicker and has no gradient."""
    logits[..., token] = float("-inf")

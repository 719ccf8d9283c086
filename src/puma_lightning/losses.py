"""The masked diffusion loss."""

import torch.nn.functional as F
from torch import Tensor


def masked_cross_entropy(logits: Tensor, x0: Tensor, masked: Tensor) -> Tensor:
    """Mean negative log-likelihood of the masked positions of each sequence.

    ``(1 / n) * sum over masked i of -log p(x0_i | xt)`` with n the number masked. Its expectation over n
    uniform in 1..A and uniformly chosen positions is the per-token NELBO of the any-order model.

    Args:
        logits: Predictions aligned with positions, (B, L, V).
        x0: Clean sequences, (B, L) int64.
        masked: True where xt is masked, (B, L) bool.

    Returns:
        Loss of each sequence in nats per token, (B,) float32.
    """
    nll = F.cross_entropy(logits.float().flatten(0, 1), x0.flatten(), reduction="none").view_as(x0)
    return (nll * masked).sum(1) / masked.sum(1).clamp_min(1)

"""The losses: masked diffusion and next token."""

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
    return (negative_log_likelihood(logits, x0) * masked).sum(1) / masked.sum(1).clamp_min(1)


def next_token_cross_entropy(logits: Tensor, x0: Tensor, trained: Tensor) -> Tensor:
    """Mean negative log-likelihood of all trained positions of a batch, each given those before it.

    Args:
        logits: Predictions aligned with positions, (B, L, V).
        x0: Clean sequences, (B, L) int64.
        trained: True where a position counts, (B, L) bool; see ``trained_positions``.

    Returns:
        Loss in nats per token, () float32.
    """
    return (negative_log_likelihood(logits, x0) * trained).sum() / trained.sum().clamp_min(1)


def trained_positions(x0: Tensor, prompt_mask: Tensor, eos_id: int | None) -> Tensor:
    """Return positions an autoregressive model is trained on: the answer up to and including its first EOS.

    Position 0 has nothing before it to be predicted from. What follows an EOS is left out as long as it is EOS
    again, which is padding; so documents packed into one sequence, with an EOS between them, all count.

    Args:
        x0: Clean sequences, (B, L) int64.
        prompt_mask: True where a position is given, (B, L) bool.
        eos_id: The token that ends an answer and pads it; None trains on everything.

    Returns:
        True where a position counts, (B, L) bool.
    """
    trained = ~prompt_mask
    if eos_id is not None:
        end = trained & (x0 == eos_id)
        trained = trained & ~(end & end.roll(1, dims=1))
    trained[:, 0] = False
    return trained


def negative_log_likelihood(logits: Tensor, x0: Tensor) -> Tensor:
    """-log p of the tokens x0 (B, L) under logits (B, L, V), in nats, (B, L) float32."""
    return F.cross_entropy(logits.float().flatten(0, 1), x0.flatten(), reduction="none").view_as(x0)

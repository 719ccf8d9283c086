"""Revealing: the highest-scored masked positions get their tokens.

A pure function of tensors that works on whole batches and never waits for the device.
"""

import torch
from torch import Tensor


def reveal(
    xt: Tensor,
    tokens: Tensor,
    scores: Tensor,
    count: Tensor,
    mask_id: int,
    also: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Reveal the highest-scored masked positions. Positions that are not masked never change.

    Args:
        xt: Partly masked sequences, (B, L) int64.
        tokens: What a revealed position becomes, (B, L) int64: x0 for the teacher, drawn tokens for the student.
        scores: Higher is revealed earlier, (B, L). Ties are broken uniformly at random.
        count: How many masked positions to reveal in each row, (B,) int64; all of them where it is more
            than the row has.
        mask_id: The mask token.
        also: Masked positions to reveal whatever their score, (B, L) bool.
        generator: Source of the tie-breaking, on the device of ``xt``.

    Returns:
        The new xt, (B, L) int64.

    Raises:
        ValueError: If the scores have another shape, or (looked for on the CPU only) are NaN where xt is masked.

    Example:
        >>> xt, x0 = torch.tensor([[5, 9, 9, 9]]), torch.tensor([[5, 3, 8, 1]])
        >>> reveal(xt, x0, scores=torch.tensor([[0.0, 0.2, 0.9, 0.5]]), count=torch.tensor([2]), mask_id=9)
        tensor([[5, 9, 8, 1]])
    """
    masked = xt == mask_id
    if scores.shape != xt.shape:
        raise ValueError(
            f"policy: expected scores (B, L) = {tuple(xt.shape)}, got {tuple(scores.shape)}; return one score for each "
            "position"
        )
    if scores.device.type == "cpu":
        message = "policy: expected numbers as scores, got NaN for a masked position; return a number there"
        try:
            torch._assert_async(~(scores.isnan() & masked).any(), message)
        except RuntimeError as error:
            raise ValueError(message) from error
    # Positions that are not masked come last, behind a masked position scored -inf as well.
    scores = scores.float().clamp_min(torch.finfo(torch.float).min).masked_fill(~masked, float("-inf"))
    shuffle = torch.rand(xt.shape, dtype=torch.float, device=xt.device, generator=generator).argsort(dim=1)
    ranked = scores.gather(1, shuffle).argsort(dim=1, descending=True, stable=True)
    order = shuffle.gather(1, ranked)
    first = torch.arange(xt.shape[1], device=xt.device) < count[:, None]
    chosen = torch.zeros_like(masked).scatter(1, order, first)
    if also is not None:
        chosen = chosen | also
    return torch.where(chosen & masked, tokens, xt)


def reveal_at_random(
    xt: Tensor, tokens: Tensor, count: Tensor, mask_id: int, generator: torch.Generator | None = None
) -> Tensor:
    """Reveal uniformly chosen masked positions.

    Args:
        xt: Partly masked sequences, (B, L) int64.
        tokens: What a revealed position becomes, (B, L) int64.
        count: How many masked positions to reveal in each row, (B,) int64.
        mask_id: The mask token.
        generator: Source of the choice, on the device of ``xt``.

    Returns:
        The new xt, (B, L) int64.

    Example:
        >>> xt, x0 = torch.tensor([[5, 9, 9, 9]]), torch.tensor([[5, 3, 8, 1]])
        >>> int((reveal_at_random(xt, x0, count=torch.tensor([2]), mask_id=9) == 9).sum())
        1
    """
    return reveal(xt, tokens, torch.zeros(xt.shape, device=xt.device), count, mask_id, generator=generator)

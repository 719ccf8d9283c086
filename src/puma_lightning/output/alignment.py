"""The shift of models that predict the next token, undone in one place."""

import torch
from torch import Tensor


def align(outputs: Tensor, shifted: bool, before: Tensor | None = None) -> Tensor:
    """Put what the backbone says about each position at that position.

    A shifted backbone, which is autoregressive or initialised from such a model, predicts position i+1 at position i.
    Loss, policies and samplers see aligned outputs alone.

    Args:
        outputs: Hidden states or logits of the backbone, (B, L, D) or (B, L, V), for sequences or for blocks.
        shifted: Whether the backbone is shifted.
        before: The output at the position before the first, from which a block goes on, (B, 1, D) or (B, 1, V). Without
            it nothing is said about the first position: it must be given, and keeps its own output.

    Returns:
        The same; moved by one position if the backbone is shifted.
    """
    if not shifted:
        return outputs
    return torch.cat([outputs[:, :1] if before is None else before, outputs[:, :-1]], dim=1)

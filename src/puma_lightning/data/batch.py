"""The one format of a batch, and the check that every batch passes before a model sees it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]


def check_batch(
    batch: Any,
    *,
    mask_id: int,
    vocab_size: int,
    may_be_given: bool = False,
    first_given: bool = False,
    clean: bool = True,
) -> Batch:
    """Check a batch ``{"input_ids": (B, L), "prompt_mask": (B, L)}`` from any DataModule.

    Args:
        batch: What a DataLoader returned. Without a ``prompt_mask`` no position is given if the batch must be clean;
            otherwise every position that does not hold a mask token is.
        mask_id: The mask token.
        vocab_size: V; token ids must be in 0..V-1.
        may_be_given: Whether a prompt may cover everything.
        first_given: Whether position 0 must be given, as a shifted model wants it.
        clean: Whether the answer must be free of mask tokens. For prediction it need not be.

    Returns:
        ``{"input_ids": (B, L) int64, "prompt_mask": (B, L) bool}``; other columns, such as ``answer``, are left out.

    Raises:
        ValueError: If the batch has another form, or holds what no model can be trained on.
    """
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        got = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f'batch: expected a batch {{"input_ids": (B, L) int64, "prompt_mask": (B, L) bool}}, got {got}; '
            "return such a dictionary from your Dataset"
        )
    input_ids = batch["input_ids"]
    if input_ids.dim() != 2 or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise ValueError(
            f"input_ids: expected integers (B, L), got {tuple(input_ids.shape)} {input_ids.dtype}; give every "
            "sequence the same length"
        )
    input_ids = input_ids.long()
    prompt_mask = batch.get("prompt_mask")
    if prompt_mask is None:
        prompt_mask = torch.zeros_like(input_ids, dtype=torch.bool) if clean else input_ids != mask_id
    if not isinstance(prompt_mask, Tensor) or prompt_mask.shape != input_ids.shape:
        shape = tuple(prompt_mask.shape) if isinstance(prompt_mask, Tensor) else type(prompt_mask).__name__
        raise ValueError(
            f"prompt_mask: expected the shape of input_ids, {tuple(input_ids.shape)}, got {shape}; say of every "
            "position whether it is given"
        )
    prompt_mask = prompt_mask.bool()

    outside = (input_ids < 0) | (input_ids >= vocab_size)
    if outside.any():
        row, column = outside.nonzero()[0].tolist()
        raise ValueError(
            f"input_ids: expected token ids in 0..{vocab_size - 1} (vocabulary {vocab_size}), got "
            f"{input_ids[row, column].item()} at row {row}, position {column} of a batch; correct the data, or give "
            "the backbone a larger vocab_size"
        )
    masks = (input_ids == mask_id) & (prompt_mask | clean)
    if masks.any():
        row, column = masks.nonzero()[0].tolist()
        raise ValueError(
            f"input_ids: expected {'clean data' if clean else 'a prompt'} without the mask token {mask_id}, got it at "
            f"row {row}, position {column} of a batch; give the mask an id of its own"
        )
    given = prompt_mask.all(1)
    if given.any() and not may_be_given:
        raise ValueError(
            "prompt_mask: expected at least one position that is left to predict, got a prompt that covers the whole "
            f"sequence in row {int(given.nonzero()[0])} of a batch; shorten the prompt, or leave the sequence out"
        )
    if first_given:
        check_first(prompt_mask)
    return {"input_ids": input_ids, "prompt_mask": prompt_mask}


def check_first(prompt_mask: Tensor) -> None:
    """Check that a model which predicts each position at the one before it has a position to start from.

    Args:
        prompt_mask: True where a position is given, (B, L) bool.

    Raises:
        ValueError: If position 0 of a row is not given.
    """
    if not prompt_mask[:, 0].all():
        raise ValueError(
            "prompt_mask: expected position 0 to be given in every sequence, as an autoregressive or shifted model "
            "predicts each position at the one before it, got one that is to be predicted in row "
            f"{int((~prompt_mask[:, 0]).nonzero()[0])} of a batch; start sequences with a token such as EOS and set "
            "prompt_mask there"
        )

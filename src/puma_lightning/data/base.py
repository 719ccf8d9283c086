"""The one batch format, the check that every batch passes before a model sees it, and what DataModules share."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Batch = dict[str, Tensor]
DEFAULT_CACHE = "~/.cache/puma_lightning"


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
        batch: What a DataLoader returned. Without a ``prompt_mask`` nothing is given; where the answer may hold
            mask tokens, everything else is.
        mask_id: The mask token.
        vocab_size: V; token ids must be in 0..V-1.
        may_be_given: Whether a prompt may cover everything.
        first_given: Whether position 0 must be given, as a shifted model wants it.
        clean: Whether the answer must be free of mask tokens (it need not be for prediction).

    Returns:
        ``{"input_ids": (B, L) int64, "prompt_mask": (B, L) bool}``.

    Raises:
        ValueError: If the batch has another form, or holds what no model can be trained on.
    """
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        got = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f'expected a batch {{"input_ids": (B, L) int64, "prompt_mask": (B, L) bool}}, got {got}; '
            "return such a dictionary from your Dataset"
        )
    input_ids = batch["input_ids"]
    if input_ids.dim() != 2 or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise ValueError(
            f"input_ids must be (B, L) integers, got {tuple(input_ids.shape)} {input_ids.dtype}; "
            "every sequence must have the same length"
        )
    input_ids = input_ids.long()
    prompt_mask = batch.get("prompt_mask")
    if prompt_mask is None:
        prompt_mask = torch.zeros_like(input_ids, dtype=torch.bool) if clean else input_ids != mask_id
    if prompt_mask.shape != input_ids.shape:
        raise ValueError(
            f"prompt_mask must have the shape of input_ids {tuple(input_ids.shape)}, got {tuple(prompt_mask.shape)}"
        )
    prompt_mask = prompt_mask.bool()

    outside = (input_ids < 0) | (input_ids >= vocab_size)
    if outside.any():
        row, column = outside.nonzero()[0].tolist()
        raise ValueError(
            f"token ids must be in 0..{vocab_size - 1} (vocabulary {vocab_size}), got "
            f"{input_ids[row, column].item()} at row {row}, position {column} of a batch"
        )
    masks = (input_ids == mask_id) & (prompt_mask | clean)
    if masks.any():
        row, column = masks.nonzero()[0].tolist()
        raise ValueError(
            f"{'clean data' if clean else 'a prompt'} must not contain the mask token {mask_id}, found at row {row}, "
            f"position {column} of a batch; give the mask an id of its own"
        )
    given = prompt_mask.all(1)
    if given.any() and not may_be_given:
        raise ValueError(
            f"the prompt covers the whole sequence in row {int(given.nonzero()[0])} of a batch; "
            "at least one position must be left to predict"
        )
    if first_given:
        check_first(prompt_mask)
    return {"input_ids": input_ids, "prompt_mask": prompt_mask}


def check_first(prompt_mask: Tensor) -> None:
    """Check that a model which predicts each position at the one before it has a position to start from.

    Raises:
        ValueError: If position 0 of a row of the mask, (B, L) bool, is not given.
    """
    if not prompt_mask[:, 0].all():
        raise ValueError(
            "an autoregressive or shifted model predicts each position at the one before it, so position 0 must be "
            f"given in every sequence, and is not in row {int((~prompt_mask[:, 0]).nonzero()[0])} of a batch; start "
            "sequences with a token such as EOS and set prompt_mask there"
        )


def make_loader(
    dataset: Dataset[Any],
    batch_size: int,
    shuffle: bool,
    num_workers: int,
    collate_fn: Callable[[Any], Any] | None = None,
) -> DataLoader[Any]:
    """A DataLoader with what all of ours have in common."""
    return DataLoader(
        dataset,
        batch_size=batch_size,  # by keyword: Lightning's replacement of samplers fails otherwise
        shuffle=shuffle,
        num_workers=num_workers,
        collate_fn=collate_fn,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
    )


def cache_folder(cache_dir: str) -> Path:
    """Where a DataModule keeps what it made; the default follows ``$XDG_CACHE_HOME`` if set."""
    if cache_dir == DEFAULT_CACHE and os.environ.get("XDG_CACHE_HOME"):
        cache_dir = os.path.join(os.environ["XDG_CACHE_HOME"], "puma_lightning")
    return Path(cache_dir).expanduser()


def at_least(argument: str, value: int, low: int) -> int:
    """Returns the value of an argument; raises ValueError, with its name, if it is below ``low``."""
    if value < low:
        raise ValueError(f"{argument}: expected at least {low}, got {value}")
    return value

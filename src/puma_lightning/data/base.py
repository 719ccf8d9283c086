"""The one batch format and its check, and what a DataModule may offer besides its loaders."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

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
            f'batch: expected {{"input_ids": (B, L) int64, "prompt_mask": (B, L) bool}}, got {got}; '
            "return such a dictionary from your Dataset"
        )
    input_ids = batch["input_ids"]
    if input_ids.dim() != 2 or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise ValueError(
            f"input_ids: expected (B, L) integers, got {tuple(input_ids.shape)} {input_ids.dtype}; give every "
            "sequence the same length"
        )
    input_ids = input_ids.long()
    prompt_mask = batch.get("prompt_mask")
    if prompt_mask is None:
        prompt_mask = torch.zeros_like(input_ids, dtype=torch.bool) if clean else input_ids != mask_id
    if prompt_mask.shape != input_ids.shape:
        raise ValueError(
            f"prompt_mask: expected the shape of input_ids {tuple(input_ids.shape)}, got {tuple(prompt_mask.shape)}; "
            "say for each position whether it is given"
        )
    prompt_mask = prompt_mask.bool()

    outside = (input_ids < 0) | (input_ids >= vocab_size)
    if outside.any():
        row, column = outside.nonzero()[0].tolist()
        raise ValueError(
            f"input_ids: expected token ids in 0..{vocab_size - 1} (vocabulary {vocab_size}), got "
            f"{input_ids[row, column].item()} at row {row}, position {column} of a batch; use the tokenizer of this "
            "model"
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
            "prompt_mask: expected at least one position to predict, got a prompt that covers the whole sequence in "
            f"row {int(given.nonzero()[0])} of a batch; leave such sequences out, or cut their prompts"
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
            "prompt_mask: expected position 0 to be given, as an autoregressive or shifted model predicts each "
            f"position at the one before it, got row {int((~prompt_mask[:, 0]).nonzero()[0])} of a batch, where it is "
            "not; start sequences with a token such as EOS and set prompt_mask there"
        )


class Grid(NamedTuple):
    """How a sequence is drawn as a grid of cells, row by row.

    Attributes:
        rows: Rows of the grid.
        columns: Columns of the grid.
        box_rows: Rows of the boxes that lines set apart.
        box_columns: Columns of these boxes.
        first: The position of the first cell in the sequence.
    """

    rows: int
    columns: int
    box_rows: int
    box_columns: int
    first: int = 0


class Offered:
    """What a DataModule offers besides its loaders. Everything is optional, and nothing is inherited.

    A DataModule offers a thing by having an attribute, a property or a method of its name. The command line reads
    ``vocab_size`` and ``mask_id`` when the DataModule has been made, so they are set in its ``__init__`` or its class.

    - ``vocab_size``: V, with the mask token. The command line gives it to the backbone.
    - ``mask_id``: the mask token. The command line gives it to the model.
    - ``eos_id``: the token that ends and pads an answer. Without it answers have no end.
    - ``decode(tokens, prompt_mask)``: a sequence, (L,), as named texts: ``{"prompt": ..., "completion": ...}``. Without
      it no text is shown, written or judged.
    - ``val_names``, ``test_names``: a name for each validation (test) loader. Without them the metrics of the second
      loader end in ``/1``.
    - ``tokenizer_fingerprint``: a hash of all that determines token ids. Without it nobody notices that weights were
      trained with another tokenizer.
    - ``grid``: the ``Grid`` that sequences are drawn as. Without it they are drawn as strips.

    ``TextDataModule`` also has ``encode`` and ``encode_prompt``, to be overridden for columns and formats of one's own.

    Args:
        datamodule: Any DataModule; None if the loaders come from elsewhere.
    """

    def __init__(self, datamodule: object) -> None:
        self._datamodule = datamodule

    @property
    def vocab_size(self) -> int:
        """V; raises ValueError if it is not there, as ``mask_id`` does."""
        return self._required("vocab_size")

    @property
    def mask_id(self) -> int:
        """The mask token."""
        return self._required("mask_id")

    @property
    def eos_id(self) -> int | None:
        """The token that ends and pads an answer."""
        eos_id: int | None = self._typed("eos_id", int, "a token id")
        return eos_id

    @property
    def decode(self) -> Callable[[Tensor, Tensor | None], dict[str, str]] | None:
        """From a sequence, (L,), and its prompt mask to named texts."""
        decode = getattr(self._datamodule, "decode", None)
        if decode is not None and not callable(decode):
            raise ValueError(
                f"decode: expected a function (tokens, prompt_mask) -> dict[str, str], got {decode!r}; make it a method"
            )
        return decode

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """A hash of all that determines token ids."""
        fingerprint: str | None = self._typed("tokenizer_fingerprint", str, "a hash")
        return fingerprint

    @property
    def grid(self) -> Grid | None:
        """How a sequence is drawn."""
        grid: Grid | None = self._typed("grid", Grid, "a puma_lightning.data.base.Grid")
        return grid

    def loader_name(self, stage: str, index: int) -> str:
        """Return the name of a loader of ``val`` or ``test``; its number if it has none.

        Raises:
            ValueError: If there are names, but none for this loader.
        """
        what = f"a list with a name for each {stage} loader"
        names: list[str] | None = self._typed(f"{stage}_names", (list, tuple), what)
        if names and index >= len(names):
            raise ValueError(f"{stage}_names: expected {what}, got {names} for {index + 1} or more; name all of them")
        return str(names[index] if names else index)

    def _required(self, name: str) -> int:
        value: int | None = self._typed(name, int, "an integer")
        if value is None:
            raise ValueError(
                f"data: expected an attribute {name} for the command line to give to the model, got none from "
                f"{type(self._datamodule).__name__}; set it in __init__"
            )
        return value

    def _typed(self, name: str, wanted: type | tuple[type, ...], what: str) -> Any:
        value = getattr(self._datamodule, name, None)
        if value is not None and (not isinstance(value, wanted) or isinstance(value, bool)):
            owner = type(self._datamodule).__name__
            raise ValueError(f"{name}: expected {what} or None from {owner}, got {value!r}; set it to one of these")
        return value


def make_loader(
    dataset: Dataset[Any],
    batch_size: int,
    shuffle: bool,
    num_workers: int,
    collate_fn: Callable[[Any], Any] | None = None,
) -> DataLoader[Any]:
    """Make a DataLoader with what all of ours have in common."""
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
    """Return where a DataModule keeps what it made; the default follows ``$XDG_CACHE_HOME`` if set."""
    if cache_dir == DEFAULT_CACHE and os.environ.get("XDG_CACHE_HOME"):
        cache_dir = os.path.join(os.environ["XDG_CACHE_HOME"], "puma_lightning")
    return Path(cache_dir).expanduser()


def at_least(argument: str, value: int, low: int) -> int:
    """Return the value of an argument; raise ValueError, with its name, if it is below ``low``."""
    if value < low:
        raise ValueError(f"{argument}: expected at least {low}, got {value}; give such a number")
    return value

"""The one format of a batch, and the check that every batch passes before a model sees it.

A batch is a dictionary of tensors (B, L), of which ``input_ids`` alone is required:

- ``input_ids``, integers: the tokens.
- ``prompt_mask``: True where a position is *given*: the model sees it, and never has to predict it.
- ``attention_mask``: 0 where a position is *padding*: it is not there for the model. It is not seen, not masked, not
  counted and not trained on, whatever token it holds, and positions are counted without it. Padding may be at either
  end, or between.
- ``labels``, as Hugging Face's collate functions make them: -100 where a position is not to be learned, elsewhere the
  token of ``input_ids``. Understood as a prompt mask: what is not to be learned is given. As in Hugging Face's models,
  an autoregressive or shifted model does not learn the first position, which nothing comes before.
- ``answer``, a list of B texts, for metrics that ask for answers.

Keys of other tools that would change what is learned (``position_ids``, ``token_type_ids``, ``loss_mask`` and others)
may be there if they say nothing that the batch does not say already, and are refused otherwise. Other keys are ignored,
with a warning.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import default_collate

from puma_lightning.chain.chains import padding_token

Batch = dict[str, Tensor]
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

NOT_LEARNED = -100  # a label, in Hugging Face's convention
UNDERSTOOD = ("input_ids", "prompt_mask", "attention_mask", "labels", "answer")
# What has a meaning in other tools, and whether it says what the batch says already: from its value, the prompt mask
# and the positions that are not padding.
SAID_ALREADY: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "position_ids": lambda value, given, real: (value == real.cumsum(1) - 1) | ~real,
    "token_type_ids": lambda value, given, real: (value == value[:1, :1]) | ~real,
    "loss_mask": lambda value, given, real: (value.bool() != given) | ~real,
    "special_tokens_mask": lambda value, given, real: given | ~value.bool(),
}
REFUSED = (
    "inputs_embeds", "decoder_input_ids", "decoder_attention_mask", "encoder_hidden_states", "head_mask",
    "padding_mask", "key_padding_mask", "src_key_padding_mask", "attn_mask", "segment_ids", "sequence_ids",
    "document_ids", "cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "weight", "weights", "loss_weights",
    "sample_weight", "target", "targets", "label", "label_ids", "response_mask", "completion_mask", "assistant_masks",
)  # fmt: skip


def check_batch(
    batch: Any,
    *,
    mask_id: int,
    vocab_size: int,
    may_be_given: bool = False,
    first_given: bool = False,
    clean: bool = True,
) -> Batch:
    """Check a batch from any DataModule, and bring it into one form; see the top of this file for what it may hold.

    Args:
        batch: What a DataLoader returned. Without a ``prompt_mask`` no position is given if the batch must be clean;
            otherwise every position that does not hold a mask token is.
        mask_id: The mask token.
        vocab_size: V; token ids must be in 0..V-1.
        may_be_given: Whether a prompt may cover everything.
        first_given: Whether position 0 must be given, as a shifted model wants it.
        clean: Whether the answer must be free of mask tokens. For prediction it need not be.

    Returns:
        ``{"input_ids": (B, L) int64, "prompt_mask": (B, L) bool}``; other columns, such as ``answer``, are left out. If
        anything is padding, also ``"attention_mask"``, (B, L) bool: padding then holds one token, which is not the
        mask, and is part of the prompt mask, as it is not to be predicted.

    Raises:
        ValueError: If the batch has another form, or holds what no model can be trained on.
    """
    if isinstance(batch, Mapping) and "input_ids" in batch and not isinstance(batch["input_ids"], Tensor):
        raise ValueError(
            f"input_ids: expected a tensor (B, L) of integers, got a {type(batch['input_ids']).__name__}, as examples "
            'that are lists become; give a datasets.Dataset with_format("torch"), or the DataLoader '
            "collate_fn=puma_lightning.pad_collate"
        )
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        got = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f'batch: expected a batch {{"input_ids": (B, L) int64, "prompt_mask": (B, L) bool}}, got {got}; '
            "return such a dictionary from your Dataset"
        )
    input_ids = batch["input_ids"]
    if input_ids.dim() != 2 or input_ids.dtype not in _INTEGERS:
        raise ValueError(
            f"input_ids: expected integers (B, L), got {tuple(input_ids.shape)} {input_ids.dtype}; pad sequences of "
            "different lengths, for instance with collate_fn=puma_lightning.pad_collate"
        )
    input_ids = input_ids.long()
    attention_mask = _attention_mask(batch, input_ids)
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask
    # Whatever padding holds, it is never looked at again.
    input_ids = input_ids.masked_fill(~real, padding_token(mask_id))
    prompt_mask = _prompt_mask(batch, input_ids, real, None if clean else mask_id, first_given)
    _check_other_keys(batch, prompt_mask, real)

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
        check_first(prompt_mask.gather(1, real_first(real)))
    checked = {"input_ids": input_ids, "prompt_mask": prompt_mask}
    return checked if attention_mask is None else {**checked, "attention_mask": attention_mask}


def _attention_mask(batch: Mapping[str, Any], input_ids: Tensor) -> Tensor | None:
    """Return where positions are not padding, (B, L) bool; None if none is padding."""
    mask = batch.get("attention_mask")
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.shape != input_ids.shape or not ((mask == 0) | (mask == 1)).all():
        got = f"{tuple(mask.shape)} {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask: expected 0 where a position is padding and 1 elsewhere, {tuple(input_ids.shape)}, got "
            f"{got}; say of every position whether it is padding, and leave which position sees which to the model"
        )
    mask = mask.bool()
    if mask.all():
        return None
    if not mask.any(1).all():
        raise ValueError(
            "attention_mask: expected at least one position that is not padding in every sequence, got none in row "
            f"{int((~mask.any(1)).nonzero()[0])} of a batch; leave empty sequences out"
        )
    return mask


def _prompt_mask(
    batch: Mapping[str, Any], input_ids: Tensor, real: Tensor, mask_id: int | None, first_given: bool
) -> Tensor:
    """Return where nothing is to be predicted, (B, L) bool: what is given, and padding."""
    masks: dict[str, Tensor] = {}
    for name, meaning in (("prompt_mask", "whether it is given"), ("labels", "what is learned there, -100 if nothing")):
        value = batch.get(name)
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.shape != input_ids.shape:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{name}: expected the shape of input_ids, {tuple(input_ids.shape)}, got {shape}; say of every "
                f"position {meaning}"
            )
        masks[name] = value.bool() if name == "prompt_mask" else value == NOT_LEARNED
    if "labels" in masks:
        other = real & ~masks["labels"] & (batch["labels"] != input_ids)
        if other.any():
            row, column = other.nonzero()[0].tolist()
            raise ValueError(
                f"labels: expected -100 where nothing is learned, and the token of input_ids elsewhere, got "
                f"{batch['labels'][row, column].item()} for {input_ids[row, column].item()} at row {row}, position "
                f"{column} of a batch; give clean sequences that are not shifted: masks are made, and positions "
                "shifted, where the model needs it"
            )
        if first_given:
            masks["labels"] = masks["labels"] | (real & (real.cumsum(1) == 1))
    given = masks.get("prompt_mask", masks.get("labels"))
    if len(masks) == 2 and ((masks["prompt_mask"] != masks["labels"]) & real).any():
        row, column = ((masks["prompt_mask"] != masks["labels"]) & real).nonzero()[0].tolist()
        raise ValueError(
            f"labels: expected -100 where prompt_mask is True and nowhere else, got otherwise at row {row}, position "
            f"{column} of a batch; give one of them"
        )
    if given is None:
        given = torch.zeros_like(real) if mask_id is None else input_ids != mask_id
    return given | ~real


def _check_other_keys(batch: Mapping[str, Any], given: Tensor, real: Tensor) -> None:
    """Refuse what means something in other tools and has no effect here; warn of the rest."""
    for name in batch:
        if name in UNDERSTOOD or batch[name] is None:
            continue
        said_already = SAID_ALREADY.get(name)
        if said_already is None and name not in REFUSED:
            _warn_of_key(str(name))
            continue
        value = batch[name]
        fits = isinstance(value, Tensor) and value.shape in (given.shape, given.shape[1:])
        if said_already is not None and fits and said_already(value.expand_as(given), given, real).all():
            continue
        raise ValueError(
            f"{name}: expected a batch of {', '.join(UNDERSTOOD)}, got {name}, which would change what is learned and "
            "has no effect here; say by prompt_mask (or labels) what is given and by attention_mask what is padding, "
            "and leave it out"
        )


@lru_cache
def _warn_of_key(name: str) -> None:
    rank_zero_warn(f"{name}: this key of the batches is not used; {', '.join(UNDERSTOOD)} are")


def real_first(attention_mask: Tensor) -> Tensor:
    """Return for each row an order of its positions that puts padding last and keeps the others' order, (B, L)."""
    return (~attention_mask).long().argsort(dim=1, stable=True)


def padding_last(batch: Batch) -> Batch:
    """Move the padding of a checked batch to the ends of its rows, and cut off the columns that hold nothing else.

    Positions are then counted, blocks cut and logits shifted as if there were no padding.

    Args:
        batch: From ``check_batch``.

    Returns:
        The same, (B, L') with L' the longest sequence; without an ``attention_mask`` if no padding is left.
    """
    if "attention_mask" not in batch:
        return batch
    order = real_first(batch["attention_mask"])
    longest = int(batch["attention_mask"].sum(1).max())
    moved = {name: column.gather(1, order)[:, :longest] for name, column in batch.items()}
    if moved["attention_mask"].all():
        del moved["attention_mask"]
    return moved


def padded_to_multiple(batch: Batch, multiple: int, mask_id: int) -> Batch:
    """Pad a checked batch at its end until its length is a multiple, such as of a block size."""
    more = -batch["input_ids"].shape[1] % multiple
    if not more:
        return batch
    real = batch.get("attention_mask", batch["prompt_mask"] | True)
    columns = {**batch, "attention_mask": real}
    filling = {"input_ids": padding_token(mask_id), "prompt_mask": True, "attention_mask": False}
    return {name: F.pad(column, (0, more), value=filling[name]) for name, column in columns.items()}


def join_batches(batches: Sequence[Batch], mask_id: int) -> Batch:
    """Put checked batches together, whose padding is last; all are padded to the longest."""
    length = max(batch["input_ids"].shape[1] for batch in batches)
    if any("attention_mask" in batch or batch["input_ids"].shape[1] < length for batch in batches):
        batches = [{"attention_mask": batch["prompt_mask"] | True, **batch} for batch in batches]
        batches = [padded_to_multiple(batch, length, mask_id) for batch in batches]
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def pad_collate(examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Collate sequences of different lengths: a ``collate_fn`` for any ``DataLoader``.

    Every sequence is padded at its end to the longest of the batch, and an ``attention_mask`` says where.

    Args:
        examples: Dictionaries with ``input_ids``, a tensor, array or list of integers, (L,). Other values that have
            one entry for each position are padded too; all others are collated as PyTorch does.

    Returns:
        The batch, tensors (B, longest L).

    Example:
        >>> pad_collate([{"input_ids": [5, 3]}, {"input_ids": [8]}])["attention_mask"]
        tensor([[ True,  True],
                [ True, False]])
    """
    padding = {"prompt_mask": True, "labels": NOT_LEARNED, "loss_mask": 0}
    real = [torch.ones(len(example["input_ids"]), dtype=torch.bool) for example in examples]
    batch: dict[str, Any] = {}
    for name in examples[0]:
        values = [example[name] for example in examples]
        if all(_is_per_position(value, len(each)) for value, each in zip(values, real, strict=True)):
            batch[name] = _padded([torch.as_tensor(value) for value in values], padding.get(name, 0))
        else:
            batch[name] = default_collate(values)
    if "attention_mask" not in batch and len({len(each) for each in real}) > 1:
        batch["attention_mask"] = _padded(real, False)
    return batch


def _is_per_position(value: Any, length: int) -> bool:
    return hasattr(value, "__len__") and not isinstance(value, str | bytes | Mapping) and len(value) == length


def _padded(rows: list[Tensor], value: float) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


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

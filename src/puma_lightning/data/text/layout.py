"""From token ids to fixed-length sequences: where EOS goes, what is cut off, what is given."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Padding = Literal["eos", "first_eos", "none"]
Example = tuple[list[int], int] | None


@dataclass
class Sequences:
    """n fixed-length sequences.

    Attributes:
        tokens: (n, L).
        prompt: Number of given positions at the start (n,).
        end: Where the answer ends (n,); L if nowhere. What follows is given, or padding.
        kept: The number of the example that each sequence is of (n,).
        counts: How many examples were skipped or cut, by reason.
    """

    tokens: NDArray[np.int64]
    prompt: NDArray[np.int64]
    end: NDArray[np.int64]
    kept: NDArray[np.int64]
    counts: Counter[str] = field(default_factory=Counter)


def lay_out(
    examples: Sequence[Example], length: int, eos_id: int, padding: Padding, min_answer_length: int = 1
) -> Sequences:
    """Lay out one example in each sequence: its ids, EOS, and EOS up to the end.

    An example of L ids or more keeps the first L - 1, and EOS follows them. An example without a prompt gets a given
    EOS at its start, so that a causal model has something to predict from.

    Args:
        examples: Token ids and how many of them are the prompt; None or no ids for a row to skip.
        length: L.
        eos_id: EOS.
        padding: ``eos``: all positions after the example are part of the answer. ``first_eos``: the first EOS is, the
            others are given. ``none``: no EOS is; all of them are padding.
        min_answer_length: Skip an example with fewer answer positions: its prompt leaves no more or, unless padding
            is ``eos``, its answer has no more.
    """
    counts: Counter[str] = Counter()
    filled = [bool(example and example[0]) for example in examples]
    kept = np.flatnonzero(filled)
    counts["empty"] = len(examples) - len(kept)
    whole = [_with_start(examples[i], eos_id) for i in kept.tolist()]
    prompt = np.array([prompt for _, prompt in whole], np.int64)
    size = np.array([len(ids) for ids, _ in whole], np.int64)
    inside = np.minimum(size, length - 1)
    end = {"eos": np.full_like(size, length), "first_eos": inside + 1, "none": inside}[padding]
    # At least one token of the answer must be left: EOS alone would be learned as the answer.
    cut_off = (inside <= prompt) & (size > prompt)
    enough = (end - prompt >= min_answer_length) & ~cut_off
    # The longest answer would not do either; otherwise it is this one that is short.
    no_room = cut_off | ((length - 1 if padding == "none" else length) - prompt < min_answer_length)
    counts["without room for an answer"] = int(no_room.sum())
    counts["short answer"] = int((~enough & ~no_room).sum())
    counts["cut"] = int((size[enough] > length - 1).sum())
    tokens = np.full((int(enough.sum()), length), eos_id, np.int64)
    ids = [whole[i][0][: length - 1] for i in np.flatnonzero(enough)]
    tokens[np.arange(length) < inside[enough, None]] = flatten(ids)
    return Sequences(tokens, prompt[enough], end[enough], kept[enough], counts)


def batch_of(tokens: NDArray[Any], prompt: Any, end: Any, hidden: bool) -> dict[str, Tensor]:
    """Return sequences as tensors of a batch, or one sequence as an item of it.

    Args:
        tokens: Token ids (..., L), int64.
        prompt: See ``Sequences``, (...).
        end: See ``Sequences``, (...).
        hidden: Whether what follows the answer is padding, of which an ``attention_mask`` tells, rather than given.
    """
    position = np.arange(tokens.shape[-1])
    inside = position < end[..., None]
    outside = (position < prompt[..., None]) | ~inside
    batch = {"input_ids": tokens, "prompt_mask": outside, **({"attention_mask": inside} if hidden else {})}
    return {name: torch.from_numpy(values) for name, values in batch.items()}


def lay_out_prompts(
    prompts: Sequence[list[int] | None], length: int, mask_id: int, min_answer_length: int = 1
) -> Sequences:
    """Lay out prompts whose answers are not known: everything after them is masked.

    Args:
        prompts: Token ids; None or no ids for a row to skip.
        length: L.
        mask_id: The mask token.
        min_answer_length: Skip a prompt that leaves fewer answer positions.
    """
    size = np.array([len(ids or ()) for ids in prompts], np.int64)
    fits = size <= length - min_answer_length
    kept = np.flatnonzero(fits & (size > 0))
    tokens = np.full((len(kept), length), mask_id, np.int64)
    tokens[np.arange(length) < size[kept, None]] = flatten([prompts[i] or [] for i in kept.tolist()])
    counts = Counter({"empty": int((size == 0).sum()), "without room for an answer": int((~fits).sum())})
    return Sequences(tokens, size[kept], np.full(len(kept), length), kept, counts)


class Packer:
    """A stream of documents, cut into sequences that each start with an EOS that is given.

    Args:
        length: L.
        eos_id: EOS.
    """

    def __init__(self, length: int, eos_id: int) -> None:
        self.length = length
        self.eos_id = eos_id
        self.rest = np.empty(0, np.int64)

    def __call__(self, stream: NDArray[np.int64], counts: Counter[str]) -> Sequences:
        """Return the sequences that the next part of the stream (T,) completes; the rest waits for more."""
        stream = np.concatenate([self.rest, stream])
        n = len(stream) // (self.length - 1)
        self.rest = stream[n * (self.length - 1) :]
        tokens = np.full((n, self.length), self.eos_id, np.int64)
        tokens[:, 1:] = stream[: n * (self.length - 1)].reshape(n, self.length - 1)
        return Sequences(tokens, np.ones(n, np.int64), np.full(n, self.length), np.arange(n), counts)


def documents(examples: Sequence[Example], eos_id: int) -> tuple[NDArray[np.int64], Counter[str]]:
    """Return the ids of all examples, one after another with EOS after each (T,), and the number of empty ones."""
    filled = [example for example in examples if example and example[0]]
    counts = Counter({"empty": len(examples) - len(filled)})
    if any(prompt for _, prompt in filled):
        raise ValueError(
            "packing: expected examples without prompts, got one with a prompt from encode; set packing to false"
        )
    return flatten([part for ids, _ in filled for part in (ids, (eos_id,))]), counts


def check_examples(examples: Sequence[Example], rows: int, vocab_size: int, mask_id: int) -> None:
    """Check what ``encode`` returned.

    Args:
        examples: Token ids and how many of them are the prompt, or None.
        rows: For how many rows.
        vocab_size: V.
        mask_id: The mask token.

    Raises:
        ValueError: If there is not one example for each row, or one has impossible ids or an impossible prompt.
    """
    if len(examples) != rows:
        raise ValueError(
            f"encode: expected one example for each of {rows} rows, got {len(examples)}; return None for a row to skip"
        )
    filled = [example for example in examples if example]
    found = flatten([ids for ids, _ in filled])
    if len(found) and not 0 <= found.min() <= found.max() < vocab_size:
        raise ValueError(
            f"encode: expected token ids in 0..{vocab_size - 1}, got {found.min()}..{found.max()}; "
            "use the function that encode is given"
        )
    if (found == mask_id).any():
        raise ValueError(f"encode: expected no mask token {mask_id} in an example, got one; name another mask_token")
    for ids, prompt in filled:
        if not 0 <= prompt <= len(ids):
            raise ValueError(
                f"encode: expected a prompt of 0..{len(ids)} of an example's tokens, got {prompt}; "
                "return how many of them are the prompt"
            )


def flatten(ids: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """Return all token ids in one array (T,)."""
    return np.fromiter(chain.from_iterable(ids), np.int64, sum(map(len, ids)))


def _with_start(example: Any, eos_id: int) -> tuple[list[int], int]:
    ids, prompt = example
    return (ids, prompt) if prompt else ([eos_id, *ids], 1)

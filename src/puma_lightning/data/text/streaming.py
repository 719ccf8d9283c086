"""Text that is read and tokenised while the model trains on it, for data that do not fit on a disk or have no end."""

from __future__ import annotations

import copy
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from puma_lightning.data.text.layout import Example, Packer, Sequences, batch_of, check_examples, documents, lay_out
from puma_lightning.data.text.rows import Rows
from puma_lightning.data.text.tokenise import Format

if TYPE_CHECKING:
    import datasets


class TextStream(IterableDataset[dict[str, Any]]):
    """Sequences of L tokens from rows that come one after the other.

    Rows are read a buffer at a time; the sequences made of them are shuffled, given out, and forgotten. So the place of
    a stream is that of the rows before the buffer and how many of its sequences were given out: to go on, one buffer
    is read and tokenised again, and all that follows is the same. Ranks and workers share the shards of the rows.

    Args:
        rows: The rows, as ``datasets`` streams them.
        argument: Name of the argument that gave them, for messages.
        encode: Turns rows into examples.
        form: What the sequences look like.
        buffer: Rows in a buffer. With 1 the order is that of the rows, in every pass; otherwise buffers are shuffled
            anew in each, and so is the order of the shards, except by old versions of ``datasets`` (3.0).
        seed: Of the order.
        num_sequences: How many sequences count as an epoch; None for no number.
        without: Digests of rows that are left out, as ``digest`` makes them.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        argument: str,
        encode: Callable[[Rows], Sequence[Example]],
        form: Format,
        buffer: int,
        seed: int = 0,
        num_sequences: int | None = None,
        without: frozenset[bytes] = frozenset(),
    ) -> None:
        self.rows = rows
        self.argument = argument
        self.encode = encode
        self.form = form
        self.buffer = buffer
        self.seed = seed
        self.num_sequences = num_sequences
        self.without = without
        self._part = 0
        self._epoch = 0
        self._begin: dict[str, Any] | None = None
        self._place: dict[str, Any] = {"rows": None, "rest": [], "buffer": 0, "given": 0}

    def __len__(self) -> int:
        if self.num_sequences is None:
            raise TypeError("the stream has no length")
        return self.num_sequences

    @property
    def num_shards(self) -> int:
        """How many files or the like the rows come from."""
        shards: int | None = getattr(self.rows, "num_shards", None)
        return self.rows.n_shards if shards is None else shards

    def split_by_rank(self, rank: int, ranks: int) -> TextStream:
        """Return one of several disjoint parts."""
        from datasets.distributed import split_dataset_by_node

        part = copy.copy(self)
        part.rows, part._part = split_dataset_by_node(self.rows, rank, ranks), rank
        return part

    def set_epoch(self, epoch: int) -> None:
        """Say which pass comes next."""
        self._epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """Return the place after the sequence given out last, in plain types."""
        return dict(self._place)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin the next pass at a place in it."""
        self._begin = state

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield sequences, tensors (L,), up to the end of the pass."""
        from datasets.distributed import split_dataset_by_node

        info = get_worker_info()
        if info is not None:
            # The threads of the tokenizer do not survive a fork, and there is a process for each core already.
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        place, self._begin = self._begin or {"rows": None, "rest": [], "buffer": 0, "given": 0}, None
        rows = split_dataset_by_node(self.rows, 0, 1)  # one of its own, as it keeps the state that it begins with
        if self.buffer > 1:
            rows.set_epoch(1 + self.seed + self._epoch)
        if place["rows"] is not None:
            rows.load_state_dict(place["rows"])
        packer = Packer(self.form.length, self.form.eos_id)
        packer.rest = np.array(place["rest"], np.int64)
        source = iter(rows)
        while some := self._read(source):
            laid = self._lay_out(some, packer)
            order = np.arange(len(laid.tokens))
            if self.buffer > 1:
                keys = [self.seed, self._epoch, self._part, 0 if info is None else info.id, place["buffer"]]
                order = np.random.default_rng(keys).permutation(order)
            for given in range(place["given"], len(order)):
                row = order[given]
                self._place = {**place, "given": given + 1}
                yield batch_of(laid.tokens[row], laid.prompt[row], laid.end[row], self.form.hides_padding)
            place = {"rows": rows.state_dict(), "rest": packer.rest.tolist(), "buffer": place["buffer"] + 1, "given": 0}

    def _read(self, source: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
        try:
            return list(islice(source, self.buffer))
        except Exception as error:  # whatever the readers of the formats raise
            reason = str(error.__cause__ or error) or type(error).__name__
            raise ValueError(f"{self.argument}: expected rows, got: {reason}; correct the data") from error

    def _lay_out(self, rows: list[dict[str, Any]], packer: Packer) -> Sequences:
        kept = [row for row in rows if not self.without or digest(row) not in self.without]
        columns = {
            name: [row.get(name) for row in kept] for name in dict.fromkeys(name for row in kept for name in row)
        }
        examples = self.encode(Rows(columns, self.argument, list(range(len(kept))))) if kept else []
        check_examples(examples, len(kept), self.form.vocab_size, self.form.mask_id)
        if self.form.packing:
            return packer(documents(examples, self.form.eos_id)[0], Counter())
        return lay_out(examples, self.form.length, self.form.eos_id, self.form.padding, self.form.min_answer_length)


def digest(row: dict[str, Any]) -> bytes:
    """Return what tells the contents of a row from any others."""
    return hashlib.blake2b(repr(sorted(row.items())).encode("utf-8", "surrogatepass"), digest_size=16).digest()

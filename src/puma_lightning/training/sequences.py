"""The endless supply of clean sequences for a stream, and its place in the data."""

import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    default_collate,
)

from puma_lightning.data.batch import Batch, check_batch, join_batches, padding_last
from puma_lightning.errors import last_words, sentence_of
from puma_lightning.training.dealing import Era, Passes, left_in_queue
from puma_lightning.training.iterable import (
    Place,
    can_be_split,
    first_place,
    is_split,
    number_of_shards,
    part_of,
    read,
)
from puma_lightning.training.stopping import LoaderWorker, loader_context


def derived_seed(*keys: int) -> int:
    """Derive a 63-bit seed from non-negative integers, well mixed: neighbouring keys give unrelated seeds."""
    # Numbered words of one width: SeedSequence pads with zeros, and splits large integers.
    words = [word for key in keys for word in (key & 0xFFFFFFFF, key >> 32)]
    return int(np.random.SeedSequence([len(keys), *words]).generate_state(1, np.uint64)[0] >> 1)


def seed_device(seed: int, device: torch.device) -> None:
    """Seed the global generators of the CPU and of a device.

    ``torch.manual_seed`` seeds all kinds of devices; of those that are not there it keeps the whole stack of calls.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


class CleanSequences:
    """An endless, rank-sharded supply of checked clean sequences that knows its position.

    Takes over the data set, workers and collate function of a user's ``DataLoader``, and reads it pass after
    pass. A pass holds every sequence exactly once over all ranks.

    - A data set with an index is read in an order fixed by (seed, pass), so a single number says where in the data a
      rank is. Randomness inside it must depend on the index only.
    - Of an iterable data set of ``datasets``, or one with ``split_by_rank(rank, ranks)``, every rank reads a part. Any
      other must yield the same on every rank, which keeps its share. With ``state_dict`` and ``load_state_dict`` a
      resumed run goes to its place at once; without, what was taken is read again. Before each pass ``set_epoch(pass)``
      is called, if there is one, so that passes may differ.

    Args:
        loader: The user's loader. A shuffling one is shuffled again in each pass; any other sampler, also that of a
            batch sampler, is iterated again in each pass, under a seed of its own.
        mask_id: The mask token.
        vocab_size: V.
        rank: This process.
        world_size: Number of processes.
        seed: The same on all ranks.
        first_given: Whether position 0 must be given in every sequence.
        fixed_share: Whether a rank has the same sequences in every pass, so that they have numbers: of R ranks, rank r
            has the sequences r, r + R, r + 2R, and so on, each pass in an order of its own if the loader shuffles.
        first_batches: Of the data only the first so many batches (an integer), or this share of them (a float), for
            each rank, in their order whatever the sampler is; 0 for all of them. Of an iterable data set they are read
            once and kept.

    Attributes:
        num_sequences: Sequences in a pass over all ranks; None for an iterable data set that does not say.

    Raises:
        ValueError: If the loader has no batch size or no sampler, the data set is empty, or ``first_batches`` is none.
    """

    def __init__(
        self,
        loader: "DataLoader[Any]",
        mask_id: int,
        vocab_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        first_given: bool = False,
        first_batches: int | float = 0,
        fixed_share: bool = False,
    ) -> None:
        self.loader = loader
        self.rank = rank
        self.world_size = world_size
        self._limits: dict[str, Any] = {
            "mask_id": mask_id,
            "vocab_size": vocab_size,
            "first_given": first_given,
        }
        self._one_length: int | None = None  # of all sequences so far
        self.lengths_vary = False  # whether sequences of different lengths have been seen
        batch_size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
        if not batch_size:
            raise ValueError(
                "train_dataloader: expected a DataLoader with a batch_size, got batch_size=None; give it the number of "
                "sequences in a batch"
            )
        self.batch_size = int(batch_size)
        self._iterable = isinstance(loader.dataset, IterableDataset)
        self._sampler: Any = loader.sampler
        if loader.batch_size is None and not self._iterable:
            # Under a batch sampler, loader.sampler is a default that PyTorch never reads.
            if type(loader.batch_sampler) is not BatchSampler:
                raise ValueError(
                    "train_dataloader: expected a DataLoader with a batch_size, got one with "
                    f"{type(loader.batch_sampler).__name__}; sequences enter the batch one by one, so give it a "
                    "sampler and a batch_size instead"
                )
            self._sampler = loader.batch_sampler.sampler
        self.num_sequences: int | None
        try:
            self.num_sequences = len(loader.dataset if self._iterable else self._sampler)  # type: ignore[arg-type]
        except TypeError:
            self.num_sequences = None
        if self.num_sequences == 0:
            raise ValueError("train_dataloader: expected training sequences, got an empty data set; bring some")
        # What somebody else has dealt out already: a DistributedSampler of the user's own, or a part of one rank.
        self._dealt_out = getattr(self._sampler, "num_replicas", 1) == world_size > 1
        if self._dealt_out and self.num_sequences is not None:
            self.num_sequences *= world_size
        self._workers = loader.num_workers
        if loader.timeout and not loader.num_workers:
            raise ValueError(
                f"train_dataloader: expected no timeout without workers, got timeout={loader.timeout} and "
                "num_workers=0; leave it out, or set num_workers"
            )
        self._parts = 1
        if self._iterable:
            self._dealt_out = is_split(loader.dataset)
            self._parts = world_size if can_be_split(loader.dataset) else 1
            self._share_shards()
        self._keeps_first = False
        if first_batches:
            self._keep_first(first_batches)
        self._fixed_share = fixed_share
        if fixed_share:
            self._fix_share()
        self.seek(seed, 0)

    def _fix_share(self) -> None:
        """Read the same sequences in every pass."""
        sampler = self._sampler
        shuffles = _shuffles_all(sampler)
        if self._iterable or self._dealt_out or not (shuffles or type(sampler) is SequentialSampler):
            got = self.loader.dataset if self._iterable else sampler
            raise ValueError(
                "train_dataloader: expected a data set with an index, and a loader that shuffles it or reads it in "
                f"order, as every sequence has a row in a pool of all, got {type(got).__name__}; leave that out, or "
                "choose a pool of some"
            )
        self._sampler, self._dealt_out = _Share(len(sampler), self.rank, self.world_size, shuffles), True

    @property
    def share(self) -> int:
        """How many sequences the fixed share of this rank has."""
        assert self._fixed_share
        return len(self._sampler)

    def _keep_first(self, batches: int | float) -> None:
        """Leave nothing of the data but its first batches."""
        in_all = None if self.num_sequences is None else self.num_sequences // (self.batch_size * self.world_size)
        if in_all == 0:
            return  # too few for a batch, which is refused with their number
        if isinstance(batches, float):
            if in_all is None:
                raise ValueError(
                    "overfit_batches: expected a number of batches, as the training data have no length, got "
                    f"{batches}; give an integer"
                )
            if int(in_all * batches) == 0:
                raise ValueError(
                    f"overfit_batches: expected at least one batch, got {batches} of {in_all}; give a larger share, "
                    "or an integer, the number of batches"
                )
            batches = int(in_all * batches)
        batches = batches if in_all is None else min(batches, in_all)
        self.num_sequences = batches * self.batch_size * self.world_size
        if self._iterable:
            self._keeps_first = True
        else:
            self._sampler, self._dealt_out = SequentialSampler(range(self.num_sequences)), False

    def _share_shards(self) -> None:
        """Say where a data set has too few shards to be shared well, and start no worker that would have none."""
        shards = number_of_shards(self.loader.dataset)
        if shards is None or (self._parts == 1 and self.world_size > 1 and not self._dealt_out):
            return
        if shards % self._parts:
            rank_zero_warn(
                f"train_dataloader: {shards} shard(s) cannot be shared evenly by {self._parts} processes, so each "
                f"reads all of them and keeps one row in {self._parts}; a multiple of {self._parts} shards is read once"
            )
        mine = number_of_shards(part_of(self.loader.dataset, self.rank if self._parts > 1 else 0, self._parts))
        if mine is not None and mine < self._workers:
            rank_zero_warn(
                f"train_dataloader: {mine} shard(s) for each of {self.world_size} process(es) are too few for "
                f"{self._workers} workers; starting {mine}"
            )
            self._workers = max(1, mine)

    def seek(
        self,
        seed: int,
        position: int,
        eras: Sequence[Era] = (),
        place: Place | None = None,
        waiting: Batch | None = None,
        rest: Batch | None = None,
    ) -> None:
        """Go to a position.

        Args:
            seed: The same on all ranks.
            position: The number of sequences that this rank has taken since the start, or since the newest era.
            eras: What was taken while there were other numbers of ranks, oldest first.
            place: Where to read an iterable data set from.
            waiting: Sequences that come before all others, and do not count.
            rest: Sequences that were read before the place and not taken.
        """
        self.seed = seed
        self.position = position
        self.eras = [list(era) for era in eras]
        self._waiting, self._rest = waiting, rest
        self._ahead: deque[tuple[Batch, int]] = deque()  # taken ahead: sequences, and how many of them do not count
        self._place = place
        self._batches = self._read()
        if self._fixed_share:
            self._upcoming = iter(_EndlessOrder(self._sampler, self.seed, 0, 1, self.position))

    def close(self) -> None:
        """Let the loader's worker processes end; the position stays."""
        self._batches = iter(())

    @property
    def num_taken(self) -> float:
        """How many sequences were taken since the start of the run; to be added up over the ranks."""
        return self.position + sum(map(sum, self.eras)) / self.world_size

    @property
    def lengths_may_vary(self) -> bool:
        """Whether sequences of different lengths may come: unless examples are stacked as they come, in any order."""
        stacks = self.loader.collate_fn is default_collate and self.batch_size > 1
        in_any_order = type(self._sampler) in (RandomSampler, SequentialSampler, _Share) and not self._iterable
        one = (stacks and in_any_order) or getattr(self.loader.dataset, "one_length", False)
        return self.lengths_vary or not one

    @property
    def length(self) -> int:
        """L, of the sequences that come next."""
        if self._waiting is not None:
            return self._waiting["input_ids"].shape[1]
        if self._rest is None:
            self._rest = self._next_batch()
        return self._rest["input_ids"].shape[1]

    def take(self, number: int) -> Batch:
        """Take the next ``number`` sequences.

        Returns:
            ``{"input_ids": (number, L) int64, "prompt_mask": (number, L) bool}`` on the CPU, with L the longest of
            them; and ``"attention_mask"`` (number, L) bool if any is shorter, padded at its end.

        Raises:
            ValueError: If the data are not clean sequences.
        """
        waiting = min(number, _size(self._waiting))
        parts = [part for part in (self._waiting, self._rest) if part is not None]
        while not parts or sum(len(part["input_ids"]) for part in parts) < number:
            parts.append(self._next_batch())
        if self._waiting is not None and number < _size(self._waiting):
            taken, self._waiting = _cut(self._waiting, number)
            return padding_last(taken)
        joined = join_batches(parts, self._limits["mask_id"])
        # The rest is kept even when empty: it remembers the sequence length.
        self._waiting = None
        taken, self._rest = _cut(joined, number)
        self.position += number - waiting
        # How long the longest is must not depend on what else was loaded, which is other in a resumed run.
        return padding_last(taken)

    def take_with_rows(self, number: int) -> tuple[Batch, Tensor]:
        """Take the next sequences as ``take`` does.

        Returns:
            The batch, and which sequences of a fixed share they are, (number,) int64.
        """
        return self.take(number), torch.tensor(list(islice(self._upcoming, number))) // self.world_size

    def take_ahead(self, number: int) -> Batch:
        """Return the next sequences as ``take`` does; they count as taken only when ``settle`` says so."""
        uncounted, before = min(number, _size(self._waiting)), self.position
        batch = self.take(number)
        self.position = before
        self._ahead.append((batch, uncounted))
        return batch

    def settle(self, number: int) -> None:
        """Count the first sequences of those that were taken ahead as taken."""
        while number:
            batch, uncounted = self._ahead.popleft()
            size = min(number, _size(batch))
            self.position += max(0, size - uncounted)
            if size < _size(batch):
                self._ahead.appendleft((_cut(batch, size)[1], max(0, uncounted - size)))
            number -= size

    def give_back(self) -> None:
        """Have the sequences that were taken ahead, and did not count so far, come next."""
        self._waiting, self._rest = self._unsettled()
        self._ahead.clear()

    def _unsettled(self) -> tuple[Batch | None, Batch | None]:
        """Return all sequences that were read and not taken: those that do not count, and those that do."""
        first = [_cut(batch, uncounted)[0] for batch, uncounted in self._ahead]
        then = [_cut(batch, uncounted)[1] for batch, uncounted in self._ahead]
        # An empty rest is kept: it remembers the sequence length.
        return self._join([*first, self._waiting]), self._join([*then, self._rest]) or self._rest

    def supply(self) -> dict[str, Any]:
        """Return what a checkpoint must hold besides ``position``, as plain types and tensors."""
        waiting, rest = self._unsettled()
        # Of a data set with an index, and of rows that are kept, the position says all.
        rest = rest if self._iterable and not self._keeps_first else None
        # Copies: a part of a tensor would be saved with the whole.
        copies = [batch and {name: rows.clone() for name, rows in batch.items()} for batch in (waiting, rest)]
        return {"eras": self.eras, "place": self._place, "waiting": copies[0], "rest": copies[1]}

    def restore(self, seed: int, position: int, supply: dict[str, Any] | None) -> None:
        """Go to where this rank was when a checkpoint was saved by as many ranks.

        Args:
            seed: The seed of that run.
            position: Its ``position``.
            supply: What ``supply()`` returned; None in checkpoints of version 0.2.0 and before.

        Raises:
            ValueError: If the number of workers is another, and the data set is read in another order then.
        """
        self._check_workers(supply and supply["place"])
        self.seek(seed, position, **(supply or {}))

    def deal(self, seed: int, positions: Sequence[int], supplies: Sequence[dict[str, Any] | None]) -> None:
        """Go on from a checkpoint that was saved by another number of ranks: what is left is dealt to those there are.

        Args:
            seed: The seed of that run.
            positions: ``position`` of each rank.
            supplies: What ``supply()`` of each rank returned.

        Raises:
            ValueError: If that is not possible.
        """
        if self._keeps_first:
            raise self._refusal(len(positions), "with overfit_batches each keeps sequences of its own")
        given = [supply or {"eras": [], "place": None, "waiting": None, "rest": None} for supply in supplies]
        unread = [supply["rest"] for supply in given]
        # All that was read counts as taken, and what is not in a slot waits.
        read_so_far = [position + _size(rest) for position, rest in zip(positions, unread, strict=True)]
        waiting = self._join([*(supply["waiting"] for supply in given), *unread])
        mine = waiting and {name: rows[self.rank :: self.world_size] for name, rows in waiting.items()}
        self.seek(
            seed,
            0,
            [*given[0]["eras"], read_so_far],
            self._dealt_place([supply["place"] for supply in given]) if self._iterable else None,
            mine if _size(mine) else None,
        )

    def put_before(self, sequences: Batch) -> None:
        """Have sequences come before all others that are not waiting already."""
        self._waiting = self._join([sequences, self._waiting])

    def _join(self, batches: Sequence[Batch | None]) -> Batch | None:
        some = [batch for batch in batches if batch is not None and _size(batch)]
        return join_batches(some, self._limits["mask_id"]) if some else None

    def _dealt_place(self, places: Sequence[Place | None]) -> Place | None:
        """Return where to read an iterable data set from, when the ranks before were at some places."""
        if self._dealt_out:
            raise self._refusal(len(places), "its data set is split by rank already; leave that to the supply")
        split = len(places) if can_be_split(self.loader.dataset) else 1
        known = [place or first_place(rank % split, split, self._slices) for rank, place in enumerate(places)]
        for place in known:
            self._check_workers(place)
        if known[0]["of"] == 1:
            # Each rank reads everything, from where the slowest was.
            return min(known, key=lambda place: int(place["read"] + place["over"]))
        if any(place["over"] for place in known):
            reason = "its data set does not tell its place (it has no state_dict, or a shuffle buffer of datasets)"
            raise self._refusal(len(places), reason)
        parts = sorted((part for place in known for part in place["parts"]), key=lambda part: int(part["part"]))
        if len(parts) < self.world_size:
            raise self._refusal(len(places), f"its data set was split in {len(parts)} parts, one for each process")
        return {**known[0], "parts": parts[self.rank :: self.world_size], "turn": 0}

    def _refusal(self, saved: int, reason: str) -> ValueError:
        return ValueError(
            f"devices: expected {saved} process(es), as many as saved the checkpoint, got {self.world_size}: {reason}; "
            f"resume with {saved}, or start a new run from its weights with init_from"
        )

    @property
    def _slices(self) -> int:
        """How many workers share an iterable data set."""
        return max(1, self._workers)

    def _check_workers(self, place: Place | None) -> None:
        if place is not None and (saved := len(place["parts"][0]["workers"])) != self._slices:
            raise ValueError(
                f"num_workers: expected {saved}, as in the checkpoint, got {self._workers}; an iterable data set is "
                f"shared by its workers, so resume with {saved}"
            )

    def _next_batch(self) -> Batch:
        try:
            batch, self._place = next(self._batches)
        except RuntimeError as error:
            # What torch.stack says of different lengths, and what it says of them in a worker.
            if not re.search("equal size|resize storage", str(error)):
                raise
            raise ValueError(
                "input_ids: expected sequences of one length, or a collate function that pads them, got: "
                f"{last_words(error)}; give the DataLoader collate_fn=puma_lightning.pad_collate"
            ) from error
        except ValueError as error:
            ahead = sum(_size(batch) - uncounted for batch, uncounted in self._ahead)
            first = self.position + ahead + _size(self._rest)
            where = f"batch after {first} training sequences of process {self.rank}"
            sentence = sentence_of(error)
            if sentence is None:  # of the data set: what it says, and where in it, stay as they are
                error.add_note(where)
                raise
            raise ValueError(f"{sentence} ({where})") from error
        self._one_length = self._one_length or batch["input_ids"].shape[1]
        self.lengths_vary |= "attention_mask" in batch or batch["input_ids"].shape[1] != self._one_length
        return batch

    def _read(self) -> Iterator[tuple[Batch, Place | None]]:
        """Yield checked batches of this rank's sequences from here on, without end, and the place after each."""
        # The iterator must not refer back to self: as part of a cycle its workers would be stopped by the garbage
        # collector, which takes seconds for each of them.
        check: Callable[[Any], Batch] = partial(_checked, **self._limits)
        old = self.loader
        options: dict[str, Any] = {
            "num_workers": self._workers,
            "timeout": old.timeout,
            "worker_init_fn": LoaderWorker(old.worker_init_fn),
            "multiprocessing_context": loader_context(old.multiprocessing_context) if self._workers else None,
            "prefetch_factor": old.prefetch_factor,
        }
        # A generator of its own: iterating must not draw from the global one. The same on all ranks: each may read the
        # whole of an iterable data set.
        seed = derived_seed(self.seed)
        if not self._iterable:
            shard, shards = (0, 1) if self._dealt_out else (self.rank, self.world_size)
            order = _EndlessOrder(self._sampler, self.seed, shard, shards, self.position, self.eras)
            loader: DataLoader[Any] = DataLoader(
                old.dataset,
                sampler=order,
                batch_size=self.batch_size,
                collate_fn=old.collate_fn,
                generator=torch.Generator().manual_seed(seed),
                **options,
            )
            in_a_pass = -(-len(self._sampler) // (shards * self.batch_size))
            checked: Iterator[tuple[Batch, None]] = ((check(batch), None) for batch in loader)
            if self._fixed_share:
                checked = _whole(checked, self.batch_size)
            return _with_rows(checked, in_a_pass, type(old.dataset).__name__)
        place, taken = self._place, self.position + _size(self._rest)
        if self._keeps_first:
            taken = 0
        if place is None:
            # All that older checkpoints say. What is kept is read from the start.
            over = 0 if self._keeps_first else self.position * self.world_size
            place = first_place(self.rank if self._parts > 1 else 0, self._parts, self._slices, over)
        batches = read(old.dataset, place, self.batch_size, old.collate_fn, check, seed, options)
        mine: Iterator[tuple[Batch, Place]]
        if self._dealt_out or place["of"] > 1 or (self.world_size == 1 and not self.eras):
            mine = ((batch, after) for batch, _, after in batches)
        else:
            mine = _share_of(batches, self.eras, taken, self.rank, self.world_size)
        if not self._keeps_first:
            return mine
        assert self.num_sequences is not None
        return _first_of(mine, self.num_sequences // self.world_size, self.position, self._limits["mask_id"])


def _checked(batch: Any, **limits: Any) -> Batch:
    return padding_last(check_batch(batch, **limits))


def _with_rows(batches: Iterator[tuple[Batch, None]], in_a_pass: int, name: str) -> Iterator[tuple[Batch, None]]:
    """Go on for ever, unless a whole pass has no sequence in it."""
    empty = 0
    for batch, place in batches:
        empty = 0 if _size(batch) else empty + 1
        if empty > in_a_pass:
            raise ValueError(
                f"train_dataloader: expected sequences, got none from a whole pass over {name} ({in_a_pass} batches); "
                "check its collate_fn, which returns empty batches"
            )
        yield batch, place
    raise ValueError(
        f"train_dataloader: expected an example for every index, got StopIteration from {name}; have its __getitem__ "
        "return one, or raise IndexError"
    )


def _whole(batches: Iterator[tuple[Batch, None]], batch_size: int) -> Iterator[tuple[Batch, None]]:
    """Refuse a batch that has not one sequence for each example."""
    for batch, place in batches:
        if _size(batch) != batch_size:
            raise ValueError(
                f"train_dataloader: expected a collate_fn that returns a sequence for each of {batch_size} examples, "
                f"as every example has a row in a pool of all, got {_size(batch)}; leave examples out beforehand, or "
                "choose a pool of some"
            )
        yield batch, place


def _share_of(
    batches: Iterator[tuple[Batch, int, Place]], eras: Sequence[Era], taken: int, rank: int, ranks: int
) -> Iterator[tuple[Batch, Place]]:
    """Keep of what every rank reads the share of one that it has not taken."""
    for batch, first, after in batches:
        index = torch.arange(len(batch["input_ids"]))
        place = first + index
        for era in eras:
            left, place = left_in_queue(place, era)
            index, place = index[left], place[left]
        index = index[(place % ranks == rank) & (place // ranks >= taken)]
        if len(index):
            yield {name: tensor[index] for name, tensor in batch.items()}, after


def _first_of(
    batches: Iterator[tuple[Batch, Place]], number: int, position: int, mask_id: int
) -> Iterator[tuple[Batch, None]]:
    """Yield the first so many sequences again and again, from a position on."""
    parts: list[Batch] = []
    while (missing := number - sum(map(_size, parts))) > 0:
        parts.append(_cut(next(batches)[0], missing)[0])
    del batches  # its workers may end
    kept, skip = join_batches(parts, mask_id), position % number
    while True:
        yield _cut(kept, skip)[1], None
        skip = 0


def _size(batch: Batch | None) -> int:
    return 0 if batch is None else len(batch["input_ids"])


def _cut(batch: Batch, number: int) -> tuple[Batch, Batch]:
    return (
        {name: tensor[:number] for name, tensor in batch.items()},
        {name: tensor[number:] for name, tensor in batch.items()},
    )


def _shuffles_all(sampler: Any) -> bool:
    """Tell whether a sampler yields every index once, in random order."""
    return type(sampler) is RandomSampler and not sampler.replacement and len(sampler) == len(sampler.data_source)


class _Share(Sampler[int]):
    """The same sequences in every pass, shuffled by the global generator, which ``_EndlessOrder`` seeds."""

    def __init__(self, size: int, rank: int, ranks: int, shuffles: bool) -> None:
        self.indices = torch.arange(rank, size, ranks)
        self.shuffles = shuffles

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        order = self.indices[torch.randperm(len(self))] if self.shuffles else self.indices
        return iter(order.tolist())


class _EndlessOrder(Sampler[int]):
    """Indices of one rank, pass after pass, from a position on."""

    def __init__(
        self, sampler: Any, seed: int, shard: int, num_shards: int, position: int, eras: Sequence[Era] = ()
    ) -> None:
        self.sampler = sampler
        self.seed = seed
        self.shard = shard
        self.num_shards = num_shards
        self.position = position
        self.passes = Passes(len(sampler), eras)

    def __iter__(self) -> Iterator[int]:
        number, skip = self.passes.find(self.position, self.shard, self.num_shards)
        while True:
            order = self.passes.rest(number, self._pass(number))
            yield from order[self.shard :: self.num_shards][skip:].tolist()
            number, skip = number + 1, 0

    def _pass(self, number: int) -> Tensor:
        size = len(self.sampler)
        if isinstance(self.sampler, SequentialSampler):
            return torch.arange(size)
        if _shuffles_all(self.sampler):
            generator = torch.Generator().manual_seed(derived_seed(self.seed, number))
            return torch.randperm(size, generator=generator)
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(number)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(self.seed, number))
            if getattr(self.sampler, "generator", None) is not None:
                self.sampler.generator.manual_seed(derived_seed(self.seed, number))
            return torch.tensor(list(self.sampler))

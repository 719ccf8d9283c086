"""The endless supply of clean sequences for a stream, and its place in the data."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler, SequentialSampler

from puma_lightning.data.batch import Batch, check_batch


def derived_seed(*keys: int) -> int:
    """Derive a 63-bit seed from non-negative integers, well mixed: neighbouring keys give unrelated seeds."""
    # Numbered words of one width: SeedSequence pads with zeros, and splits large integers.
    words = [word for key in keys for word in (key & 0xFFFFFFFF, key >> 32)]
    return int(np.random.SeedSequence([len(keys), *words]).generate_state(1, np.uint64)[0] >> 1)


class CleanSequences:
    """An endless, rank-sharded supply of checked clean sequences that knows its position.

    Takes over the data set, workers and collate function of a user's ``DataLoader``, and reads it pass after
    pass. A pass holds every sequence exactly once over all ranks, in an order fixed by (seed, pass), so a
    single number says where in the data a rank is. Randomness inside a data set must depend on the index only,
    and an iterable data set must yield the same on every rank, for a resumed run to see the same data.

    Args:
        loader: The user's loader. A shuffling one is shuffled again in each pass; any other sampler, also that of a
            batch sampler, is iterated again in each pass, under a seed of its own.
        mask_id: The mask token.
        vocab_size: V.
        rank: This process.
        world_size: Number of processes.
        seed: The same on all ranks.
        first_given: Whether position 0 must be given in every sequence.

    Raises:
        ValueError: If the loader has no batch size or no sampler, or the data set is empty or has no length.
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
    ) -> None:
        self.loader = loader
        self.rank = rank
        self.world_size = world_size
        self._limits: dict[str, Any] = {
            "mask_id": mask_id,
            "vocab_size": vocab_size,
            "first_given": first_given,
        }
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
        try:
            self.num_sequences = len(loader.dataset if self._iterable else self._sampler)  # type: ignore[arg-type]
        except TypeError:
            raise ValueError(
                f"train_dataloader: expected a data set with a length, got {type(loader.dataset).__name__} without; "
                "define __len__, the number of sequences in one pass over all ranks"
            ) from None
        if self.num_sequences == 0:
            raise ValueError("train_dataloader: expected training sequences, got an empty data set; bring some")
        # A DistributedSampler of the user's own has dealt out the sequences already.
        self._sharded = getattr(self._sampler, "num_replicas", 1) == world_size > 1
        if self._sharded:
            self.num_sequences *= world_size
        self.seek(seed, 0)

    def seek(self, seed: int, position: int) -> None:
        """Go to a position, the number of sequences that this rank has taken since the start."""
        self.seed = seed
        self.position = position
        self._rest: Batch | None = None
        self._batches = self._read(position)

    def close(self) -> None:
        """Let the loader's worker processes end; the position stays."""
        self._rest = None
        self._batches = iter(())

    @property
    def length(self) -> int:
        """L, of the sequences that come next."""
        if self._rest is None:
            self._rest = self._next_batch()
        return self._rest["input_ids"].shape[1]

    def take(self, number: int) -> Batch:
        """Take the next ``number`` sequences.

        Returns:
            ``{"input_ids": (number, L) int64, "prompt_mask": (number, L) bool}`` on the CPU.

        Raises:
            ValueError: If the data are not clean sequences of one length.
        """
        parts = [] if self._rest is None else [self._rest]
        while sum(len(part["input_ids"]) for part in parts) < number:
            part = self._next_batch()
            if parts and part["input_ids"].shape[1] != parts[0]["input_ids"].shape[1]:
                lengths = parts[0]["input_ids"].shape[1], part["input_ids"].shape[1]
                raise ValueError(
                    f"input_ids: expected sequences of one length, got lengths {lengths[0]} and {lengths[1]}; pad or "
                    "cut them"
                )
            parts.append(part)
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        # The rest is kept even when empty: it remembers the sequence length.
        self._rest = {name: tensor[number:] for name, tensor in joined.items()}
        self.position += number
        return {name: tensor[:number] for name, tensor in joined.items()}

    def _next_batch(self) -> Batch:
        try:
            return next(self._batches)
        except RuntimeError as error:
            if "equal size" not in str(error):
                raise
            raise ValueError(f"input_ids: expected sequences of one length, got: {error}; pad or cut them") from error
        except ValueError as error:
            first = self.position + (0 if self._rest is None else len(self._rest["input_ids"]))
            where = f"batch after {first} training sequences of process {self.rank}"
            raise ValueError(f"{error} ({where})") from error

    def _read(self, position: int) -> Iterator[Batch]:
        """Yield checked batches of this rank's sequences from a position on, without end."""
        # The iterator must not refer back to self: as part of a cycle its workers would be stopped by the garbage
        # collector, which takes seconds for each of them.
        check = partial(check_batch, **self._limits)
        old = self.loader
        options: dict[str, Any] = {
            "batch_size": self.batch_size,
            "num_workers": old.num_workers,
            "collate_fn": old.collate_fn,
            "timeout": old.timeout,
            "worker_init_fn": old.worker_init_fn,
            "multiprocessing_context": old.multiprocessing_context,
            "prefetch_factor": old.prefetch_factor,
            # A generator of its own: iterating must not draw from the global one. The same on all ranks: each
            # reads the whole of an iterable data set.
            "generator": torch.Generator().manual_seed(derived_seed(self.seed)),
        }
        if not self._iterable:
            order = _EndlessOrder(
                self._sampler, self.seed, 0 if self._sharded else self.rank,
                1 if self._sharded else self.world_size, position,
            )  # fmt: skip
            return map(check, DataLoader(old.dataset, sampler=order, **options))
        return _share_of_iterable(DataLoader(old.dataset, **options), check, self.rank, self.world_size, position)


def _share_of_iterable(
    loader: "DataLoader[Any]", check: Callable[[Any], Batch], rank: int, world_size: int, position: int
) -> Iterator[Batch]:
    """Read the whole data set on every rank and keep the rank's share; reach a position by reading up to it."""
    index = 0
    skip = position * world_size
    while True:
        empty = True
        for batch in map(check, loader):
            empty = False
            rows = torch.arange(index, index + len(batch["input_ids"]))
            index += len(rows)
            mine = (rows >= skip) & (rows % world_size == rank)
            if mine.any():
                yield {name: tensor[mine] for name, tensor in batch.items()}
        if empty:
            raise ValueError(
                f"train_dataloader: expected sequences, got none from {type(loader.dataset).__name__}; check its "
                "__iter__"
            )


class _EndlessOrder(Sampler[int]):
    """Indices of one rank, pass after pass, from a position on."""

    def __init__(self, sampler: Any, seed: int, shard: int, num_shards: int, position: int) -> None:
        self.sampler = sampler
        self.seed = seed
        self.shard = shard
        self.num_shards = num_shards
        self.position = position

    def __iter__(self) -> Iterator[int]:
        length = len(range(self.shard, len(self.sampler), self.num_shards))
        number, skip = divmod(self.position, length)
        while True:
            yield from self._pass(number)[self.shard :: self.num_shards][skip:].tolist()
            number, skip = number + 1, 0

    def _pass(self, number: int) -> Tensor:
        size = len(self.sampler)
        if isinstance(self.sampler, SequentialSampler):
            return torch.arange(size)
        plain = type(self.sampler) is RandomSampler and not self.sampler.replacement
        if plain and size == len(self.sampler.data_source):
            generator = torch.Generator().manual_seed(derived_seed(self.seed, number))
            return torch.randperm(size, generator=generator)
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(number)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(self.seed, number))
            if getattr(self.sampler, "generator", None) is not None:
                self.sampler.generator.manual_seed(derived_seed(self.seed, number))
            return torch.tensor(list(self.sampler))

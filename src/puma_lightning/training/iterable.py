"""Reading iterable data sets, which may have no length and no end, from a place that a checkpoint knows.

A *place* is plain data. The data set is split in parts, at first one for each rank, and each worker process of the
loader has a slice of each part: for every one of these the place holds what ``state_dict`` of the data set said there.
So a run that is resumed goes there at once. A data set without a ``state_dict`` is read again from the start of the
pass (with a ``set_epoch``) or of the run, and what has been taken is left out.
"""

import copy
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from puma_lightning.data.batch import Batch

Place = dict[str, Any]
_DONE = "done"  # the state of a slice that has been read to its end
_SAID_AFTER = 2.0  # seconds of reading over, after which there is a rate to tell


def first_place(part: int, of: int, workers: int, over: int = 0) -> Place:
    """Return the start of a part of a data set.

    Args:
        part: The part.
        of: The number of parts.
        workers: Worker processes of the loader; at least 1.
        over: How many rows to read over from there.
    """
    parts = [{"part": part, "pass": 0, "workers": [None] * workers}]
    return {"of": of, "parts": parts, "turn": 0, "read": 0, "over": over}


def can_be_split(dataset: Any) -> bool:
    """Tell whether a data set gives each rank a part, so that none reads what others train on."""
    return hasattr(dataset, "split_by_rank") or (_is_of_datasets(dataset) and not is_split(dataset))


def is_split(dataset: Any) -> bool:
    """Tell whether a data set is the part of one rank already, by ``datasets.distributed.split_dataset_by_node``."""
    return _is_of_datasets(dataset) and getattr(dataset, "_distributed", None) is not None


def part_of(dataset: Any, part: int, of: int) -> Any:
    """Return one of several disjoint parts of a data set, to be read without a trace in the whole."""
    if hasattr(dataset, "split_by_rank"):
        return dataset.split_by_rank(part, of)
    if not _is_of_datasets(dataset):
        return copy.copy(dataset)
    from datasets.distributed import split_dataset_by_node

    # Also of one part: a copy of such a data set is the same one by another name.
    return split_dataset_by_node(dataset, part, of)


def number_of_shards(dataset: Any) -> int | None:
    """Return how many files or the like a data set is made of, which is how finely workers can share it."""
    shards = getattr(dataset, "num_shards", None)
    if shards is None and _is_of_datasets(dataset):
        shards = dataset.n_shards  # its name in datasets 3.0
    return shards


def can_tell_its_place(dataset: Any) -> bool:
    """Tell whether a data set goes on exactly from its ``state_dict``.

    A shuffle buffer of ``datasets`` does not: what it holds is not in the state, and is lost.
    """
    if not hasattr(dataset, "state_dict") or not hasattr(dataset, "load_state_dict"):
        return False
    return not _is_of_datasets(dataset) or not _has_shuffle_buffer(getattr(dataset, "_ex_iterable", None))


def _is_of_datasets(dataset: Any) -> bool:
    library = sys.modules.get("datasets")  # nobody has a data set of it without it
    return library is not None and isinstance(dataset, library.IterableDataset)


def _has_shuffle_buffer(iterable: Any) -> bool:
    """Look for one in the layers of a data set; what cannot be looked into may have one."""
    if iterable is None or "BufferShuffled" in type(iterable).__name__:
        return True
    below = [getattr(iterable, "ex_iterable", None), *getattr(iterable, "ex_iterables", ())]
    return any(_has_shuffle_buffer(each) for each in below if each is not None)


class _Slices(IterableDataset[Any]):
    """What a worker process reads: batches of its slices, each with the state of the data set after it."""

    def __init__(self, dataset: Any, place: Place, batch_size: int, collate: Callable[[Any], Any]) -> None:
        self.dataset = dataset
        self.place = place
        self.batch_size = batch_size
        self.collate = collate

    def __iter__(self) -> Iterator[tuple[int, int, Any, Any] | None]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        if worker < self.place["turn"]:
            yield None  # the loader asks its workers in turn, and this one has had its turn in the first round
        for number, part in enumerate(self.place["parts"]):
            state = part["workers"][worker]
            if state == _DONE:
                continue
            dataset = part_of(self.dataset, part["part"], self.place["of"])
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(part["pass"])
            # As in torchdata, either the data set tells its place or the iterator that it returns does.
            ours = can_tell_its_place(dataset)
            if ours and state is not None:
                dataset.load_state_dict(state)
            rows = iter(dataset)
            theirs = not hasattr(dataset, "state_dict") and can_tell_its_place(rows)
            teller: Any = dataset if ours else rows if theirs else None
            if theirs and state is not None:
                teller.load_state_dict(state)
            while batch := list(islice(rows, self.batch_size)):
                told = None if teller is None else teller.state_dict()
                yield worker, number, copy.deepcopy(told), self.collate(batch)


def read(
    dataset: Any,
    place: Place,
    batch_size: int,
    collate: Callable[[Any], Any],
    check: Callable[[Any], Batch],
    seed: int,
    options: dict[str, Any],
) -> Iterator[tuple[Batch, int, Place]]:
    """Read a data set from a place on, pass after pass, without end.

    Args:
        dataset: The whole data set.
        place: Where to begin.
        batch_size: Rows in a batch.
        collate: From rows to a batch.
        check: Checks a batch.
        seed: Of what workers draw.
        options: Further arguments of the DataLoader.

    Yields:
        A batch, how many rows were read before it since the start of the run, and the place after it.

    Raises:
        ValueError: If the data set holds nothing, or its state is something that a checkpoint cannot hold.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(place["parts"][0]["pass"]):
        torch.empty((), dtype=torch.int64).random_(generator=generator)  # as a DataLoader does in each pass
    # The place that can be gone to, and how many rows have been read since; ``here`` is the pass that is being read.
    base, since, here = place, 0, place
    over = _ReadingOver(place["over"], type(dataset).__name__)
    empty_passes, told = 0, False
    while empty_passes < 2:  # the rest of a pass may be empty
        empty_passes += 1
        slices = _Slices(dataset, here, batch_size, collate)
        loader: DataLoader[Any] = DataLoader(
            slices, batch_size=None, collate_fn=_unchanged, generator=generator, **options
        )
        for item in filter(None, loader):
            worker, number, state, rows = item
            batch = check(rows)
            size = len(batch["input_ids"])
            empty_passes = 0 if size else empty_passes
            first = base["read"] + since
            since += size
            told = state is not None
            if told:
                _check_plain(state, dataset)
                here = _after(here, worker, number, state, first + size)
                base, since = here, 0
            if skipped := over.of(size):
                first, batch = first + skipped, {name: tensor[skipped:] for name, tensor in batch.items()}
            if skipped < size:
                yield batch, first, {**base, "over": since}
        parts = [{**part, "pass": part["pass"] + 1, "workers": [None] * len(part["workers"])} for part in here["parts"]]
        here = {**here, "parts": parts, "turn": 0, "read": base["read"] + since, "over": 0}
        if told or hasattr(dataset, "set_epoch"):
            base, since = here, 0
    raise ValueError(
        f"train_dataloader: expected sequences, got none from {type(dataset).__name__}; check its __iter__, and "
        "the collate_fn"
    )


def _after(place: Place, worker: int, number: int, state: Any, rows: int) -> Place:
    """Return the place after a batch of a worker, the state of which is known."""
    parts = [{**part, "workers": list(part["workers"])} for part in place["parts"]]
    for part in parts[:number]:
        part["workers"][worker] = _DONE  # slices are read one after the other
    parts[number]["workers"][worker] = state
    return {**place, "parts": parts, "turn": (worker + 1) % len(parts[0]["workers"]), "read": rows, "over": 0}


class _ReadingOver:
    """Counts rows that were taken before, and says how long reading over them takes."""

    def __init__(self, rows: int, name: str) -> None:
        self.rows = rows
        self.left = rows
        self.name = name
        self.began = time.monotonic()
        self.said = False
        self.bar: Any = None

    def of(self, size: int) -> int:
        """Return how many of the next rows are to be read over."""
        if not self.left:
            return 0
        if self.bar is None:
            hidden = rank_zero_only.rank != 0  # type: ignore[attr-defined]
            self.bar = tqdm(total=self.rows, desc="Reading over", unit=" sequences", delay=_SAID_AFTER, disable=hidden)
        skipped = min(size, self.left)
        self.left -= skipped
        self.bar.update(skipped)
        took = time.monotonic() - self.began
        if not self.said and (took > _SAID_AFTER or not self.left):
            self.said = True
            rank_zero_warn(
                f"{self.name} does not tell its place, so the {self.rows:,} sequences before that of the checkpoint "
                f"are read again, which takes {took * self.rows / (self.rows - self.left):.1f} s; with state_dict and "
                "load_state_dict, and without a shuffle buffer of datasets, it would take none"
            )
        if not self.left:
            self.bar.close()
        return skipped


def _check_plain(state: Any, dataset: Any) -> None:
    """Check that a checkpoint can hold a state: it is loaded without running any code in it."""
    if isinstance(state, dict):
        state = [*state, *state.values()]
    if isinstance(state, list | tuple):
        for each in state:
            _check_plain(each, dataset)
    elif not isinstance(state, Tensor) and type(state) not in (str, bool, int, float, type(None)):
        raise ValueError(
            f"state_dict: expected tensors, numbers, texts, and lists and dictionaries of them, got "
            f"{type(state).__name__} from {type(dataset).__name__}; return these, as a checkpoint holds nothing else"
        )


def _unchanged(batch: Any) -> Any:
    return batch

"""Data sets without a length: shared by ranks and workers, read pass after pass, and gone on with exactly."""

import io
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import datasets
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from puma_lightning.training.sequences import CleanSequences

V, MASK, LENGTH = 11, 10, 4
SIZE = 48
PLACES = 10 ** torch.arange(LENGTH - 1, -1, -1)
pytestmark = pytest.mark.filterwarnings("ignore:.* does not tell its place", "ignore:train_dataloader. .* shard")


def digits(i: int) -> list[int]:
    """The i-th sequence spells i."""
    return [i // 10**place % 10 for place in range(LENGTH - 1, -1, -1)]


def names(x0: Tensor) -> list[int]:
    return (x0 @ PLACES).tolist()


def rows(size: int) -> Iterator[dict[str, Tensor]]:
    info = get_worker_info()
    first, every = (info.id, info.num_workers) if info else (0, 1)
    return ({"input_ids": torch.tensor(digits(i))} for i in range(first, size, every))


class Plain(IterableDataset):
    """A user's own, without a length or a state."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return rows(SIZE)


class Reshuffled(Plain):
    """One whose passes differ."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        info = get_worker_info()
        first, every = (info.id, info.num_workers) if info else (0, 1)
        order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        return ({"input_ids": torch.tensor(digits(i))} for i in order[first::every])


class Stateful(Reshuffled):
    """One that tells its place, as torchdata asks for it. It counts what it yields."""

    yielded = begin = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.yielded, begin, self.begin = self.begin, self.begin, 0
        for number, row in enumerate(super().__iter__()):
            if number >= begin:
                self.yielded += 1
                yield row

    def state_dict(self) -> dict[str, Any]:
        return {"yielded": self.yielded}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begin = state["yielded"]


class Teller:
    """An iterator that tells its place."""

    def __init__(self) -> None:
        self.items, self.number = list(rows(SIZE)), 0

    def __iter__(self) -> "Teller":
        return self

    def __next__(self) -> dict[str, Tensor]:
        if self.number == len(self.items):
            raise StopIteration
        self.number += 1
        return self.items[self.number - 1]

    def state_dict(self) -> dict[str, int]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.number = state["number"]


class TellingIterator(IterableDataset):
    def __iter__(self) -> Teller:  # type: ignore[override]
        return Teller()


def streamed(shards: int = 4) -> Any:
    whole = datasets.Dataset.from_dict({"input_ids": [digits(i) for i in range(SIZE)]})
    return whole.to_iterable_dataset(num_shards=shards).with_format("torch")


DATASETS: dict[str, Any] = {
    "plain": Plain,
    "set_epoch": Reshuffled,
    "stateful": Stateful,
    "stateful iterator": TellingIterator,
    "datasets": streamed,
    "datasets, 3 shards": lambda: streamed(3),
    "datasets, mapped": lambda: streamed().map(lambda row: row),
    "datasets, filtered": lambda: streamed().filter(lambda row: True),
    "datasets, in batches": lambda: streamed().map(lambda batch: batch, batched=True, batch_size=5),
    "datasets, shuffle buffer": lambda: streamed().shuffle(seed=1, buffer_size=7),
}
TELLING = [name for name in DATASETS if name not in ("plain", "set_epoch", "datasets, shuffle buffer")]


def supply_of(name: str, rank: int = 0, ranks: int = 1, workers: int = 0, batch_size: int = 3) -> CleanSequences:
    return CleanSequences(
        DataLoader(DATASETS[name](), batch_size=batch_size, num_workers=workers), MASK, V, rank, ranks, seed=5
    )


def saved(supply: CleanSequences) -> Any:
    """What a checkpoint says, through a file: tensors and plain types only."""
    file = io.BytesIO()
    torch.save({"seed": supply.seed, "position": supply.position, "supply": supply.supply()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def take(supply: CleanSequences, number: int) -> list[int]:
    return names(supply.take(number)["input_ids"])


# Starting workers takes long.
SOME = ["plain", "stateful", "datasets", "datasets, shuffle buffer"]
SHARED = [
    *((name, ranks, 0) for name in DATASETS for ranks in (1, 2, 3)),
    *(("plain", 1, 2), ("stateful", 2, 2), ("datasets", 1, 2), ("datasets", 2, 2), ("datasets, shuffle buffer", 2, 2)),
]


@pytest.mark.parametrize(("name", "ranks", "workers"), SHARED)
def test_a_pass_holds_every_sequence_once_over_all_ranks_and_workers(name, ranks, workers):
    """And so does the next."""
    held: Counter[int] = Counter()
    for rank in range(ranks):
        supply = supply_of(name, rank, ranks, workers)
        held.update(take(supply, SIZE // ranks))
        if ranks == 1:
            assert held == Counter(range(SIZE))
            assert Counter(take(supply, SIZE)) == Counter(range(SIZE))
    assert held == Counter(range(SIZE))


@pytest.mark.parametrize(("name", "ranks", "workers"), SHARED)
def test_a_supply_goes_on_exactly(name, ranks, workers):
    """In the middle of a batch, of a round of the workers, of the first pass and of the second; twice in a row."""
    rank, share = ranks - 1, SIZE // ranks
    supply = supply_of(name, rank, ranks, workers)
    points = [10, share + 7] if workers else [0, 2, 9, share - 1, share, share + 7]
    other = None
    for before, point in pairwise([0, *points]):
        take(supply, point - before)
        state = saved(supply)
        if other is not None:  # that was resumed itself
            take(other, point - before)
            state = saved(other)
            assert state["position"] == point
        other = supply_of(name, rank, ranks, workers)
        other.restore(**state)
    assert take(other, SIZE) == take(supply, SIZE)
    other.seek(5, 0)  # what was gone on with leaves no trace
    assert take(other, 10) == take(supply_of(name, rank, ranks, workers), 10)


@pytest.mark.parametrize("name", TELLING)
def test_a_data_set_that_tells_its_place_is_not_read_again(name, monkeypatch):
    """Not a warning, and not a row before its place."""
    supply = supply_of(name)
    take(supply, 31)
    state = saved(supply)
    assert state["supply"]["place"]["over"] == 0
    other = supply_of(name)
    other.restore(**state)
    assert take(other, 5) == take(supply, 5)


@pytest.mark.parametrize("name", ["plain", "set_epoch", "datasets, shuffle buffer"])
@pytest.mark.filterwarnings("default")
def test_a_data_set_that_does_not_tell_its_place_is_read_again_and_says_so(name):
    """Where passes can be told apart, from the start of the pass."""
    supply = supply_of(name)
    take(supply, SIZE + 6)
    other = supply_of(name)
    again = SIZE + 6 if name == "plain" else 6
    other.restore(**saved(supply))
    with pytest.warns(UserWarning, match=rf"does not tell its place, so the {again} sequences .* takes \d+\.\d s"):
        assert take(other, 5) == take(supply, 5)


def test_passes_of_a_data_set_with_set_epoch_differ():
    supply = supply_of("set_epoch")
    assert take(supply, SIZE) != take(supply, SIZE)


def test_a_data_set_that_is_split_already_is_left_so():
    held = []
    for rank in (0, 1):
        part = split_dataset_by_node(streamed(), rank, 2)
        held += take(CleanSequences(DataLoader(part, batch_size=3), MASK, V, rank, 2), SIZE // 2)
    assert Counter(held) == Counter(range(SIZE))


def test_too_few_shards_are_said():
    with pytest.warns(UserWarning, match=r"3 shard\(s\) cannot be shared evenly by 2 processes"):
        supply_of("datasets, 3 shards", 0, 2)
    with pytest.warns(
        UserWarning, match=r"4 shard\(s\) for each of 1 process\(es\) are too few for 9 workers; starting 4"
    ):
        supply = supply_of("datasets", workers=9)
    assert sorted(take(supply, SIZE)) == list(range(SIZE))


def test_another_number_of_workers_is_refused():
    supply = supply_of("datasets", workers=2)
    take(supply, 4)
    with pytest.raises(ValueError, match="num_workers: expected 2, as in the checkpoint, got 0"):
        supply_of("datasets").restore(**saved(supply))


def test_a_state_that_a_checkpoint_cannot_hold_is_refused():
    class Odd(Stateful):
        def state_dict(self) -> dict[str, Any]:
            return {"seen": {1, 2}}

    with pytest.raises(ValueError, match=r"state_dict: expected tensors, numbers.* got set from Odd"):
        CleanSequences(DataLoader(Odd(), batch_size=3), MASK, V).take(1)


# --- another number of ranks ---


@pytest.mark.parametrize("name", [*SOME, "datasets, 3 shards"])
@settings(max_examples=8, deadline=None)
@given(taken=st.lists(st.integers(0, 11), min_size=1, max_size=4), ranks=st.integers(1, 4))
def test_another_number_of_ranks_reads_what_is_left(name, taken, ranks):
    """Every sequence of the pass once, or a refusal that says what to do."""
    number = len(taken)
    assume(ranks != number)
    old = [supply_of(name, rank, number) for rank in range(number)]
    held = Counter(each for supply, some in zip(old, taken, strict=True) for each in take(supply, some))
    states = [saved(supply) for supply in old]
    split = name.startswith("datasets") and number > 1
    came: Counter[int] = Counter()
    for rank in range(ranks):
        supply = supply_of(name, rank, ranks)
        arguments = 5, [state["position"] for state in states], [state["supply"] for state in states]
        if split and (ranks > number or "buffer" in name):
            what = rf"expected {number} process.* got {ranks}: .*resume with {number}, or .*init_from"
            with pytest.raises(ValueError, match=what):
                supply.deal(*arguments)
            return
        supply.deal(*arguments)
        # What every rank has left of this pass: of its parts, or of the whole.
        read = [some + unread for some, unread in zip(taken, unread_of(states), strict=True)]
        share = len(range(rank, sum(unread_of(states)), ranks))
        if split:
            share += sum(SIZE // number - some for some in read[rank::ranks])
        else:
            share += len(range(rank, SIZE - sum(read), ranks))
        came.update(take(supply, share))
    assert held + came == Counter(range(SIZE))


def unread_of(states: list[Any]) -> list[int]:
    """How many sequences each rank had read and not taken."""
    return [len(state["supply"]["rest"]["input_ids"]) if state["supply"]["rest"] else 0 for state in states]

"""Sequences that say which they are, loaders of them, and what a training run does with a stream."""

import io
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from puma_lightning.chain.blocks import cut_blocks
from puma_lightning.data.batch import pad_collate
from puma_lightning.training.stream import Stream

V = 11
MASK = 10
LENGTH = 6
PLACES = 10 ** torch.arange(LENGTH - 1, -1, -1)


def row(i: int) -> dict[str, Tensor]:
    """The i-th sequence spells i in decimal digits, so every sequence says which one it is."""
    return {"input_ids": i // PLACES % 10, "prompt_mask": torch.arange(LENGTH) < i % 3}


def names(x0: Tensor) -> list[int]:
    return (x0 @ PLACES).tolist()


class Rows(Dataset):
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return row(i)


class IterableRows(IterableDataset):
    """Split over workers, as PyTorch asks of any iterable data set."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        first, every = (worker.id, worker.num_workers) if worker else (0, 1)
        return map(row, range(first, self.size, every))


class Backwards:
    """A user's own sampler."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.size - 1, -1, -1))


class RandomHalf(Backwards):
    """A sampler that draws anew in every pass from the global generator."""

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.size).tolist())


def predictions(x0: Tensor, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return 3 * torch.randn(*x0.shape, V, generator=generator).index_fill(2, torch.tensor([MASK]), float("-inf"))


def train(stream: Stream, steps: int) -> list[dict[str, Tensor]]:
    """What the next steps see."""
    seen = []
    batches = iter(stream)
    for _ in range(steps):
        batch = next(batches)
        seen.append(batch)
        logits = cut_blocks(predictions(batch["input_ids"], stream.step), batch["chains"].x0.shape[1])
        stream.advance(logits, (stream.step - 1) // len(stream.groups))
    return seen


def same(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> bool:
    pairs = [(x["chains"].tensors(), y["chains"].tensors()) for x, y in zip(a, b, strict=False)]
    return len(a) == len(b) and all(torch.equal(x[name], y[name]) for x, y in pairs for name in x if x[name].shape)


def saved_and_loaded(state: Any) -> Any:
    """Through a file, as a checkpoint goes: tensors and plain types only."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Ragged(Rows):
    """The i-th sequence has i % 9 + 2 positions, of which the first is given and the first two say i."""

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        length = i % 9 + 2
        return {
            "input_ids": torch.tensor([i // 10, i % 10] + [8] * (length - 2)),
            "prompt_mask": torch.arange(length) < 1,
        }


class ByLength(Backwards):
    """A sampler that groups sequences by length."""

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(range(self.size), key=lambda i: i % 9))


RAGGED: dict[str, Any] = {
    "shuffle": lambda n, **kw: DataLoader(Ragged(n), shuffle=True, collate_fn=pad_collate, **kw),
    "grouped": lambda n, **kw: DataLoader(Ragged(n), sampler=ByLength(n), collate_fn=pad_collate, **kw),
}

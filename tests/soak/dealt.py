"""A trial whose runs go on with another number of processes: no sequence of a pass may be trained on twice or never.

The data say it themselves: each sequence spells its number and the pass that it was read in.
"""

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from tests.soak.configs import Config

PASSES = 1000  # more than any run has
PLACES = 10 ** torch.arange(5, -1, -1)
MASK = 10


def row(number: int, time: int) -> dict[str, Tensor]:
    """Return a sequence of 16: its number and its pass in decimal digits, and ten digits more."""
    name = number * PASSES + time
    return {"input_ids": torch.cat([name // PLACES % 10, torch.arange(10) * (name % 7) % 10])}


def names(x0: Tensor) -> list[tuple[int, int]]:
    """Tell number and pass of sequences."""
    return [divmod(name, PASSES) for name in (x0[:, : len(PLACES)] @ PLACES).tolist()]


class Numbered(pl.LightningDataModule):
    """A user's own data, in one of three ways."""

    vocab_size, mask_id = 11, MASK

    def __init__(self, kind: str, batch_size: int, workers: int, size: int) -> None:
        super().__init__()
        self.kind, self.batch_size, self.workers, self.size = kind, batch_size, workers, size

    def train_dataloader(self) -> DataLoader:
        options = {"batch_size": self.batch_size, "num_workers": self.workers}
        if self.kind == "numbered sampler":
            return DataLoader(Rows(), sampler=Shuffled(self.size), **options)
        stream = StreamWithState if self.kind == "numbered stream" else StreamOfRows
        return DataLoader(stream(self.size), **options)

    def val_dataloader(self) -> DataLoader:
        return DataLoader([row(number, 0) for number in range(8)], self.batch_size)


class Rows(Dataset):
    """Every index says which sequence of which pass is meant."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return row(*divmod(index, PASSES))


class Shuffled(Sampler[int]):
    """Every number once in each pass, in an order of the pass's own."""

    def __init__(self, size: int) -> None:
        self.size, self.time = size, 0

    def __len__(self) -> int:
        return self.size

    def set_epoch(self, time: int) -> None:
        """Begin a pass."""
        self.time = time

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.time))
        return iter((order * PASSES + self.time).tolist())


class StreamOfRows(IterableDataset):
    """Rows in order, shared by the workers of a loader."""

    def __init__(self, size: int) -> None:
        self.size, self.time, self.begun = size, 0, 0

    def __len__(self) -> int:
        return self.size

    def set_epoch(self, time: int) -> None:
        """Begin a pass."""
        self.time = time

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        first, every = (worker.id, worker.num_workers) if worker else (0, 1)
        mine = range(first, self.size, every)
        begun, self.begun = self.begun, 0
        for place in range(begun, len(mine)):
            self.place = place + 1
            yield row(mine[place], self.time)


class StreamWithState(StreamOfRows):
    """The same, which knows its place."""

    place = 0

    def state_dict(self) -> dict[str, int]:
        """Return how many rows of this worker have been read."""
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go there at the next iteration."""
        self.begun = self.place = state["place"]


class Finished(pl.Callback):
    """Writes down which sequences have been trained on to their end, batch by batch, and which have not at the end.

    A checkpoint says how much of that comes before it, so that what a run did after the checkpoint from which the next
    one goes on does not count.
    """

    every_step = True

    def __init__(self, path: Path, run: int) -> None:
        self._path, self._run = path, run
        self._batches = 0
        self._from: dict[str, int] | None = None
        self._now: list[tuple[int, int]] = []
        self._over = False

    def state_dict(self) -> dict[str, int]:
        return {"run": self._run, "batches": self._batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._from = dict(state)

    def _write(self, **line: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"run": self._run, **line}) + "\n")

    def on_train_start(self, trainer, pl_module) -> None:
        self._write(kind="begin", after=self._from)

        def observe(group, before, predictions, after) -> None:
            def over(chains) -> Tensor:
                return chains.done.view(pl_module.stream.batch_size, -1).all(1)

            whole = after.x0.reshape(pl_module.stream.batch_size, -1)
            self._now = names(whole[over(after) & ~over(before)])

        pl_module.stream.observers.append(observe)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._batches += 1
        self._write(kind="finished", batch=self._batches, finished=self._now)

    def on_train_end(self, trainer, pl_module) -> None:
        if not self._batches:
            return
        stream, supply = pl_module.stream, pl_module.stream.sequences.supply()
        held = [name for batch in (supply["waiting"], supply["rest"]) if batch for name in names(batch["input_ids"])]
        for chains in filter(None, stream.groups):
            whole, done = (part.reshape(stream.batch_size, -1) for part in (chains.x0, chains.done))
            held += names(whole[~done.all(1)])
        self._write(kind="held", held=held, processes=trainer.world_size)
        self._over = True

    def teardown(self, trainer, pl_module, stage) -> None:
        if not self._over:
            return
        # What comes next of the data, after what waits: when nothing is saved any more.
        sequences = pl_module.stream.sequences
        supply = sequences.supply()
        waiting = supply["waiting"]
        sequences.restore(sequences.seed, sequences.position, supply)  # its workers have ended
        taken = sequences.take(1 + (len(waiting["input_ids"]) if waiting else 0))
        self._write(kind="next", time=names(taken["input_ids"])[-1][1])


def compare_passes(folder: Path, size: int) -> tuple[list[str], int]:
    """Say which sequences were trained on twice or never, in the runs that led to the last one's end.

    Returns:
        That, in words, and how many passes were looked at as a whole.
    """
    lines = [json.loads(text) for path in sorted(folder.glob("finished.*.jsonl")) for text in _whole_lines(path)]
    begun = {line["run"]: line["after"] for line in lines if line["kind"] == "begin"}
    if not begun:
        return ["no run began to train"], 0
    run = max(begun)
    upto = {run: 10**9}  # of each run that counts, how many batches do
    while begun[run]:
        upto[begun[run]["run"]], run = begun[run]["batches"], begun[run]["run"]
    finished: Counter[tuple[int, int]] = Counter()
    for line in lines:
        if line["kind"] == "finished" and line["batch"] <= upto.get(line["run"], 0):
            finished.update(map(tuple, line["finished"]))
    # A run counted in epochs that was stopped in its very last batch does not say what it held.
    ended = max((line["run"] for line in lines if line["kind"] == "held" and line["run"] in upto), default=None)
    last = [line for line in lines if line["run"] == ended]
    held = [line for line in last if line["kind"] == "held"]
    seen = finished + Counter(tuple(name) for line in held for name in line["held"])
    unlike = [f"sequence {number} of pass {time}: {n} times" for (number, time), n in seen.items() if n > 1]
    # Each process has taken its share of all passes before the one that it would read next.
    following = [line["time"] for line in last if line["kind"] == "next"]
    if not held or len(following) < held[0]["processes"]:
        return unlike, 0
    for time in range(min(following)):
        missing = [number for number in range(size) if (number, time) not in seen]
        unlike += [f"pass {time} without {missing}"] if missing else []
    return unlike, min(following)


def _whole_lines(path: Path) -> Iterator[str]:
    """Yield all lines but one that a kill cut short."""
    return (line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n"))


def random_processes(config: Config, rng: random.Random, run: int) -> Config:
    """Return the config of a trial's next run, in some other number of processes as a rule."""
    return config | {"processes": rng.choice([1, 2, 2, 3]), "run": run}

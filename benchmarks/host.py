"""What a step costs the host: Lightning, callbacks, logging and the stream, around a model too small to matter.

python benchmarks/host.py

A PUMA step is taken in a bare loop (stream, loss, gradients, clipping, optimizer, schedule), and under a Trainer with
EMA and the callbacks of the shipped configs, for several ``steps_per_execution``. ``overhead`` is what that adds.

*Recorded* sides are runs with ``captured`` where nothing is computed: what stands in for a CUDA graph does its work
once, and when it is replayed takes a fresh sequence at most. So their time is all that the host has to do for a step.
"""

import argparse
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from _report import command_line, environment, write
from _turns import ratios, spread
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from tqdm import tqdm

from puma_lightning import (
    ChainDiagnostics,
    MaskedDiffusion,
    ProgressiveUnmasking,
    TransformerBackbone,
    WarmupCosine,
    graphs,
)
from puma_lightning.training.sequences import CleanSequences
from puma_lightning.training.stream import Stream

MASK, LENGTH, BATCH = 9, 16, 8


class Clock(pl.Callback):
    """The time from one optimizer step to another."""

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end, self.seconds = start, end, 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step in (self.start, self.end):
            self.seconds = time.perf_counter() - self.seconds


@contextmanager
def graphs_of_nothing() -> Iterator[None]:
    """Have work be recorded on a CPU, by doing it once, and replayed by doing nothing."""
    before = graphs.can_record, graphs.record

    def record(function: Callable[[], Any], *_: Any) -> tuple[Callable[[], None], Any]:
        result, group = function(), getattr(function, "__self__", None)
        one = torch.ones((), dtype=torch.long)
        # The refill is a method of the rows, of which one is over in a step.
        return (lambda: None if group is None else group.rows.supply.take(one)), result

    graphs.can_record, graphs.record = (lambda device: True), record
    try:
        yield
    finally:
        graphs.can_record, graphs.record = before


def model(steps: int, captured: bool = False) -> MaskedDiffusion:
    """One small layer."""
    backbone = TransformerBackbone(MASK + 1, 8, 8, num_layers=1, num_heads=1, max_length=LENGTH)
    schedule, optimizer = partial(WarmupCosine, warmup_steps=10), partial(torch.optim.AdamW, lr=1e-3, fused=True)
    return MaskedDiffusion(
        backbone,
        MASK,
        ProgressiveUnmasking(8),
        optimizer=optimizer,
        scheduler=schedule,
        steps_per_execution=steps,
        captured=captured,
    )


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(MASK, (4096, LENGTH), generator=generator)
    return DataLoader([{"input_ids": row} for row in x0], BATCH, shuffle=True)


def recorded(steps: int, start: int, end: int) -> float:
    """Seconds of a step whose work is no work."""
    with graphs_of_nothing():
        return under_a_trainer(steps, start, end, captured=True)


def under_a_trainer(steps: int, start: int, end: int, captured: bool = False) -> float:
    """Seconds of a step."""
    clock = Clock(start, end)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=end,
            logger=CSVLogger(folder),
            log_every_n_steps=64,
            val_check_interval=end,
            check_val_every_n_epoch=None,
            limit_val_batches=1,
            num_sanity_val_steps=0,
            gradient_clip_val=1.0,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[
                EMAWeightAveraging(use_buffers=False),
                LearningRateMonitor(),
                ChainDiagnostics(),
                clock,
                ModelCheckpoint(every_n_train_steps=end),
            ],
        )
        trainer.fit(model(steps, captured), loader(), loader())
    return clock.seconds / (end - start)


def in_a_loop(start: int, end: int) -> float:
    """Seconds of a step."""
    module = model(1)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)
    schedule = WarmupCosine(optimizer, total_steps=end, warmup_steps=10)
    sequences = CleanSequences(loader(), MASK, MASK + 1)
    stream = Stream(sequences, module.forward_process, MASK, BATCH, num_steps=end)
    begun = 0.0
    for step, batch in enumerate(stream):
        if step == start:
            begun = time.perf_counter()
        chains = batch["chains"]
        counted = chains.masked.any(1)
        loss, predictions = module.loss(chains, counted.float() / counted.sum(), module.forward_process.reads())
        stream.advance(predictions, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return (time.perf_counter() - begun) / (end - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=256, help="timed in each run; a multiple of 64")
    parser.add_argument("--executions", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/host.json"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    start, end = 64, 64 + options.steps
    sides = {"loop": partial(in_a_loop, start, end)}
    sides |= {f"N = {n}": partial(under_a_trainer, n, start, end) for n in options.executions}
    sides |= {f"recorded, N = {n}": partial(recorded, n, start, end) for n in options.executions}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    order, shuffled = list(sides), random.Random(0)
    for done in tqdm(range(-1, options.rounds), desc="host"):
        shuffled.shuffle(order)
        for name in order:
            taken = sides[name]()
            if done >= 0:
                seconds[name].append(taken)
    floor, first = statistics.median(seconds["loop"]), f"N = {options.executions[0]}"
    over = {
        name: statistics.median(values) - (0 if name.startswith("recorded") else floor)
        for name, values in seconds.items()
        if name != "loop"
    }
    report = {
        "command": command_line(),
        **environment(),
        "seconds_a_step": {name: spread(values) for name, values in seconds.items()},
        "overhead": {
            name: {"seconds_a_step": round(value, 6), f"of_{first}": round(value / over[first], 3)}
            for name, value in over.items()
        },
        "times_as_fast": {name: ratios(seconds[first], seconds[name]) for name in over if name != first},
    }
    write(options.out, report)


if __name__ == "__main__":
    main()

"""What a PUMA training step costs beside one of the baseline. See benchmarks/README.md.

One model under one real Trainer takes steps of each forward process in turn, in random order within every round,
so that whatever else the machine does falls on all of them alike. A step is everything from the end of the one
before to its own end: fetching the batch (which refills the slots), forward, loss, advance, backward, clipping,
AdamW and Lightning's own work.
"""

import argparse
import logging
import random
import statistics
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import _report
import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from puma_lightning.forward_process import ForwardProcess, ProgressiveUnmasking, RandomMasking
from puma_lightning.models import TransformerBackbone
from puma_lightning.modules import MaskedDiffusion
from puma_lightning.stream import Stream

BASELINE = "RandomMasking"
OVERHEAD = 1.10  # what a PUMA step may cost, in steps of the baseline


@dataclass(frozen=True)
class Shape:
    """A model and its batches."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    qkv_bias: bool
    vocab_size: int
    length: int
    prompt_length: int
    batch_size: int
    num_stages: int


SHAPES = {
    "quickstart": Shape(128, 384, 4, 4, False, 8, 36, 13, 64, 6),
    "sudoku": Shape(256, 768, 8, 8, True, 11, 162, 81, 32, 8),
}


class Rows(Dataset[Any]):
    """Sequences in memory, all copies of a few: a model learns them, so that a threshold fires."""

    def __init__(self, shape: Shape, size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        distinct = (4, shape.length)
        self.x0 = torch.randint(shape.vocab_size - 1, distinct, generator=generator)
        order = torch.rand(distinct, generator=generator).argsort(1)
        self.prompt = order < shape.prompt_length
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.x0[i % len(self.x0)], "prompt_mask": self.prompt[i % len(self.prompt)]}


class InTurn:
    """The streams of several forward processes as one train loader; says whose step it is and times the fetch."""

    def __init__(self, module: "InTurnModule", streams: dict[str, Stream], rounds: int) -> None:
        self.module = module
        self.streams = streams
        self.rounds = rounds
        self.current = ""
        self.fetch = 0.0

    def __len__(self) -> int:
        return self.rounds * len(self.streams)

    def __iter__(self) -> Iterator[Any]:
        batches = {name: iter(stream) for name, stream in self.streams.items()}
        names = list(batches)
        shuffled = random.Random(0)
        for _ in range(self.rounds):
            shuffled.shuffle(names)
            for name in names:
                start = now(self.module.device)
                batch = next(batches[name])
                self.fetch = now(self.module.device) - start
                self.current = name
                self.module.stream = self.streams[name]
                yield batch


class InTurnModule(MaskedDiffusion):
    """A ``MaskedDiffusion`` with one stream for each forward process."""

    def __init__(self, processes: dict[str, ForwardProcess], rounds: int, **options: Any) -> None:
        super().__init__(**options)
        self.processes = processes
        self.rounds = rounds

    def _build_stream(self, loader: Any, seed: int) -> Any:
        streams = {}
        for name, process in self.processes.items():
            self.forward_process = process
            streams[name] = super()._build_stream(loader, seed)
        self.in_turn = InTurn(self, streams, self.rounds)
        return self.in_turn


class Stopwatch(pl.Callback):
    """Seconds of every step, of its fetch, and of processor time: what other processes take is not in the last."""

    def __init__(self, warmup: int, progress: "tqdm[Any]") -> None:
        self.warmup = warmup
        self.progress = progress
        self.step: dict[str, list[float]] = {}
        self.fetch: dict[str, list[float]] = {}
        self.cpu: dict[str, list[float]] = {}
        self.masked: dict[str, list[float]] = {}
        self.last = self.last_cpu = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.last, self.last_cpu = now(module.device), time.process_time()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        end, end_cpu = now(module.device), time.process_time()
        in_turn = module.in_turn
        if batch_idx >= self.warmup * len(in_turn.streams):
            self.step.setdefault(in_turn.current, []).append(end - self.last)
            self.cpu.setdefault(in_turn.current, []).append(end_cpu - self.last_cpu)
            self.fetch.setdefault(in_turn.current, []).append(in_turn.fetch)
            masked = (batch["xt"] == module.mask_id).float().mean()
            self.masked.setdefault(in_turn.current, []).append(float(masked))
        self.progress.update()
        self.last, self.last_cpu = now(module.device), time.process_time()


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(shape: Shape, rounds: int, warmup: int, accelerator: str, precision: Any, label: str) -> dict[str, Any]:
    """Steps of the three forward processes on one shape."""
    pl.seed_everything(0, verbose=False)
    processes: dict[str, ForwardProcess] = {
        BASELINE: RandomMasking(),
        "PUMA": ProgressiveUnmasking(shape.num_stages),
        "PUMA tau=0.9": ProgressiveUnmasking(shape.num_stages, threshold=0.9),
    }
    total = rounds + warmup
    module = InTurnModule(
        processes,
        total,
        backbone=TransformerBackbone(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_layers=shape.num_layers,
            num_heads=shape.num_heads,
            qkv_bias=shape.qkv_bias,
            max_length=shape.length,
        ),
        mask_id=shape.vocab_size - 1,
        scheduler=None,
    )
    rows = Rows(shape, shape.batch_size * total)
    with tqdm(total=total * len(processes), desc=label, unit="step", mininterval=1) as progress:
        stopwatch = Stopwatch(warmup, progress)
        trainer = pl.Trainer(
            accelerator=accelerator, devices=1, precision=precision, max_epochs=1, gradient_clip_val=1.0,
            log_every_n_steps=50, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[stopwatch],
        )  # fmt: skip
        trainer.fit(module, DataLoader(rows, batch_size=shape.batch_size))
    without_fetch = {
        name: [step - fetch for step, fetch in zip(steps, stopwatch.fetch[name], strict=True)]
        for name, steps in stopwatch.step.items()
    }
    results: dict[str, dict[str, Any]] = {
        name: {
            "step_ms": spread(stopwatch.step[name], 1e3),
            "cpu_ms": spread(stopwatch.cpu[name], 1e3),
            "fetch_ms": spread(stopwatch.fetch[name], 1e3),
            "masked_share": round(statistics.mean(stopwatch.masked[name]), 4),
            "ratios_to_baseline": {
                "step": ratios(stopwatch.step[name], stopwatch.step[BASELINE]),
                "cpu": ratios(stopwatch.cpu[name], stopwatch.cpu[BASELINE]),
                "without_fetch": ratios(without_fetch[name], without_fetch[BASELINE]),
            },
        }
        for name in processes
    }
    return {
        "shape": asdict(shape),
        "parameters": sum(p.numel() for p in module.parameters()),
        "rounds": rounds,
        "warmup_rounds": warmup,
        "results": results,
        # By the least favourable of the ways to look at it.
        "largest_median_ratio": {
            name: max(
                ratio[key]
                for ratio in result["ratios_to_baseline"].values()
                for key in ("of_medians", "median_by_round")
            )
            for name, result in results.items()
            if name != BASELINE
        },
    }


def ratios(values: list[float], base: list[float]) -> dict[str, float]:
    """Of the medians, of the minima, and round by round."""
    low, median, high = statistics.quantiles([a / b for a, b in zip(values, base, strict=True)], n=4)
    named = {
        "of_medians": statistics.median(values) / statistics.median(base),
        "of_minima": min(values) / min(base),
        "median_by_round": median,
        "quartile1_by_round": low,
        "quartile3_by_round": high,
    }
    return {name: round(value, 4) for name, value in named.items()}


def spread(values: list[float], scale: float) -> dict[str, float]:
    """Median, quartiles, minimum and maximum."""
    low, median, high = statistics.quantiles(values, n=4)
    named = {"median": median, "quartile1": low, "quartile3": high, "min": min(values), "max": max(values)}
    return {name: round(value * scale, 2) for name, value in named.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", default="32-true", help="as the Trainer names it")
    parser.add_argument(
        "--rounds", type=int, help="rounds timed; default 60 for quickstart and on CUDA, 10 for sudoku on a CPU"
    )
    parser.add_argument("--warmup", type=int, default=3, help="rounds before these")
    parser.add_argument("--threads", type=int, help="CPU threads; default what PyTorch chooses")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/train_step.json"))
    args = parser.parse_args()
    if args.rounds is not None and args.rounds < 2:
        parser.error("--rounds must be at least 2")
    if args.threads:
        torch.set_num_threads(args.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning.*")

    shapes = {}
    for name in args.shapes:
        rounds = args.rounds or (10 if name == "sudoku" and args.device == "cpu" else 60)
        accelerator = "gpu" if args.device == "cuda" else "cpu"
        shapes[name] = measure(SHAPES[name], rounds, args.warmup, accelerator, args.precision, name)
    report = {
        "command": _report.command_line(),
        "environment": {**_report.environment(args.device), "precision": args.precision},
        "shapes": shapes,
    }
    _report.write(args.out, report)
    for name, measured in shapes.items():
        print(f"\n{name}: {measured['parameters'] / 1e6:.2f}M parameters, {measured['rounds']} rounds")
        for process, result in measured["results"].items():
            step = result["step_ms"]
            print(
                f"  {process:13} {step['median']:8.1f} ms (min {step['min']:.1f}, max {step['max']:.1f}), "
                f"of it fetch {result['fetch_ms']['median']:.1f}; processor {result['cpu_ms']['median']:.1f} ms"
            )
            for kind, ratio in result["ratios_to_baseline"].items():
                print(f"      {kind:14}", ", ".join(f"{name} {value:.3f}" for name, value in ratio.items()))
        largest = measured["largest_median_ratio"]
        print("  overhead under 10 %:", {name: ratio < OVERHEAD for name, ratio in largest.items()}, largest)


if __name__ == "__main__":
    main()

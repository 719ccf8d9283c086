"""What a PUMA training step costs, versus one of the baseline, of the textbook and of the published code.

One model under one real Trainer takes steps of each forward process in turn, in random order within every round,
so that whatever else the machine does falls on all of them alike. A step is everything from the end of the one
before to its own end: fetching the batch (which refills the slots), forward, loss, advance, backward, clipping,
AdamW and Lightning's own work. After each round the others take a step, without a Trainer. See benchmarks/README.md.
"""

import argparse
import json
import logging
import random
import statistics
import time
import warnings
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import _published
import _report
import _turns
import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from puma_lightning.chain.teacher import ForwardProcess, ProgressiveUnmasking, RandomMasking
from puma_lightning.models import TransformerBackbone
from puma_lightning.modules import MaskedDiffusion
from puma_lightning.training.loading import StreamLoading
from puma_lightning.training.sequences import CleanSequences
from puma_lightning.training.stream import Stream

BASELINE = "RandomMasking"
PUMA, THRESHOLD = "PUMA", "PUMA tau=0.9"
RECOMPUTED = "PUMA tau=0.9, activations recomputed"
TEXTBOOK, PUBLISHED = "textbook", "published"
TAU = 0.9
OVERHEAD = 1.05  # what a PUMA step may cost, in steps of the baseline


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
    tied: bool = False
    learning_rate: float = 3e-4
    compile: bool = False
    activation_checkpointing: bool = False


SHAPES = {
    "quickstart": Shape(128, 384, 4, 4, False, 8, 36, 13, 64, 6),
    "sudoku": Shape(256, 768, 8, 8, True, 11, 162, 81, 32, 8),
    # As configs/tinygsm/puma.yaml, with fewer layers, a smaller vocabulary and shorter sequences; and the thing itself.
    # They learn nothing: what a step costs depends on how much is masked, and so on how sure a model is.
    "tinygsm_small": Shape(512, 1536, 4, 8, False, 50_258, 256, 64, 4, 12, True, 0.0),
    "tinygsm": Shape(512, 1536, 14, 8, False, 151_645, 512, 128, 32, 12, True, 0.0),
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


class Textbook:
    """PUMA's step written down plainly: logits of all positions, their log-softmax, autograd."""

    def __init__(self, shape: Shape, backbone: TransformerBackbone, steps: int) -> None:
        self.backbone = backbone
        self.mask_id = shape.vocab_size - 1
        self.optimizer = torch.optim.AdamW(self.backbone.parameters(), lr=shape.learning_rate, weight_decay=0.01)
        self.masked: list[float] = []
        loader = DataLoader(Rows(shape, shape.batch_size * steps), batch_size=shape.batch_size)
        supply = CleanSequences(loader, self.mask_id, shape.vocab_size)
        process = ProgressiveUnmasking(shape.num_stages, threshold=TAU)
        device = backbone.lm_head.weight.device
        self.stream = Stream(supply, process, self.mask_id, shape.batch_size, steps, device=device)
        self.batches = iter(self.stream)

    def step(self) -> None:
        batch = next(self.batches)
        x0, masked = batch["input_ids"], batch["xt"] == self.mask_id
        logits = self.backbone(batch["xt"]).float()
        logits[..., self.mask_id] = float("-inf")
        nll = -logits.log_softmax(-1).gather(-1, x0[..., None])[..., 0]
        loss = ((nll * masked).sum(1) / masked.sum(1).clamp_min(1)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.backbone.parameters(), 1.0)
        self.optimizer.step()
        self.stream.advance(logits.detach(), 0)
        self.masked.append(float(masked.float().mean()))


class Published:
    """A step of the published training loop, with its model, loss and pool; without its EMA and logging."""

    def __init__(self, shape: Shape, backbone: TransformerBackbone, steps: int, reference: Path) -> None:
        self.progressive = _published.load(reference, "progressive")
        self.model = _published.backbone(reference, backbone)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=shape.learning_rate, weight_decay=0.01)
        self.mask_id = shape.vocab_size - 1
        self.masked: list[float] = []
        rows = Rows(shape, shape.batch_size * steps)
        loader: DataLoader[Any] = DataLoader(
            [{"labels": row["input_ids"], "prompt_mask": row["prompt_mask"]} for row in map(rows.__getitem__, range(4))]
            * (len(rows) // 4),  # type: ignore[arg-type]
            batch_size=shape.batch_size,
        )
        self.pool = self.progressive.PhasedMasking(
            loader, shape.batch_size, self.mask_id, shape.num_stages, backbone.lm_head.weight.device, shape.length,
            mode="confidence_collapse", confidence_threshold=TAU,
        )  # fmt: skip

    def step(self) -> None:
        log_probs = self.model(self.pool.current_batch()).log_softmax(-1)
        prompt_mask = self.pool.state["prompt_mask"]
        loss = self.progressive.mdm_loss_fn(log_probs, self.pool.x0, self.pool.xt, self.mask_id, prompt_mask)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.masked.append(float((self.pool.xt == self.mask_id).float().mean()))
        self.pool.update_with_logits(log_probs)
        loss.item()  # its progress bar shows it in every step


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
                self.module.forward_process = self.module.processes[name]
                yield batch


class InTurnModule(MaskedDiffusion):
    """A ``MaskedDiffusion`` with one stream for each forward process."""

    def __init__(self, processes: dict[str, ForwardProcess], rounds: int, **options: Any) -> None:
        super().__init__(**options)
        self.processes = processes
        self.rounds = rounds

        self.loading = InTurnLoading()


class InTurnLoading(StreamLoading):
    """Builds one stream for each forward process."""

    def build(self, module: Any, seed: int, loader: Any) -> Any:
        streams = {}
        for name, process in module.processes.items():
            module.forward_process = process
            streams[name] = super().build(module, seed, loader)
        module.in_turn = InTurn(module, streams, module.rounds)
        return module.in_turn


class Stopwatch(pl.Callback):
    """Seconds of every step, of its fetch, and of processor time: what other processes take is not in the last."""

    def __init__(
        self, warmup: int, progress: "tqdm[Any]", others: "dict[str, Textbook | Published]", half: bool
    ) -> None:
        self.warmup = warmup
        self.others = others
        self.half = half
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
        if (batch_idx + 1) % len(in_turn.streams) == 0:
            self.take_others(module.device, counted=batch_idx >= self.warmup * len(in_turn.streams))
        self.progress.update()
        self.last, self.last_cpu = now(module.device), time.process_time()

    def take_others(self, device: torch.device, counted: bool) -> None:
        for name, other in random.sample(list(self.others.items()), len(self.others)):
            with torch.autocast(device.type, torch.bfloat16, enabled=self.half):
                seconds, cpu = _turns.timed(other.step, device.type)
            if counted:
                self.step.setdefault(name, []).append(seconds)
                self.cpu.setdefault(name, []).append(cpu)
                self.masked.setdefault(name, []).append(other.masked[-1])


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def build(shape: Shape, device: torch.device) -> TransformerBackbone:
    torch.manual_seed(0)
    return TransformerBackbone(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        qkv_bias=shape.qkv_bias,
        tie_embeddings=shape.tied,
        max_length=shape.length,
        compile=shape.compile,
        activation_checkpointing=shape.activation_checkpointing,
    ).to(device)


def run(
    shape: Shape,
    rounds: int,
    warmup: int,
    accelerator: str,
    precision: Any,
    label: str,
    sides: Collection[str],
    reference: Path | None,
) -> Stopwatch:
    """Steps of some sides in turn: of forward processes under a Trainer, and of the others between them."""
    pl.seed_everything(0, verbose=False)
    possible: dict[str, ForwardProcess] = {
        BASELINE: RandomMasking(),
        PUMA: ProgressiveUnmasking(shape.num_stages),
        THRESHOLD: ProgressiveUnmasking(shape.num_stages, threshold=TAU),
    }
    processes = {name: process for name, process in possible.items() if name in sides}
    total = rounds + warmup
    device = torch.device("cuda" if accelerator == "gpu" else "cpu")
    plain = replace(shape, compile=False)
    others: dict[str, Textbook | Published] = {}
    if TEXTBOOK in sides:
        others[TEXTBOOK] = Textbook(shape, build(plain, device), total)
    if PUBLISHED in sides:
        assert reference is not None
        others[PUBLISHED] = Published(shape, build(plain, device), total, reference)
    with tqdm(total=total * max(1, len(processes)), desc=label, unit="step", mininterval=1) as progress:
        stopwatch = Stopwatch(warmup, progress, others, precision == "bf16-mixed")
        if not processes:
            for _ in range(total):
                stopwatch.take_others(device, counted=True)
            return stopwatch
        module = InTurnModule(
            processes, total, backbone=build(shape, device), mask_id=shape.vocab_size - 1, scheduler=None,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=shape.learning_rate, fused=True),
        )  # fmt: skip
        rows = Rows(shape, shape.batch_size * total)
        trainer = pl.Trainer(
            accelerator=accelerator, devices=1, precision=precision, max_epochs=1, gradient_clip_val=1.0,
            log_every_n_steps=50, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[stopwatch],
        )  # fmt: skip
        trainer.fit(module, DataLoader(rows, batch_size=shape.batch_size))
    return stopwatch


def measure(
    shape: Shape,
    rounds: int,
    warmup: int,
    accelerator: str,
    precision: Any,
    label: str,
    others: Collection[str] = (),
    reference: Path | None = None,
) -> dict[str, Any]:
    """The step of PUMA versus that of the baseline and of others."""
    processes = (BASELINE, PUMA, THRESHOLD)
    sides = (*processes, *others)
    stopwatch = run(shape, rounds, warmup, accelerator, precision, label, sides, reference)
    without_fetch = {
        name: [step - fetch for step, fetch in zip(stopwatch.step[name], stopwatch.fetch[name], strict=True)]
        for name in processes
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
    # As the published code trains on TinyGSM, with a threshold.
    compared = {name: (stopwatch.step[name], stopwatch.cpu[name]) for name in (THRESHOLD, *others)}
    return {
        "shape": asdict(shape),
        "parameters": sum(p.numel() for p in build(shape, torch.device("cpu")).parameters()),
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
        "compared": {
            **_turns.compared(*({name: times[i] for name, times in compared.items()} for i in (0, 1))),
            "masked_share": {name: round(statistics.mean(stopwatch.masked[name]), 4) for name in compared},
        },
    }


def ratios(values: list[float], base: list[float]) -> dict[str, float]:
    """Ratios of the medians, of the minima, and round by round."""
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


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=["quickstart", "sudoku", "tinygsm_small"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="32-true")
    parser.add_argument("--compile", action="store_true", help="the layers of our model, with torch.compile")
    parser.add_argument("--rounds", type=int, help="rounds timed; default 60 for quickstart and on CUDA, else 24")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before these")
    parser.add_argument("--threads", type=int, help="CPU threads; default what PyTorch chooses")
    parser.add_argument("--reference", type=Path, help="a checkout of JaeyeonKim01/PUMA, to compare with it too")
    parser.add_argument("--memory-shape", choices=SHAPES, default="tinygsm_small", help="whose memory is measured")
    parser.add_argument("--recompute", action="store_true", help="our memory with activation_checkpointing too")
    parser.add_argument("--memory-batch-sizes", type=int, nargs="*", default=[4, 32])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/train_step.json"))
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    words = parser()
    args = words.parse_args()
    if args.rounds is not None and args.rounds < 2:
        words.error("--rounds must be at least 2")
    if args.threads:
        torch.set_num_threads(args.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning.*")
    accelerator = "gpu" if args.device == "cuda" else "cpu"
    if args.memory_of:
        batch_size, side = args.memory_of.split(",", 1)
        shape = replace(SHAPES[args.memory_shape], batch_size=int(batch_size), compile=args.compile)
        if side == RECOMPUTED:
            shape, side = replace(shape, activation_checkpointing=True), THRESHOLD
        # Two steps: AdamW's moments come with the first.
        steps = partial(run, shape, 2, 0, accelerator, args.precision, side, {side}, args.reference)
        print(json.dumps(_turns.peak_memory(steps, args.device)))
        return

    others = [TEXTBOOK, *([PUBLISHED] if args.reference else [])]
    memory = {
        f"{args.memory_shape}, batch of {size}": {
            side: _turns.peak_memory_of(f"{size},{side}")
            for side in (THRESHOLD, *([RECOMPUTED] if args.recompute else []), *others)
        }
        for size in args.memory_batch_sizes
    }
    shapes = {}
    for name in args.shapes:
        rounds = args.rounds or (24 if name != "quickstart" and args.device == "cpu" else 60)
        shape = replace(SHAPES[name], compile=args.compile)
        shapes[name] = measure(shape, rounds, args.warmup, accelerator, args.precision, name, others, args.reference)
    report = {
        "command": _report.command_line(),
        "environment": {**_report.environment(args.device), "precision": args.precision},
        "shapes": shapes,
        "peak_memory": memory,
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
        print(f"  overhead under {OVERHEAD - 1:.0%}:", {n: ratio < OVERHEAD for n, ratio in largest.items()}, largest)
        _turns.print_table(measured["compared"])


if __name__ == "__main__":
    main()

"""How fast the data come, versus what training steps consume. See benchmarks/README.md.

For each config the DataModule's own train loader is read through ``CleanSequences``, as training reads it, and plainly,
as a loop over the ``DataLoader`` would; and the config's model takes training steps, to see what they consume.
"""

import argparse
import itertools
import logging
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import _report
import _turns
import lightning.pytorch as pl
import torch

from puma_lightning.cli import PumaCLI
from puma_lightning.modules.base import StreamedModule
from puma_lightning.training.sequences import CleanSequences

OURS, TEXTBOOK = "ours", "textbook"
SLOWEST_FIRST = {"median": "median", "min": "max", "max": "min"}  # a rate, and the time that it is of
TARGET = 10  # times what a training step consumes


class Steps(pl.Callback):
    """Seconds of every training step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.ends.append(time.perf_counter())

    def median(self) -> float:
        return statistics.median(b - a for a, b in itertools.pairwise(self.ends))


def measure(config: Path, rounds: int, batches: int, steps: int) -> dict[str, Any]:
    """Sequences a second, delivered and consumed."""
    cli = PumaCLI(
        StreamedModule, pl.LightningDataModule, subclass_mode_model=True, subclass_mode_data=True, run=False,
        auto_configure_optimizers=False, save_config_callback=None,
        args=[
            "--config", str(config), "--trainer.accelerator", "cpu", "--trainer.max_steps", str(steps),
            "--trainer.limit_val_batches", "0", "--trainer.logger", "false", "--trainer.callbacks", "[]",
            "--trainer.enable_checkpointing", "false", "--trainer.enable_progress_bar", "false",
            "--model.init_args.init_from", "null",
        ],
    )  # fmt: skip
    clock = Steps()
    cli.trainer.callbacks.append(clock)  # type: ignore[attr-defined]
    cli.trainer.fit(cli.model, cli.datamodule)
    loader = cli.datamodule.train_dataloader()
    size = loader.batch_size
    supply = CleanSequences(loader, cli.model.mask_id, cli.model.vocab_size)

    def ours() -> None:
        for _ in range(batches):
            supply.take(size)

    def textbook() -> None:
        for _ in itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), batches):
            pass

    measured = _turns.in_turn({OURS: ours, TEXTBOOK: textbook}, rounds, config.stem, warmup=1)
    delivered = {
        side: {name: round(size * batches / times[of]) for name, of in SLOWEST_FIRST.items()}
        for side, times in measured["seconds"].items()
    }
    # The baseline takes a whole batch in every step, PUMA one in about K steps.
    consumed = size / clock.median()
    return {
        "config": config.as_posix(),
        "data": type(cli.datamodule).__name__,
        "batch_size": size,
        "length": int(supply.take(1)["input_ids"].shape[1]),
        "step_seconds": round(clock.median(), 4),
        "sequences_consumed_per_second_at_most": round(consumed, 1),
        "sequences_per_second": delivered,
        "times_what_is_consumed": round(delivered[OURS]["median"] / consumed, 1),
        **measured,
    }


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    configs = [Path("configs/quickstart.yaml"), Path("configs/words/puma.yaml")]
    parser.add_argument("--configs", nargs="+", type=Path, default=configs)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=200, help="read in each round")
    parser.add_argument("--steps", type=int, default=30, help="training steps, of which the median counts")
    parser.add_argument("--threads", type=int, help="CPU threads; default what PyTorch chooses")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/data.json"))
    return parser


def main() -> None:
    args = parser().parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning.*")
    found = [measure(config, args.rounds, args.batches, args.steps) for config in args.configs]
    report = {
        "command": _report.command_line(),
        "environment": _report.environment(),
        "target": {
            "times_what_is_consumed": TARGET,
            "met": all(data["times_what_is_consumed"] >= TARGET for data in found),
        },
        "data": found,
    }
    _report.write(args.out, report)
    for data in found:
        print(
            f"\n{data['config']}: {data['sequences_per_second'][OURS]['median']:,} sequences a second, a step of "
            f"{data['step_seconds']} s consumes {data['sequences_consumed_per_second_at_most']:,} at most: "
            f"{data['times_what_is_consumed']} times"
        )
        _turns.print_table(data)
    print(report["target"])


if __name__ == "__main__":
    main()

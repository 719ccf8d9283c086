"""Why does a forward process learn faster? How much the gradient of its stream varies, and over what it does.

    python experiments/mechanism.py                    # 6x6, on a CPU: some minutes for each point of training
    python experiments/mechanism.py --points 500 4000 --steps 256

A baseline is trained as in ``regimes.py``. At several points of its training the weights are held fast, the stream of
every process runs until it has settled, and the gradients of its next steps are compared. An optimizer averages over
steps, so what counts is the variance of a mean over w steps in a row, times w: for independent steps it is the same
for every w. If steps repeat each other it grows with w, and it falls if what one step leaves out the next one has.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from _runs import ROOT, read_config
from lightning.pytorch.utilities.seed import isolate_rng
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from puma_lightning import (
    ComplementaryMasking,
    ForwardProcess,
    MaskedDiffusion,
    ProgressiveUnmasking,
    RandomMasking,
    RandomOrder,
    SudokuDataModule,
)
from puma_lightning.callbacks.diagnostics import agreement
from puma_lightning.cli import main as puma
from puma_lightning.training.pooled import PooledStream
from puma_lightning.training.sequences import CleanSequences
from puma_lightning.training.stream import Stream

CONFIG = ROOT / "experiments" / "regimes_cpu.yaml"
BATCH, STAGES = 32, 6
WINDOWS = (1, 8, 32)
PROCESSES: dict[str, ForwardProcess] = {
    "random": RandomMasking(),
    "stratified": RandomMasking(stratified=True),
    "complementary": ComplementaryMasking(),
    "puma_random_order": ProgressiveUnmasking(STAGES, RandomOrder()),
    "puma": ProgressiveUnmasking(STAGES),
    "puma_t0.9": ProgressiveUnmasking(STAGES, threshold=0.9),
    "pool_8b": ProgressiveUnmasking(STAGES, pool=8 * BATCH),
    "pool_64b": ProgressiveUnmasking(STAGES, pool=64 * BATCH),
    "pool_64b_t0.9": ProgressiveUnmasking(STAGES, threshold=0.9, pool=64 * BATCH),
    "all": ProgressiveUnmasking(STAGES, pool="all"),
    "all_t0.9": ProgressiveUnmasking(STAGES, threshold=0.9, pool="all"),
}


def trained(points: list[int], folder: Path, flags: list[str]) -> dict[int, Path]:
    """Train the baseline, if it has not been, and return its checkpoint at each point."""
    found = {point: folder / f"step={point}.ckpt" for point in points}
    if not all(path.exists() for path in found.values()):
        saves = "--trainer.callbacks"
        puma([
            "fit", "--config", str(CONFIG), "--trainer.limit_val_batches", "0", "--trainer.val_check_interval", "null",
            f"{saves}+=ModelCheckpoint", f"{saves}.dirpath={folder}", f"{saves}.filename={{step}}",
            f"{saves}.every_n_train_steps={min(points)}", f"{saves}.save_top_k=-1", *flags,
        ])  # fmt: skip
    return found


def stream_of(process: ForwardProcess, data: SudokuDataModule, module: MaskedDiffusion) -> Stream:
    """The stream that a run has, without a Trainer."""
    pool = process.pool
    supply = CleanSequences(data.train_dataloader(), module.mask_id, module.vocab_size, fixed_share=pool == "all")
    options: dict[str, Any] = {
        "sequences": supply, "process": process, "mask_id": module.mask_id, "batch_size": BATCH, "num_steps": 10**9
    }  # fmt: skip
    return Stream(**options) if pool is None else PooledStream(None if pool == "all" else pool, **options)


def passes_to_settle(stream: Stream) -> int:
    """Steps until no chain is left of those that the run began with at a later stage, and two passes more."""
    return int((STAGES + 2) * stream.num_slots / BATCH)


def step(module: MaskedDiffusion, stream: Stream, learns: bool) -> tuple[dict[str, Any], Tensor, Tensor | None]:
    """Take a step without an update: the batch, its loss, and the gradient, (number of weights,), if it ``learns``."""
    batch = next(iter(stream))
    chains = batch["chains"]
    counted = chains.masked.any(1)
    with torch.set_grad_enabled(learns):
        loss, predictions = module.loss(chains, counted.float() / counted.sum(), stream.process.reads())
    gradient = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))]) if learns else None
    )
    stream.advance(predictions, 0)
    return batch, loss.detach(), gradient


def over_windows(values: Tensor) -> dict[int, float]:
    """The variance of a mean over w steps in a row, times w, for every w.

    Args:
        values: Of each step, (T, D).
    """
    found = {}
    for w in WINDOWS:
        means = values[: len(values) // w * w].view(-1, w, values.shape[1]).mean(1)
        found[w] = float(w * (means - means.mean(0)).square().sum() / (len(means) - 1))
    return found


def measured(module: MaskedDiffusion, stream: Stream, steps: int) -> dict[str, Any]:
    """What a stream that has settled is like."""
    for _ in range(passes_to_settle(stream)):
        step(module, stream, learns=False)
    gradients, losses = [], []
    last_seen: dict[bytes, int] = {}
    ages: list[int] = []
    kept = possible = torch.zeros(())
    for number in range(steps):
        batch, loss, gradient = step(module, stream, learns=True)
        gradients.append(gradient)
        losses.append(loss)
        for row in batch["input_ids"].numpy():
            ages += [number - last_seen[row.tobytes()]] if row.tobytes() in last_seen else []
            last_seen[row.tobytes()] = number
        if number % (steps // 8) == 0:
            generator = torch.Generator().manual_seed(number)
            sample = module.sample(batch["input_ids"], batch["prompt_mask"], generator=generator)
            agreed = agreement(batch["xt"] == module.mask_id, batch["prompt_mask"], sample.reveal_step)
            kept, possible = kept + agreed[0], possible + agreed[1]
    whole = torch.stack([each for each in gradients if each is not None])
    return {
        "gradient_variance": over_windows(whole),
        "loss_variance": over_windows(torch.stack(losses)[:, None]),
        "gradient_norm2": float(whole.mean(0).square().sum()),
        "mean_loss": float(torch.stack(losses).mean()),
        "mismatch": round(float(1 - kept / possible), 3),
        "distinct_sequences_per_100_steps": round(100 * len(last_seen) / steps),
        # Of a pool of all, whose sequences come back later than this looks, what it is by its size.
        "steps_between_turns": round(sum(ages) / len(ages), 1) if ages else round(stream.num_slots / BATCH, 1),
    }


def picture(found: dict[str, dict[str, Any]]) -> Figure:
    """The variance of the gradient over windows, against that of independent counts in single steps."""
    figure = Figure(figsize=(10, 3.4), dpi=120, layout="constrained")
    axes = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axis, (point, by_name) in zip(axes, found.items(), strict=True):
        unit = by_name["random"]["gradient_variance"][1]
        for place, (name, values) in enumerate(by_name.items()):
            shares = [values["gradient_variance"][w] / unit for w in WINDOWS]
            style = "--" if "pool" in name or "all" in name else "-"
            axis.plot(range(len(WINDOWS)), shares, style, marker="o", markersize=3, color=f"C{place % 10}", label=name)
        axis.set(title=f"after {point} steps", xticks=range(len(WINDOWS)), xticklabels=WINDOWS, xlabel="steps averaged")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("variance of the gradient\n(random masks, one step: 1)")
    axes[0].set_ylim(bottom=0)
    lines = axes[0].lines
    figure.legend(lines, [str(line.get_label()) for line in lines], loc="outside lower center", ncols=6, fontsize=8)
    return figure


def main() -> None:
    """Train, hold, measure; results are written after each process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Other flags, such as --trainer.max_steps 500, go to the run that is trained.",
    )  # fmt: skip
    parser.add_argument(
        "--points", type=int, nargs="+", default=[500, 2000, 4000], help="of training; multiples of the first"
    )
    parser.add_argument("--steps", type=int, default=512, help="gradients of each process at each point")
    parser.add_argument("--processes", nargs="+", choices=tuple(PROCESSES), default=list(PROCESSES))
    parser.add_argument("--folder", type=Path, default=Path("runs/experiments/mechanism"), help="of the run")
    parser.add_argument("--threads", type=int, help="CPU threads; default what PyTorch chooses")
    parser.add_argument("--out", type=Path, default=ROOT / "experiments" / "results" / "mechanism_cpu")
    args, flags = parser.parse_known_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.steps < 2 * max(WINDOWS):
        parser.error(f"--steps: expected at least {2 * max(WINDOWS)}, two windows of the longest, got {args.steps}")
    found: dict[str, dict[str, Any]] = {}
    folder = args.folder.absolute()
    checkpoints = trained(args.points, folder, flags)
    with tqdm(total=len(args.points) * len(args.processes), desc="streams") as progress:
        for point, path in checkpoints.items():
            module = MaskedDiffusion.load_from_checkpoint(path, map_location="cpu")
            for name in args.processes:
                with isolate_rng():
                    data = SudokuDataModule(**read_config(CONFIG)["data"]["init_args"])
                    data.prepare_data()
                    data.setup("fit")
                    values = measured(module, stream_of(PROCESSES[name], data, module), args.steps)
                found.setdefault(str(point), {})[name] = values
                text = json.dumps({"steps": args.steps, "windows": WINDOWS, "points": found}, indent=1)
                args.out.with_suffix(".json").write_text(text + "\n")
                progress.update()
    picture(found).savefig(args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()

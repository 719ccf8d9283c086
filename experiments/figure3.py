"""Figure 3: the order in which a model unmasks, at several optimizer steps against that of the final model.

    python experiments/figure3.py                  # 6x6, few clues and puzzles, on a CPU
    python experiments/figure3.py --scale gpu --data.train_file train.csv.gz --data.val_file test.csv.gz

It looks at the checkpoints that figure5.py's runs keep, and trains them if they are not there. The last one kept is the
final model.
"""

from pathlib import Path

import torch
import yaml
from _comparison import legend, write
from _curves import curves, draw, mean
from _runs import Point, Run, arguments, train
from _sudoku import PUMA, RUNS
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics.functional.regression import spearman_corrcoef

from puma_lightning import Confidence, MaskedDiffusion, Sample, Sampler, SudokuDataModule
from puma_lightning.callbacks.pictures import draw_reveal_order

NUM_PUZZLES = 64
SHOWN = 5  # models in the picture of orders
AGREEMENT, SOLVED = "order/agreement", "order/solved"


def checkpoints(folder: Path) -> dict[int, Path]:
    """Those kept along the way, by optimizer step in order."""
    found = {int(path.stem.removeprefix("step=")): path for path in folder.rglob("step=*.ckpt")}
    return dict(sorted(found.items()))


def puzzles(folder: Path) -> tuple[SudokuDataModule, Tensor, Tensor]:
    """The DataModule of a run, the first validation puzzles, (N, L) int64, and what is given of them, (N, L) bool."""
    config = next(folder.rglob("config.yaml"))
    data = SudokuDataModule(**yaml.safe_load(config.read_text())["data"]["init_args"])
    data.prepare_data()
    data.setup("validate")
    loaders = data.val_dataloader()
    batch = next(iter(loaders[0] if isinstance(loaders, list) else loaders))
    return data, batch["input_ids"][:NUM_PUZZLES], batch["prompt_mask"][:NUM_PUZZLES]


def solve(checkpoint: Path, x0: Tensor, prompt_mask: Tensor) -> Sample:
    """By confidence, one position a pass."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = MaskedDiffusion.load_from_checkpoint(checkpoint, map_location=device).eval()
    generator = torch.Generator(device).manual_seed(0)
    sample = model.sample(x0.to(device), prompt_mask.to(device), Sampler(Confidence()), generator)
    return Sample(sample.tokens.cpu(), sample.reveal_step.cpu(), sample.nfe.cpu())


def agreement(order: Tensor, other: Tensor, prompt_mask: Tensor) -> float:
    """Spearman's rank correlation of two orders of the answer, mean over the puzzles; 0 for unrelated ones.

    Args:
        order: When each position is revealed, (N, L) int64.
        other: The same of another model.
        prompt_mask: True where a position is given and has no order, (N, L) bool.
    """
    rows = zip(order, other, ~prompt_mask, strict=True)
    return float(torch.stack([spearman_corrcoef(a[m].float(), b[m].float()) for a, b, m in rows]).mean())


def picture(points: list[Point], runs: dict[str, Run]) -> Figure:
    """Agreement with the final model's order, and what is solved, over steps."""
    figure = Figure(figsize=(8, 3.4), dpi=120, layout="constrained")
    panels = {AGREEMENT: "rank correlation with the final order", SOLVED: "solved"}
    axes = list(figure.subplots(1, 2))
    for axis, (metric, name) in zip(axes, panels.items(), strict=True):
        draw(axis, {run.label: curves(points, key, metric) for key, run in runs.items()}, "optimizer steps", name)
        axis.set_ylim(0, 1.02)
    legend(figure, axes)
    return figure


def main() -> None:
    """Train what is missing, look at every checkpoint, report."""
    args = arguments(__doc__, "figure3", "sudoku", RUNS)
    runs = {name: RUNS[args.scale][name] for name in ("mdm", PUMA[args.scale])}
    train(runs, args.seeds, args.folder, args.jobs, args.threads, args.flags)
    points: list[Point] = []
    samples: dict[int, Sample] = {}
    for name in runs:
        for seed in args.seeds:
            folder = args.folder / f"{name}_{seed}"
            data, x0, prompt_mask = puzzles(folder)
            samples = {step: solve(path, x0, prompt_mask) for step, path in checkpoints(folder).items()}
            for step, sample in samples.items():
                values = {
                    AGREEMENT: agreement(sample.reveal_step, samples[max(samples)].reveal_step, prompt_mask),
                    SOLVED: float((sample.tokens == x0).all(1).float().mean()),
                }
                points += [Point(name, seed, step, 0, metric, round(value, 4)) for metric, value in values.items()]
    # One puzzle of the last run, PUMA of the last seed.
    steps = [list(samples)[i] for i in sorted({round(i * (len(samples) - 1) / (SHOWN - 1)) for i in range(SHOWN)})]
    panels = [[(samples[step].tokens[0], samples[step].reveal_step[0], x0[0]) for step in steps]]
    orders = draw_reveal_order(panels, [f"step {step:,}" for step in steps], data.picture)
    found = {m: {name: mean(curves(points, name, m)) for name in runs} for m in (AGREEMENT, SOLVED)}
    write(args, runs, points, found, {"": picture(points, runs), "_orders": orders})
    for name, run in runs.items():
        line = "  ".join(f"{step:,}: {value:.2f}" for step, value in found[AGREEMENT][name].items())
        print(f"{run.label:<12} rank correlation with the final order  {line}")


if __name__ == "__main__":
    main()

"""Figure 3: the order in which a model unmasks, at several optimizer steps against that of the final model.

    python experiments/figure3.py                  # 6x6, few clues and puzzles, on a CPU
    python experiments/figure3.py --scale gpu --data.train_file train.csv.gz --data.val_file test.csv.gz

It looks at the checkpoints of figure5.py's runs, which it trains if they are not there.
"""

import json
import re
from pathlib import Path

import torch
import yaml
from _curves import curves, draw, mean
from _runs import ROOT, Point, parser, train, write_csv
from _sudoku import RUNS
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics.functional.regression import spearman_corrcoef

from puma_lightning import Confidence, MaskedDiffusion, Sampler, SudokuDataModule

NUM_PUZZLES = 64
SHOWN = 5  # models in the picture
AGREEMENT = "order/agreement"
SOLVED = "order/solved"


def checkpoints(folder: Path) -> dict[int, Path]:
    """Those kept along the way, by optimizer step."""
    return {int(re.findall(r"\d+", path.stem)[0]): path for path in sorted(folder.rglob("step=*.ckpt"))}


def orders(checkpoint: Path, data: SudokuDataModule) -> tuple[Tensor, Tensor, Tensor]:
    """When each position is revealed, -1 where given, (N, L); what is given, (N, L); what is solved, (N,)."""
    model = MaskedDiffusion.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    loaders = data.val_dataloader()
    batch = next(iter(loaders[0] if isinstance(loaders, list) else loaders))
    x0, prompt_mask = batch["input_ids"][:NUM_PUZZLES], batch["prompt_mask"][:NUM_PUZZLES]
    sample = model.sample(x0, prompt_mask, Sampler(Confidence()), torch.Generator().manual_seed(0))
    return sample.reveal_step, prompt_mask, (sample.tokens == x0).all(1)


def agreement(order: Tensor, other: Tensor, prompt_mask: Tensor) -> float:
    """Spearman's rank correlation of two orders of the answer, mean over the puzzles; 0 for unrelated ones."""
    rows = zip(order, other, ~prompt_mask, strict=True)
    return float(torch.stack([spearman_corrcoef(a[m].float(), b[m].float()) for a, b, m in rows]).mean())


def picture(points: list[Point], labels: dict[str, str], shown: dict[int, Tensor], side: int) -> Figure:
    """Above: one puzzle's order at several steps, of the last run. Below: agreement with the final model's order."""
    figure = Figure(figsize=(10, 5.2), dpi=120, layout="constrained")
    grid = figure.add_gridspec(2, 2 * SHOWN, height_ratios=(1, 1.3))
    for place, (step, order) in enumerate(shown.items()):
        axis = figure.add_subplot(grid[0, 2 * place : 2 * place + 2])
        axis.imshow(order.view(side, side).float().masked_fill(order.view(side, side) < 0, float("nan")))
        for cell, when in enumerate(order.tolist()):
            if when >= 0:
                axis.text(cell % side, cell // side, str(when + 1), ha="center", va="center", fontsize=6, color="white")
        axis.set(xticks=[], yticks=[], title=f"step {step:,}")
        axis.title.set_fontsize(9)
    figure.suptitle(
        f"{list(labels.values())[-1]}: the order in which one puzzle is filled in (blank: given)", fontsize=9
    )
    for place, (metric, name) in enumerate(((AGREEMENT, "rank correlation with the final order"), (SOLVED, "solved"))):
        axis = figure.add_subplot(grid[1, SHOWN * place : SHOWN * (place + 1)])
        draw(axis, {label: curves(points, run, metric) for run, label in labels.items()}, "optimizer steps", name)
        axis.set_ylim(0, 1.02)
    return figure


def main() -> None:
    """Train what is missing, look at every checkpoint, report."""
    args, flags = parser(__doc__, "figure3", "sudoku").parse_known_args()
    runs = {name: run for name, run in RUNS[args.scale].items() if name != "puma_k3"}
    folder = args.folder or Path("runs/experiments") / f"sudoku_{args.scale}"
    out = args.out or ROOT / "experiments" / "results" / f"figure3_{args.scale}"
    train(runs, args.seeds, folder, args.jobs, args.threads, flags)
    points, shown, data = [], {}, None
    for name in runs:
        for seed in args.seeds:
            kept = checkpoints(folder / f"{name}_{seed}")
            if data is None:
                (config,) = (folder / f"{name}_{seed}").rglob("version_0/config.yaml")
                data = SudokuDataModule(**yaml.safe_load(config.read_text())["data"]["init_args"])
                data.prepare_data()
                data.setup("validate")
            final, prompt_mask, _ = orders(kept[max(kept)], data)
            for step, path in sorted(kept.items()):
                order, _, solved = orders(path, data)
                values = {AGREEMENT: agreement(order, final, prompt_mask), SOLVED: float(solved.float().mean())}
                points += [Point(name, seed, step, 0, metric, round(value, 4)) for metric, value in values.items()]
                if seed == args.seeds[0] and name == list(runs)[-1]:
                    shown[step] = order[0]
    steps = sorted(shown)
    chosen = [
        steps[round(i * (len(steps) - 1) / max(1, min(SHOWN, len(steps)) - 1))] for i in range(min(SHOWN, len(steps)))
    ]
    labels = {name: run.label for name, run in runs.items()}
    write_csv(out.with_name(f"{out.name}.csv"), points)
    side = round(len(shown[steps[0]]) ** 0.5)
    picture(points, labels, {step: shown[step] for step in chosen}, side).savefig(out.with_name(f"{out.name}.png"))
    found = {name: {m: mean(curves(points, name, m)) for m in (AGREEMENT, SOLVED)} for name in runs}
    out.with_name(f"{out.name}.json").write_text(json.dumps({"seeds": args.seeds, **found}, indent=1) + "\n")
    for name, label in labels.items():
        line = "  ".join(f"{step:,}: {value:.2f}" for step, value in found[name][AGREEMENT].items())
        print(f"{label:<12} rank correlation with the final order  {line}")


if __name__ == "__main__":
    main()

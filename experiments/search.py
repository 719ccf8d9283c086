"""The search for the regime in which PUMA pays on 6x6 Sudoku: model, data, training, K; the baseline tuned as hard.

    python experiments/search.py --seeds 0

What is not named is as in configs/sudoku/small_{mdm,puma}.yaml, which are figure5.py's runs. With one seed this is a
screening: two runs that differ in the seed alone are several points apart.
"""

from dataclasses import replace

from _comparison import Comparison, Drawn, main, title
from _curves import curves
from _runs import Point
from _sudoku import RUNS, SOLVED
from matplotlib.axes import Axes

MODEL = "--model.init_args.backbone.init_args"
LR = "--model.init_args.optimizer.init_args.lr"
DATA = "--data.init_args"


def size(width: int, layers: int) -> tuple[str, ...]:
    """Flags of a backbone."""
    return (
        *(f"{MODEL}.hidden_size", str(width), f"{MODEL}.intermediate_size", str(3 * width)),
        *(f"{MODEL}.num_layers", str(layers)),
    )


BOTH: dict[str, tuple[str, ...]] = {
    "lr 1e-3": (LR, "1e-3"),
    "lr 4e-3": (LR, "4e-3"),
    "width 32": size(32, 2),
    "width 128, 4 layers, lr 1e-3": (*size(128, 4), LR, "1e-3"),
    "batch 16": (f"{DATA}.batch_size", "16"),
    "batch 128": (f"{DATA}.batch_size", "128"),
    "9 clues": (f"{DATA}.clues", "9"),
    "14 clues": (f"{DATA}.clues", "14"),
    "100,000 puzzles": (f"{DATA}.num_train", "100000"),
}
CPU = {name: RUNS["cpu"][name] for name in ("mdm", "puma_k6", "puma_k3")}
ROWS = {"figure 5": ("mdm", "puma_k6"), "K 3": ("mdm", "puma_k3")}  # the baseline and PUMA


def add(name: str, label: str, flags: tuple[str, ...]) -> str:
    """Return another run, which differs from a given one by some flags."""
    run = RUNS["cpu"][name]
    slug = f"{name}_{label}".replace(" ", "_").replace(",", "")
    CPU[slug] = replace(run, label=f"{run.label}, {label}", flags=flags)
    return slug


for what, changes in BOTH.items():
    ROWS[what] = (add("mdm", what, changes), add("puma_k6", what, changes))


def finals(metric: str) -> Drawn:
    """A panel: the final values of the two sides of every row, a dot for each seed."""

    def panel(axis: Axes, points: list[Point]) -> None:
        for side, (label, marker) in enumerate({"MDM": "o", "PUMA": "D"}.items()):
            dots = [
                (curve[max(curve)], row)
                for row, pair in enumerate(reversed(ROWS.values()))
                for curve in curves(points, pair[side], metric)
            ]
            axis.plot(*zip(*dots, strict=True), marker, color=f"C{side}", markersize=4, alpha=0.7, label=label)
        axis.set_yticks(range(len(ROWS)), list(reversed(ROWS)), fontsize=7)
        axis.set_title(title(metric), fontsize=9)
        axis.grid(alpha=0.3)

    return panel


if __name__ == "__main__":
    asked = Comparison(CPU, tuple(ROWS.values()), "val/solved/", tuple(finals(metric) for metric in SOLVED["cpu"]))
    main(__doc__, "search", "sudoku", {"cpu": asked})

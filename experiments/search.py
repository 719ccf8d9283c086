"""The search for the regime in which PUMA pays on 6x6 Sudoku: model, learning rate, K; the baseline tuned as hard.

    python experiments/search.py --seeds 0

What is not named is as in configs/sudoku/small_{mdm,puma}.yaml, which are figure5.py's runs. With one seed this is a
screening: two runs that differ in the seed alone are several points apart.
"""

from _comparison import Comparison, Drawn, main, title
from _curves import curves
from _runs import Point, Run
from _sudoku import RUNS, SOLVED
from matplotlib.axes import Axes

MODEL = "--model.init_args.backbone.init_args"
LR = "--model.init_args.optimizer.init_args.lr"


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
}
CPU = {name: RUNS["cpu"][name] for name in ("mdm", "puma_k6", "puma_k3")}


def add(name: str, label: str, flags: tuple[str, ...]) -> None:
    """Another run, as one that is there but for some flags."""
    run = RUNS["cpu"][name]
    slug = f"{name}_{label}".replace(" ", "_").replace(",", "")
    CPU[slug] = Run(f"{run.label}, {label}", run.config, flags)


for what, changes in BOTH.items():
    for side in ("mdm", "puma_k6"):
        add(side, what, changes)
PAIRS = tuple((name, name.replace("mdm", "puma_k6")) for name in CPU if name.startswith("mdm"))
PAIRS += (("mdm", "puma_k3"),)


def finals(metric: str) -> Drawn:
    """A panel: the final value of every run, a dot for each seed."""

    def panel(axis: Axes, points: list[Point]) -> None:
        for row, name in enumerate(reversed(CPU)):
            values = [curve[max(curve)] for curve in curves(points, name, metric)]
            axis.plot(values, [row] * len(values), "o", color="C0" if "mdm" in name else "C1", markersize=4)
        axis.set_yticks(range(len(CPU)), [CPU[name].label for name in reversed(CPU)], fontsize=6)
        axis.set_title(title(metric), fontsize=9)
        axis.grid(alpha=0.3)

    return panel


if __name__ == "__main__":
    asked = Comparison(CPU, PAIRS, "val/solved/", tuple(finals(metric) for metric in SOLVED["cpu"]))
    main(__doc__, "search", "sudoku", {"cpu": asked})

"""Figure 4: PUMA with and without a threshold in training, and trained models under several inference policies.

    python experiments/figure4.py                  # 6x6, few clues and puzzles, on a CPU
    python experiments/figure4.py --scale gpu --data.train_file train.csv.gz --data.val_file test.csv.gz

Runs that are done are skipped, an interrupted one is resumed.
"""

import statistics
from collections.abc import Callable
from dataclasses import replace

from _comparison import Comparison, main
from _curves import curves
from _runs import Point, Run
from _sudoku import EVERY_POLICY, RUNS, SOLVED, THRESHOLD, keep
from matplotlib.axes import Axes

PUMA = {"cpu": "puma_k6", "gpu": "puma"}
KEPT = {"cpu": keep(500), "gpu": keep(8000)}


def against_nfe(run: str, label: str) -> Callable[[Axes, list[Point]], None]:
    """A panel: solved against forward passes under every policy, mean and range over the seeds."""

    def panel(axis: Axes, points: list[Point]) -> None:
        lines: dict[str, dict[float, list[float]]] = {}
        for metric in sorted({p.metric for p in points if p.run == run and p.metric.startswith("val/solved/")}):
            name = metric.rsplit("/", 1)[1]
            line = "confidence, threshold" if "tau" in name else name.split("_")[0].replace("mo", "m o")
            nfe = statistics.mean(value for curve in curves(points, run, f"val/nfe/{name}") for value in curve.values())
            solved = [value for curve in curves(points, run, metric) for value in curve.values()]
            lines.setdefault(line, {})[nfe] = solved
        for line, found in lines.items():
            passes = sorted(found)
            (drawn,) = axis.plot(
                passes, [statistics.mean(found[n]) for n in passes], marker="o", markersize=3, label=line,
            )  # fmt: skip
            low, high = ([edge(found[n]) for n in passes] for edge in (min, max))
            axis.fill_between(passes, low, high, alpha=0.15, color=drawn.get_color())
        axis.set(xlabel="forward passes (NFE)", ylabel="solved", ylim=(0, 1), title=label)
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)

    return panel


def comparison(scale: str) -> Comparison:
    """Without and with a threshold in training; then all of them under every policy of ``policies.yaml``."""
    puma = PUMA[scale]
    plain = RUNS[scale][puma]
    trained = {"mdm": RUNS[scale]["mdm"], puma: plain}
    for tau in ("0.9",):
        trained[f"puma_tau{tau}"] = Run(f"{plain.label}, τ {tau}", plain.config, (THRESHOLD, tau, *KEPT[scale]))
    judged = {
        f"{name}_judged": replace(run, flags=(*run.flags, *EVERY_POLICY), start=name, command="validate")
        for name, run in trained.items()
    }
    solved = SOLVED[scale]
    return Comparison(
        {**trained, **judged},
        (("mdm", puma), *((puma, name) for name in trained if "tau" in name)),
        "val/solved/",
        (
            (solved[0], "steps"),
            (solved[-1], "steps"),
            ("chain/sequences", "steps"),
            *(against_nfe(f"{name}_judged", run.label) for name, run in trained.items()),
        ),
    )


if __name__ == "__main__":
    main(__doc__, "figure4", "sudoku", {scale: comparison(scale) for scale in RUNS})

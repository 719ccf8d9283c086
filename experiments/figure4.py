"""Figure 4: PUMA with and without a threshold in training, and every model under several inference policies.

    python experiments/figure4.py                  # 6x6, few clues and puzzles, on a CPU
    python experiments/figure4.py --scale gpu --data.train_file train.csv.gz --data.val_file test.csv.gz

Runs that are done are skipped, an interrupted one is resumed.
"""

import statistics
from dataclasses import replace

from _comparison import Comparison, Drawn, main
from _curves import curves
from _runs import Point, Run
from _sudoku import EVERY_POLICY, KEPT, PUMA, RUNS, SOLVED, THRESHOLD
from matplotlib.axes import Axes

LINES = {"confidence": "confidence", "margin": "margin", "entropy": "entropy", "randomorder": "random order"}


def against_nfe(run: str, label: str) -> Drawn:
    """A panel: solved against forward passes under every policy, mean and range over the seeds."""

    def finals(points: list[Point], metric: str) -> list[float]:
        return [value for curve in curves(points, run, metric) for value in curve.values()]

    def panel(axis: Axes, points: list[Point]) -> None:
        lines: dict[str, list[tuple[float, list[float]]]] = {}
        for metric in sorted({p.metric for p in points if p.run == run and p.metric.startswith("val/solved/")}):
            sampler, *other_set = metric.split("/")[2:]
            if other_set:
                continue
            line = "confidence, threshold" if "tau" in sampler else LINES[sampler.split("_")[0]]
            nfe = statistics.mean(finals(points, metric.replace("/solved/", "/nfe/")))
            lines.setdefault(line, []).append((nfe, finals(points, metric)))
        for place, (line, found) in enumerate(lines.items()):
            found.sort(key=lambda point: point[0])
            passes, solved = zip(*found, strict=True)
            axis.plot(passes, list(map(statistics.mean, solved)), marker="o", markersize=3, label=line)
            axis.fill_between(passes, list(map(min, solved)), list(map(max, solved)), alpha=0.15, color=f"C{place}")
        axis.set(xlabel="forward passes (NFE)", ylabel="solved", ylim=(0, 1))
        axis.set_title(label, fontsize=9)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)

    return panel


def comparison(scale: str) -> Comparison:
    """Without and with a threshold in training; then all of them under every policy of ``policies.yaml``."""
    puma, solved = PUMA[scale], SOLVED[scale]
    plain = RUNS[scale][puma]
    trained = {
        "mdm": RUNS[scale]["mdm"],
        puma: plain,
        "puma_tau0.9": Run(f"{plain.label}, τ 0.9", plain.config, (THRESHOLD, "0.9", *KEPT[scale])),
    }
    judged = {
        f"{name}_judged": replace(
            run, label=f"{run.label}, judged", flags=(*run.flags, *EVERY_POLICY), start=name, command="validate"
        )
        for name, run in trained.items()
    }
    return Comparison(
        {**trained, **judged},
        (("mdm", puma), ("mdm", "puma_tau0.9"), (puma, "puma_tau0.9")),
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

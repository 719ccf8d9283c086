"""Curves of finished runs side by side: held-out puzzles solved and validation loss over steps, as JSON and picture.

python benchmarks/sudoku_curves.py baseline=RUN_FOLDER puma=RUN_FOLDER
"""

import argparse
from pathlib import Path
from typing import Any

from _report import curves, environment, settings, write
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--out", type=Path, default=RESULTS / "sudoku_9x9.json")
    parser.add_argument("--note", default="")
    options = parser.parse_args()
    runs: dict[str, dict[str, Any]] = {}
    for run in options.runs:
        name, folder = run.split("=", 1)
        runs[name] = {"settings": settings(Path(folder)), "curves": curves(Path(folder))}
    write(options.out, {"note": options.note, **environment(), "runs": runs})

    panels = {
        "solved, easy": "val/solved/confidence_1",
        "solved, hard": "val/solved/confidence_1/test_hard",
        "loss, easy (nats/token)": "val/loss",
    }
    figure = Figure(figsize=(9, 2.8), dpi=120, layout="constrained")
    for axis, (title, metric) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name, run in runs.items():
            points = run["curves"][metric]
            axis.plot(list(points), list(points.values()), marker="o", markersize=3, label=name)
        axis.set(title=title, xlabel="optimizer steps", ylim=(0, None))
        axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()

"""Curves of finished runs side by side: held-out puzzles solved and validation loss over steps, as JSON and picture.

python benchmarks/sudoku_curves.py baseline=RUN_FOLDER puma=RUN_FOLDER
"""

import argparse
import csv
from pathlib import Path
from typing import Any

import yaml
from _report import environment, write
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"


def curves(folder: Path) -> dict[str, dict[int, float]]:
    """Every validation metric of a run by the optimizer step it was taken after."""
    found: dict[str, dict[int, float]] = {}
    for row in csv.DictReader((folder / "metrics.csv").open()):
        for name, value in row.items():
            if name.startswith("val/") and value:
                found.setdefault(name, {})[int(row["step"]) + 1] = float(value)
    return found


def settings(folder: Path) -> dict[str, object]:
    """What the run was, without the paths of the machine it ran on."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    data = config["data"]["init_args"]
    for name, value in data.items():
        if name.endswith("_file") and value:
            data[name] = [Path(path).name for path in ([value] if isinstance(value, str) else value)]
    data.pop("cache_dir", None)
    keys = ("max_steps", "gradient_clip_val")
    trainer = {key: config["trainer"][key] for key in keys}
    return {"seed": config["seed_everything"], "model": config["model"], "data": data, "trainer": trainer}


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

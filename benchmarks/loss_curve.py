"""The training loss of a finished run over steps, with what its validations found, as JSON and picture.

python benchmarks/loss_curve.py RUN_FOLDER --out benchmarks/results/tinygsm_small.json --note "the command of the run"
"""

import argparse
import csv
from pathlib import Path

from _report import curves, environment, settings, write
from matplotlib.figure import Figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--note", default="")
    options = parser.parse_args()
    with (options.folder / "metrics.csv").open() as file:
        training = {int(row["step"]) + 1: float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]}
    found = curves(options.folder)
    report = {"note": options.note, **environment(), "settings": settings(options.folder)}
    write(options.out, {**report, "train/loss": training, "validations": found})

    figure = Figure(figsize=(5, 3), dpi=130, layout="constrained")
    axis = figure.subplots()
    axis.plot(list(training), list(training.values()), label="training")
    axis.plot(list(found["val/loss"]), list(found["val/loss"].values()), "o", label="validation (NELBO)")
    axis.set(xlabel="optimizer steps", ylabel="loss (nats per token)", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()

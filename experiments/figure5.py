"""Figure 5: Sudoku, the baseline and PUMA: puzzles solved over steps and time, and how much sooner PUMA gets there.

    python experiments/figure5.py                  # 6x6, few clues and puzzles, on a CPU
    python experiments/figure5.py --scale gpu --data.train_file train.csv.gz --data.val_file test.csv.gz

Runs that are done are skipped, an interrupted one is resumed.
"""

import json
from pathlib import Path
from typing import Any

from _curves import Curve, curves, draw, mean, speed_up
from _runs import ROOT, Point, Run, collect, parser, train, write_csv
from _sudoku import SCALES
from matplotlib.figure import Figure

SOLVED = {
    "cpu": ("val/solved/confidence_1", "val/solved/confidence_3", "val/solved/confidence_6"),
    "gpu": ("val/solved/confidence_1", "val/solved/confidence_2", "val/solved/confidence_3"),
}


def report(points: list[Point], runs: dict[str, Run], metrics: tuple[str, ...]) -> dict[str, Any]:
    """Final values, and the speed-up of every other run over the baseline, for every metric."""
    found: dict[str, Any] = {}
    for metric in metrics:
        of = {name: curves(points, name, metric) for name in runs}
        baseline, *others = runs
        ends = {max(curve) for side in of.values() for curve in side}
        if len(ends) != 1:
            raise SystemExit(f"runs end at different steps, {sorted(ends)}: train them alike, or again")
        final = {name: [round(curve[max(curve)], 4) for curve in of[name]] for name in runs}
        found[metric] = {
            "final": final,
            "speed_up": {name: speed_up(of[baseline], of[name]) for name in others},
        }
    return found


def picture(points: list[Point], runs: dict[str, Run], metrics: tuple[str, ...]) -> Figure:
    """Solved over steps and over time, the loss, and the mismatch of masks."""
    figure = Figure(figsize=(10, 5.6), dpi=120, layout="constrained")
    panels: list[tuple[str, str]] = [(metric, "steps") for metric in metrics]
    panels += [(metrics[0], "seconds"), ("val/loss", "steps"), ("chain/mismatch", "steps")]
    for axis, (metric, over) in zip(figure.subplots(2, 3).flat, panels, strict=True):
        by_label: dict[str, list[Curve]] = {}
        for name, run in runs.items():
            of = curves(points, name, metric)
            if of and over == "seconds":
                # Steps take the seconds they took on average over the seeds.
                clock = mean(
                    [{p.step: p.seconds for p in points if (p.run, p.seed, p.metric) == (name, seed, metric)}
                     for seed in {p.seed for p in points if p.run == name}]
                )  # fmt: skip
                of = [{round(clock[step]): value for step, value in curve.items() if step in clock} for curve in of]
            if of:
                by_label[run.label] = of
        title = metric.removeprefix("val/").replace("solved/confidence_", "solved, cells a pass: ")
        draw(axis, by_label, "seconds" if over == "seconds" else "optimizer steps", title)
        axis.set_ylim(bottom=0)
    return figure


def main() -> None:
    """Run, collect, report."""
    args, flags = parser(__doc__, Path(__file__).stem).parse_known_args()
    runs, metrics = SCALES[args.scale], SOLVED[args.scale]
    name = f"figure5_{args.scale}"
    folder = args.folder or Path("runs/experiments") / f"sudoku_{args.scale}"
    out = args.out or ROOT / "experiments" / "results" / name
    train(runs, args.seeds, folder, args.jobs, args.threads, flags)
    points = collect(runs, args.seeds, folder)
    write_csv(out.with_name(f"{out.name}.csv"), points)
    found = report(points, runs, metrics)
    settings = {name: {"config": run.config, "flags": [*run.flags, *flags]} for name, run in runs.items()}
    out.with_name(f"{out.name}.json").write_text(
        json.dumps({"seeds": args.seeds, "runs": settings, **found}, indent=1) + "\n"
    )
    picture(points, runs, metrics).savefig(out.with_name(f"{out.name}.png"))
    for metric, values in found.items():
        print(f"\n{metric}")
        for name, run in runs.items():
            final = values["final"][name]
            line = f"  {run.label:<12} {sum(final) / len(final):6.1%} ({min(final):.1%} to {max(final):.1%})"
            if name in values["speed_up"]:
                sooner = values["speed_up"][name]
                if sooner["speed_up"] is None:
                    line += "   does not reach the baseline's final value"
                else:
                    line += f"   baseline's final value {sooner['speed_up']} times sooner, 95% {sooner['interval']}"
            print(line)


if __name__ == "__main__":
    main()

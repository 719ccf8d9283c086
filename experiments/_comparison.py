"""Several ways to train, side by side: run them, collect what they logged, say and draw how they differ."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _curves import Curve, curves, draw, mean, speed_up
from _runs import ROOT, Point, Run, collect, parser, train, write_csv
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# The curves of a metric over "steps" or "seconds", or what draws the points.
Panel = tuple[str, str] | Callable[[Axes, list[Point]], None]


@dataclass(frozen=True)
class Comparison:
    """What is run and what is asked.

    Attributes:
        runs: By name.
        pairs: Baseline and other: how much sooner the other is at the baseline's final value.
        measure: How the metrics begin that they are compared by; higher is better.
        panels: What to draw, side by side.
    """

    runs: dict[str, Run]
    pairs: tuple[tuple[str, str], ...]
    measure: str
    panels: tuple[Panel, ...]


def report(points: list[Point], asked: Comparison) -> dict[str, Any]:
    """Final values by seed, and the speed-up of every pair, for every measure.

    Raises:
        SystemExit: If runs that are compared end at different steps.
    """
    found: dict[str, Any] = {}
    for metric in sorted({point.metric for point in points if point.metric.startswith(asked.measure)}):
        of = {name: curves(points, name, metric) for name in asked.runs}
        of = {name: by_seed for name, by_seed in of.items() if by_seed}
        pairs = [pair for pair in asked.pairs if set(pair) <= set(of)]
        for pair in pairs:
            ends = {max(curve) for name in pair for curve in of[name]}
            if len(ends) != 1:
                raise SystemExit(f"{' and '.join(pair)} end at different steps, {sorted(ends)}: train them alike")
        found[metric] = {
            "final": {name: [round(curve[max(curve)], 4) for curve in by_seed] for name, by_seed in of.items()},
            "speed_up": {f"{two} over {one}": speed_up(of[one], of[two]) for one, two in pairs},
        }
    return found


def title(metric: str) -> str:
    """What the axis of a metric says."""
    return metric.removeprefix("val/").replace("solved/confidence_", "solved, cells a pass: ")


def picture(points: list[Point], asked: Comparison) -> Figure:
    """Every panel: mean and range over the seeds of all runs that have such a metric."""
    rows = -(-len(asked.panels) // 3)
    figure = Figure(figsize=(10, 2.8 * rows), dpi=120, layout="constrained")
    axes = list(figure.subplots(rows, 3, squeeze=False).flat)
    for axis in axes:
        axis.set_visible(False)
    for axis, panel in zip(axes, asked.panels, strict=False):
        axis.set_visible(True)
        if callable(panel):
            panel(axis, points)
            continue
        metric, over = panel
        by_label: dict[str, list[Curve]] = {}
        for name, run in asked.runs.items():
            of = curves(points, name, metric)
            if of and over == "seconds":
                # Steps take the seconds they took on average over the seeds.
                clock = mean(
                    [{p.step: p.seconds for p in points if (p.run, p.seed, p.metric) == (name, seed, metric)}
                     for seed in {p.seed for p in points if p.run == name}]
                )  # fmt: skip
                of = [{round(clock[step]): value for step, value in curve.items() if step in clock} for curve in of]
            by_label[run.label] = of
        draw(axis, by_label, "seconds" if over == "seconds" else "optimizer steps", title(metric))
        axis.set_ylim(bottom=0)
    return figure


def said(run: Run, values: dict[str, Any], name: str) -> str:
    """A line on a run: its final value, and how much sooner it is where others end."""
    final = values["final"][name]
    line = f"  {run.label:<24} {sum(final) / len(final):6.1%} ({min(final):.1%} to {max(final):.1%})"
    for pair, sooner in values["speed_up"].items():
        other, baseline = pair.split(" over ")
        if other == name and not sooner["level"]:
            line += f"   {baseline} gets nowhere"
        elif other == name and sooner["speed_up"] is None:
            line += f"   does not reach the final value of {baseline}"
        elif other == name:
            line += f"   at the final value of {baseline} {sooner['speed_up']} times sooner, 95% {sooner['interval']}"
    return line


def main(doc: str | None, name: str, folder_name: str, scales: dict[str, Comparison]) -> None:
    """Run, collect, report; the folder of the runs is by default ``runs/experiments/NAME_SCALE``."""
    args, flags = parser(doc, name, folder_name).parse_known_args()
    asked = scales[args.scale]
    folder = args.folder or Path("runs/experiments") / f"{folder_name}_{args.scale}"
    out = args.out or ROOT / "experiments" / "results" / f"{name}_{args.scale}"
    train(asked.runs, args.seeds, folder, args.jobs, args.threads, flags)
    points = collect(asked.runs, args.seeds, folder)
    write_csv(out.with_name(f"{out.name}.csv"), points)
    found = report(points, asked)
    write_json(out, asked.runs, args.seeds, flags, found)
    picture(points, asked).savefig(out.with_name(f"{out.name}.png"))
    for metric, values in found.items():
        print(f"\n{metric}")
        for name, run in asked.runs.items():
            if name in values["final"]:
                print(said(run, values, name))


def write_json(out: Path, runs: dict[str, Run], seeds: list[int], flags: list[str], found: dict[str, Any]) -> None:
    """What was found, with what was run."""
    settings = {name: {"config": run.config, "flags": [*run.flags, *flags]} for name, run in runs.items()}
    text = json.dumps({"seeds": seeds, "runs": settings, **found}, indent=1)
    out.with_name(f"{out.name}.json").write_text(text + "\n")

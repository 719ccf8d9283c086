"""Several ways to train, side by side: run them, collect what they logged, say and draw how they differ."""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from _curves import Curve, curves, draw, mean, speed_up
from _runs import Arguments, Point, Run, arguments, collect, train, write_csv
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Drawn = Callable[[Axes, list[Point]], None]
# How a metric begins, and "steps" or "seconds"; or what draws the points. Each run shows the first of its metrics that
# begins so, as samplers and sets may be named otherwise.
Panel = tuple[str, str] | Drawn


@dataclass(frozen=True)
class Comparison:
    """What is run and what is asked.

    Attributes:
        runs: By name. Curves are drawn of those that are fitted, under their labels, which must differ.
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
    name = metric.removeprefix("val/").replace("solved/confidence_", "solved, cells a pass: ")
    return name.replace("program_accuracy/", "programs right")


def by_seconds(points: list[Point], run: str, metric: str) -> list[Curve]:
    """The curves of a run over the seconds that its steps took on average over the seeds."""
    clocks: dict[int, Curve] = {}
    for point in points:
        if point.run == run and point.metric == metric:
            clocks.setdefault(point.seed, {})[point.step] = point.seconds
    clock = mean(list(clocks.values())) if clocks else {}
    of = curves(points, run, metric)
    return [{round(clock[step]): value for step, value in curve.items() if step in clock} for curve in of]


def picture(points: list[Point], asked: Comparison) -> Figure:
    """Every panel: mean and range over the seeds of all runs that have such a metric."""
    rows = -(-len(asked.panels) // 3)
    figure = Figure(figsize=(10, 2.8 * rows), dpi=120, layout="constrained")
    axes = list(figure.subplots(rows, 3, squeeze=False).flat)
    for axis, panel in zip(axes, asked.panels, strict=False):
        if callable(panel):
            panel(axis, points)
            continue
        begins, over = panel
        by_label: dict[str, list[Curve]] = {}
        for name, run in asked.runs.items():
            if run.command == "fit":
                metrics = sorted({p.metric for p in points if p.run == name and p.metric.startswith(begins)})
                of = by_seconds if over == "seconds" else curves
                by_label[run.label] = of(points, name, metrics[0]) if metrics else []
        draw(axis, by_label, "seconds" if over == "seconds" else "optimizer steps", title(begins))
        axis.set_ylim(bottom=0)
    for axis in axes[len(asked.panels) :]:
        axis.set_visible(False)
    legend(figure, axes)
    return figure


def legend(figure: Figure, axes: Iterable[Axes]) -> None:
    """One for all panels, below them; panels that have their own keep it."""
    lines = {
        line.get_label(): line
        for axis in axes
        if axis.get_legend() is None
        for line in axis.lines
        if not str(line.get_label()).startswith("_")
    }
    if lines:
        figure.legend(list(lines.values()), list(map(str, lines)), loc="outside lower center", ncols=5, fontsize=7)


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


def main(doc: str | None, name: str, folder: str, scales: dict[str, Comparison]) -> None:
    """Run, collect, report; the folder of the runs is by default ``runs/experiments/FOLDER_SCALE``."""
    args = arguments(doc, name, folder, scales)
    asked = scales[args.scale]
    train(asked.runs, args.seeds, args.folder, args.jobs, args.threads, args.flags)
    points = collect(asked.runs, args.seeds, args.folder)
    found = report(points, asked)
    write(args, asked.runs, points, found, {"": picture(points, asked)})
    for metric, values in found.items():
        print(f"\n{metric}")
        for run_name, run in asked.runs.items():
            if run_name in values["final"]:
                print(said(run, values, run_name))


def write(
    args: Arguments, runs: dict[str, Run], points: list[Point], found: dict[str, Any], figures: dict[str, Figure]
) -> None:
    """Points as CSV, what was found and what was run as JSON, pictures by what their names end in."""
    write_csv(args.out.with_name(f"{args.out.name}.csv"), points)
    # Only the names of files: their folders say nothing about the run.
    flags = [re.sub(r"[^,=\[\] ]*/", "", flag) for flag in args.flags]
    settings = {name: {"config": run.config, "flags": [*run.flags, *flags]} for name, run in runs.items()}
    text = json.dumps({"seeds": args.seeds, "runs": settings, **found}, indent=1)
    args.out.with_name(f"{args.out.name}.json").write_text(text + "\n")
    for ending, figure in figures.items():
        figure.savefig(args.out.with_name(f"{args.out.name}{ending}.png"))

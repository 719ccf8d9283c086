"""Which forward process should I use? A queue of runs, most informative first, and what came out so far.

    python experiments/regimes.py                      # 6x6, on a CPU; start it twice to use two cores
    python experiments/regimes.py --minutes 30         # stop in time; the same command goes on
    python experiments/regimes.py --scale gpu --data.train_file train.csv.gz --data.val_file "[easy.csv.gz,hard.csv.gz]"

All runs are made in one process, one after the other, each as ``puma fit`` would. Values are written after every
validation. Runs that are done, or that another process is at, are skipped; an interrupted one is resumed.
"""

import argparse
import json
import math
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _curves import Curve, difference, speed_up
from _runs import ROOT, Point, Run, claim, command, write_csv
from _watch import DONE, read_values
from filelock import FileLock, Timeout
from matplotlib.figure import Figure

from puma_lightning.cli import main as puma

FORWARD_PROCESS = "--model.init_args.forward_process"


def choose(name: str, **settings: Any) -> tuple[str, ...]:
    """The flag that chooses a forward process."""
    return (f"{FORWARD_PROCESS}={json.dumps({'class_path': name, 'init_args': settings})}",)


def puma_with(num_stages: int, **settings: Any) -> tuple[str, ...]:
    """The flag that chooses PUMA."""
    return choose("ProgressiveUnmasking", num_stages=num_stages, **settings)


@dataclass(frozen=True)
class Entry:
    """A part of the queue: runs that answer a question together, and their seeds."""

    question: str
    runs: dict[str, tuple[str, ...]]  # flags by name
    seeds: range


def queue(num_stages: int, batch_size: int, seeds: int) -> tuple[Entry, ...]:
    """The runs, most informative first.

    Args:
        num_stages: K, the paper's for this size of puzzle.
        batch_size: B, of which the pools are multiples.
        seeds: Of the runs that matter most; three of the others.
    """
    main = {
        "stratified": choose("RandomMasking", stratified=True),
        "random": choose("RandomMasking", stratified=False),
        "puma": puma_with(num_stages),
        "puma_t0.9": puma_with(num_stages, threshold=0.9),
        "pool_64b_t0.9": puma_with(num_stages, pool=64 * batch_size, threshold=0.9),
        "all_t0.9": puma_with(num_stages, pool="all", threshold=0.9),
    }
    controls = {
        # Without the threshold; spread over the run in the same way, but not aligned.
        "pool_64b": puma_with(num_stages, pool=64 * batch_size),
        "pool_64b_random_order": puma_with(num_stages, pool=64 * batch_size, policy="RandomOrder"),
        # Correlated as PUMA is, but not aligned.
        "puma_random_order": puma_with(num_stages, policy="RandomOrder"),
        "pool_256b_t0.9": puma_with(num_stages, pool=256 * batch_size, threshold=0.9),
        "pool_8b_t0.9": puma_with(num_stages, pool=8 * batch_size, threshold=0.9),
    }
    everything = {
        "all": puma_with(num_stages, pool="all"),
        "all_random_order": puma_with(num_stages, pool="all", policy="RandomOrder"),
        "all_unshuffled": (*puma_with(num_stages, pool="all"), "--data.class_path=_controls.UnshuffledSudoku"),
    }
    few = {
        f"{name}_n{number}": (*main[name], f"--data.init_args.num_train={number}")
        for number in (300, 2000)
        for name in ("stratified", "puma_t0.9", "all_t0.9")
    }
    stages = {
        **{f"pool_64b_t0.9_k{k}": puma_with(k, pool=64 * batch_size, threshold=0.9) for k in (3, 2 * num_stages)},
        **{f"puma_k{k}": puma_with(k) for k in (2, 3, 2 * num_stages)},
    }
    batches = {
        f"{name}_b{size}": (*flags, f"--data.init_args.batch_size={size}")
        for size in (batch_size // 4, 2 * batch_size)
        for name, flags in (
            ("stratified", main["stratified"]),
            ("pool_64b_t0.9", puma_with(num_stages, pool=64 * size, threshold=0.9)),
        )
    }
    others = {
        "complementary": choose("ComplementaryMasking"),
        "short_stays": choose("ShortStays", num_stages=num_stages, leaving=0.3, threshold=0.9),
        "self_aligned": choose("SelfAlignedMasking"),
        "mixed": choose("MixedMasking", num_stages=num_stages, random_share=0.5),
        "puma_k3_t0.9": puma_with(3, threshold=0.9),
    }
    first, more, three = range(min(3, seeds)), range(3, seeds), range(3)
    return (
        Entry("what wins?", main, first),
        Entry("what wins? more seeds", main, more),
        Entry("why?", controls, three),
        Entry("other processes", others, three),
        Entry("few puzzles, many epochs", few, three),
        Entry("K", stages, three),
        Entry("a chain for every sequence", everything, three),
        Entry("batches", batches, three),
    )


SCALES = {
    "cpu": ("experiments/regimes_cpu.yaml", queue(6, 32, 5)),
    "gpu": ("experiments/regimes_gpu.yaml", queue(8, 32, 3)),
}


def jobs(entries: tuple[Entry, ...], only: list[str] | None, seeds: list[int] | None) -> list[tuple[str, int]]:
    """Names and seeds in the order of the queue; seed by seed, so that what is done early can be compared."""
    found = [(name, seed) for entry in entries for seed in entry.seeds for name in entry.runs]
    if only:
        found = [job for job in found if job[0] in only]
    if seeds is not None:
        found = [job for job in found if job[1] in seeds]
    return list(dict.fromkeys(found))


def make(name: str, run: Run, seed: int, folder: Path, flags: list[str], deadline: float | None) -> bool:
    """Make a run, or go on with it, in this process; return whether it is whole."""
    target = folder / f"{name}_{seed}"
    try:
        with FileLock(target / "lock", timeout=0):
            if (target / DONE).exists():
                return True
            watch = "--trainer.callbacks"
            words = [f"{watch}+=_watch.Watch", f"{watch}.folder={target}"]
            words += [f"{watch}.deadline={deadline}"] if deadline is not None else []
            before = Path.cwd()
            os.chdir(target)
            try:
                puma([*command(name, run, seed, folder, flags), *words])
            finally:
                os.chdir(before)
    except Timeout:  # another process is at it
        return False
    return (target / DONE).exists()


def points(found: list[tuple[str, int]], folder: Path) -> list[Point]:
    """Every value so far, also of runs that are not whole."""
    return [
        Point(name, seed, step, seconds, metric, value)
        for name, seed in found
        for step, seconds, metric, value in read_values(folder / f"{name}_{seed}")
    ]


def baseline_of(name: str) -> str:
    """The run that a run is compared with, which has the same data and batches."""
    found = re.search(r"_[nb]\d+$", name)
    return "stratified" + (found.group() if found else "")


MEASURES = {
    "val/solved/confidence_1": "solved, 1 cell a pass",
    "val/solved/confidence_3": "solved, 3 cells a pass",
    "val/solved/confidence_6": "solved, 6 cells a pass",
    "val/loss": "probability of a token",  # exp(-NELBO), so that higher is better here too
}


def by_seed(points: list[Point], name: str, measure: str, steps: int) -> dict[int, Curve]:
    """The curves of whole runs."""
    found: dict[int, Curve] = {}
    for point in points:
        if point.run == name and point.metric == measure:
            value = math.exp(-point.value) if measure == "val/loss" else point.value
            found.setdefault(point.seed, {})[point.step] = value
    return {seed: curve for seed, curve in sorted(found.items()) if max(curve) >= steps}


def report(points: list[Point], names: list[str], steps: int) -> dict[str, Any]:
    """Compare each run with its baseline, over the seeds that both have: speed-up, difference, final values.

    Args:
        points: Every value.
        names: Of the runs.
        steps: Of a whole run.
    """
    found: dict[str, Any] = {}
    for measure, title in MEASURES.items():
        found[title] = {}
        for name in names:
            one, two = (by_seed(points, each, measure, steps) for each in (baseline_of(name), name))
            if not two:
                continue
            said: dict[str, Any] = {"final": {seed: round(curve[max(curve)], 4) for seed, curve in two.items()}}
            if common := sorted(set(one) & set(two)) if name != baseline_of(name) else []:
                sides = [one[seed] for seed in common], [two[seed] for seed in common]
                said |= {"seeds": common, **speed_up(*sides, paired=True), "final_difference": difference(*sides)}
            found[title][name] = said
    return found


def picture(found: dict[str, Any]) -> Figure:
    """How many times sooner each run is where its baseline ends, with intervals; at the left edge if it never is."""
    figure = Figure(figsize=(10, 1.2 + 0.24 * max(len(runs) for runs in found.values())), dpi=120, layout="constrained")
    axes = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    names = [name for name in next(iter(found.values())) if name != baseline_of(name)]
    for axis, (title, runs) in zip(axes, found.items(), strict=True):
        for place, name in enumerate(names):
            sooner = runs.get(name, {}).get("speed_up")
            interval = runs.get(name, {}).get("interval")
            wins, loses = (interval and interval[0] > 1), (interval and interval[1] < 1)
            color = "C2" if wins else "C3" if loses else "0.4"
            if interval:
                axis.plot(interval, [place, place], color=color, linewidth=2)
            axis.plot([sooner or 0], [place], "o" if sooner else "x", color=color, markersize=5)
        axis.axvline(1, color="0.7", linewidth=1, zorder=0)
        axis.set(title=title, yticks=range(len(names)), yticklabels=names, xlim=(-0.05, 2))
        axis.title.set_fontsize(9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3, axis="x")
    axes[0].invert_yaxis()
    figure.supxlabel("times sooner than random masks with stratified counts (95% intervals over seeds)", fontsize=9)
    return figure


def write(out: Path, found: list[tuple[str, int]], folder: Path, runs: dict[str, Run]) -> None:
    """Write all values, what they say, and a picture of it."""
    known = points(found, folder)
    write_csv(out.with_suffix(".csv"), known)
    ends = [point.step for point in known]
    if not ends:
        return
    names = list(dict.fromkeys(name for name, _ in found))
    said = report(known, names, max(ends))
    settings = {name: {"config": runs[name].config, "flags": runs[name].flags} for name in names}
    text = json.dumps({"steps": max(ends), "runs": settings, **said}, indent=1)
    out.with_suffix(".json").write_text(text + "\n")
    picture(said).savefig(out.with_suffix(".png"))


def main() -> None:
    """Make the runs of the queue that are not done, and write what is known after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Other flags, such as --trainer.max_steps 500, go to every run.",
    )  # fmt: skip
    parser.add_argument("--scale", choices=tuple(SCALES), default="cpu", help="gpu: the paper's 9x9 puzzles")
    parser.add_argument("--minutes", type=float, help="stop after so many")
    parser.add_argument("--only", nargs="+", help="names of runs; by default all")
    parser.add_argument("--seeds", type=int, nargs="+", help="by default those of the queue")
    parser.add_argument("--folder", type=Path, help="of the runs; default runs/experiments/regimes_SCALE")
    parser.add_argument("--threads", type=int, help="CPU threads; default what PyTorch chooses")
    parser.add_argument("--out", type=Path, help="of the results; default experiments/results")
    parser.add_argument("--report", action="store_true", help="make no run: write what is known")
    args, flags = parser.parse_known_args()
    if any(flag.split("=")[0] == "--seed_everything" for flag in flags):
        parser.error("--seed_everything would make all seeds the same run: give --seeds")
    deadline = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    if args.threads:
        torch.set_num_threads(args.threads)
    config, entries = SCALES[args.scale]
    folder = (args.folder or Path("runs/experiments") / f"regimes_{args.scale}").absolute()
    out = args.out or ROOT / "experiments" / "results"
    out.mkdir(parents=True, exist_ok=True)
    flags_of = {name: words for entry in entries for name, words in entry.runs.items()}
    if unknown := set(args.only or ()) - set(flags_of):
        parser.error(f"--only: expected names among {', '.join(flags_of)}, got {', '.join(sorted(unknown))}")
    runs = {name: Run(name, config, words) for name, words in flags_of.items()}
    todo = jobs(entries, args.only, args.seeds)
    for name, seed in todo:
        claim(folder / f"{name}_{seed}", runs[name], seed, flags, runs)
    results = out / f"regimes_{args.scale}"
    if args.report:
        write(results, todo, folder, runs)
        return
    for number, (name, seed) in enumerate(todo):
        if deadline is not None and time.monotonic() > deadline:
            break
        print(f"\n== {name}, seed {seed}: run {number + 1} of {len(todo)}", flush=True)
        make(name, runs[name], seed, folder, flags, deadline)
        write(results, todo, folder, runs)


if __name__ == "__main__":
    main()

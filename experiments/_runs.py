"""Runs of configs with seeds through the public command line: resumed if interrupted, skipped if done, collected."""

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
COLUMNS = ("run", "seed", "step", "seconds", "metric", "value")


@dataclass(frozen=True)
class Run:
    """One way to train.

    Attributes:
        label: Its name in tables and pictures.
        config: Relative to the root of the repository.
        flags: What is changed in it.
        start: The run, of the same seed, whose last checkpoint this one starts from, or validates.
        command: Of ``puma``.
    """

    label: str
    config: str
    flags: tuple[str, ...] = ()
    start: str | None = None
    command: Literal["fit", "validate"] = "fit"


@dataclass(frozen=True)
class Point:
    """A value logged: after so many optimizer steps, and seconds of the run."""

    run: str
    seed: int
    step: int
    seconds: float
    metric: str
    value: float


def parser(description: str | None, name: str, folder: str) -> argparse.ArgumentParser:
    """What every experiment can be told. What it does not know goes to ``puma fit``."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Other flags, such as --trainer.max_steps 500, go to every `puma fit`.",
    )  # fmt: skip
    parser.add_argument("--scale", choices=("cpu", "gpu"), default="cpu", help="gpu: the paper's settings")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, help=f"of the runs; default runs/experiments/{folder}_SCALE")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, help="CPU threads of each run; default what PyTorch chooses")
    parser.add_argument("--out", type=Path, help=f"default experiments/results/{name}_SCALE; .csv, .json and .png")
    return parser


def train(
    runs: dict[str, Run], seeds: list[int], folder: Path, jobs: int, threads: int | None, flags: list[str]
) -> None:
    """All runs that are not done, those first that others start from.

    Raises:
        SystemExit: If a run fails, or is there with other settings.
    """
    first = {name: run for name, run in runs.items() if run.start is None}
    later = {name: run for name, run in runs.items() if run.start is not None}
    for name, run in runs.items():
        for seed in seeds:
            _claim(folder / f"{name}_{seed}", run, seed, flags)
    with tqdm(total=len(runs) * len(seeds), desc="runs", unit="run") as progress:
        for some in (first, later):
            with ThreadPoolExecutor(jobs) as pool:
                # Seed by seed, so that what is done early is whole.
                waiting = [
                    pool.submit(_train, name, run, seed, folder, threads, flags)
                    for seed in seeds
                    for name, run in some.items()
                ]
                try:
                    for job in waiting:
                        job.result()
                        progress.update()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise


def _words(run: Run, seed: int, flags: list[str]) -> list[str]:
    return ["--config", run.config, "--seed_everything", str(seed), *run.flags, *flags]


def _claim(target: Path, run: Run, seed: int, flags: list[str]) -> None:
    """Say whose folder it is, or refuse it."""
    words = _words(run, seed, flags)
    configs = [ROOT / word for flag, word in pairwise(words) if flag == "--config" and (ROOT / word).exists()]
    made = hashlib.sha256(b"".join(config.read_bytes() for config in configs)).hexdigest()
    settings = json.dumps({"words": words, "start": run.start, "config_sha256": made}, indent=1)
    said = target / "settings.json"
    if said.exists() and said.read_text() != settings:
        raise SystemExit(f"{target} holds a run with other settings: give another --folder, or delete it")
    target.mkdir(parents=True, exist_ok=True)
    said.write_text(settings)


def _absolute(flag: str, of_root: bool = False) -> str:
    """Flags that name files, alone or in a list, as they are seen from the folder of the run."""
    if of_root:
        return str(ROOT / flag)
    inner = flag[1:-1].split(",") if flag.startswith("[") and flag.endswith("]") else [flag]
    if not all(Path(part.strip()).exists() for part in inner):
        return flag
    found = [str(Path(part.strip()).absolute()) for part in inner]
    return f"[{','.join(found)}]" if flag.startswith("[") else found[0]


def _train(name: str, run: Run, seed: int, folder: Path, threads: int | None, flags: list[str]) -> None:
    target = folder / f"{name}_{seed}"
    if (target / "done").exists():
        return
    words = _words(run, seed, flags)
    words = [_absolute(word, of_root=flag == "--config") for flag, word in pairwise(["", *words])]
    if run.start is not None:
        flag = "--ckpt_path" if run.command == "validate" else "--model.init_args.init_from"
        words += [flag, str(last_checkpoint(folder / f"{run.start}_{seed}").absolute())]
    if list(target.rglob("last.ckpt")):
        words += ["--ckpt_path", str(last_checkpoint(target).absolute())]
    environ = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    with (target / "log.txt").open("a") as log:
        command = [
            sys.executable,
            "-m",
            "puma_lightning",
            run.command,
            *words,
            "--trainer.enable_progress_bar",
            "false",
        ]
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environ, cwd=target).returncode
    if code:
        tail = "\n".join((target / "log.txt").read_text().splitlines()[-5:])
        raise SystemExit(f"{name}, seed {seed} failed, see {target / 'log.txt'}:\n{tail}")
    (target / "done").touch()


def last_checkpoint(folder: Path) -> Path:
    return max(folder.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime)


def collect(runs: dict[str, Run], seeds: list[int], folder: Path) -> list[Point]:
    """Every validation metric, and what is logged of chains, of all runs."""
    points = []
    for name in runs:
        for seed in seeds:
            found: dict[tuple[str, int], Point] = {}
            for events in sorted((folder / f"{name}_{seed}").rglob("events.out.tfevents.*"), key=_started):
                reader = EventAccumulator(str(events), size_guidance={"scalars": 0})
                reader.Reload()
                began = reader.FirstEventTimestamp()
                scalars = [(metric, event) for metric in reader.Tags()["scalars"] for event in reader.Scalars(metric)]
                first = min((event.step for _, event in scalars), default=0)
                # A resumed run goes on in a file of its own, from the last validation before it.
                before = max((point.seconds for point in found.values() if point.step <= first), default=0.0)
                for metric, event in scalars:
                    if metric.startswith(("val/", "chain/")):
                        step, seconds = event.step + 1, before + event.wall_time - began
                        found[metric, step] = Point(name, seed, step, round(seconds, 1), metric, event.value)
            ends = {metric: max(step for named, step in found if named == metric) for metric, _ in found}
            if last := max(ends.values(), default=0):
                missing = sorted(metric for metric, end in ends.items() if metric.startswith("val/") and end < last)
                if missing:
                    raise SystemExit(f"{name}, seed {seed}: step {last} was validated in part, without {missing}")
            points += [found[key] for key in sorted(found)]
    return points


def _started(events: Path) -> int:
    return int(events.name.split(".")[3])


def write_csv(path: Path, points: list[Point]) -> None:
    """Tidy: one value a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([getattr(point, column) for column in COLUMNS] for point in points)

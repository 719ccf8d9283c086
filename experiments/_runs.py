"""Runs of configs with seeds through the public command line: resumed if interrupted, skipped if done, collected."""

import argparse
import csv
import glob
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Literal

import torch
import yaml
from filelock import FileLock
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


class Arguments(argparse.Namespace):
    """What an experiment was told.

    Attributes:
        scale: ``cpu``, or ``gpu`` for the paper's settings.
        seeds: Of the runs.
        folder: Of the runs.
        jobs: Runs at a time.
        threads: CPU threads of each run; None for what PyTorch chooses.
        out: The results, without an ending.
        flags: For every run.
    """

    scale: str
    seeds: list[int]
    folder: Path
    jobs: int
    threads: int | None
    out: Path
    flags: list[str]


def arguments(description: str | None, name: str, folder: str, scales: Iterable[str]) -> Arguments:
    """Read the command line. What no experiment knows goes to every run.

    Raises:
        SystemExit: If something is out of place.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Other flags, such as --trainer.max_steps 500, go to every run.",
    )  # fmt: skip
    parser.add_argument("--scale", choices=tuple(scales), default="cpu", help="gpu: the paper's settings")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, help=f"of the runs; default runs/experiments/{folder}_SCALE")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, help="CPU threads of each run; default what PyTorch chooses")
    parser.add_argument("--out", type=Path, help=f"default experiments/results/{name}_SCALE; .csv, .json and .png")
    args, flags = parser.parse_known_args(namespace=Arguments())
    args.flags = flags
    if any(flag.split("=")[0] == "--seed_everything" for flag in args.flags):
        parser.error("--seed_everything would make all seeds the same run: give --seeds")
    args.folder = args.folder or Path("runs/experiments") / f"{folder}_{args.scale}"
    args.out = args.out or ROOT / "experiments" / "results" / f"{name}_{args.scale}"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    return args


def train(
    runs: dict[str, Run], seeds: list[int], folder: Path, jobs: int, threads: int | None, flags: list[str]
) -> None:
    """Do all runs that are not done, those first that others start from.

    Raises:
        SystemExit: If a run fails, or is there with other settings.
    """

    def depth(run: Run) -> int:
        return 0 if run.start is None else 1 + depth(runs[run.start])

    depths = sorted({depth(run) for run in runs.values()})
    for name, run in runs.items():
        for seed in seeds:
            claim(folder / f"{name}_{seed}", run, seed, flags, runs)
    with tqdm(total=len(runs) * len(seeds), desc="runs", unit="run") as progress:
        for level in depths:
            with ThreadPoolExecutor(jobs) as pool:
                # Seed by seed, so that what is done early is whole.
                waiting = [
                    pool.submit(_train, name, run, seed, folder, threads, flags)
                    for seed in seeds
                    for name, run in runs.items()
                    if depth(run) == level
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


def _settings(run: Run, seed: int, flags: list[str], runs: dict[str, Run]) -> dict[str, Any]:
    """All that a run depends on, also through the run that it starts from."""
    words = _words(run, seed, flags)
    configs = [_config(word) for flag, word in pairwise(words) if flag == "--config"]
    for config in configs:
        if not config.is_file():
            raise SystemExit(f"expected a config at {config}, found none")
    made = hashlib.sha256(json.dumps([read_config(config) for config in configs]).encode()).hexdigest()
    start = None if run.start is None else _settings(runs[run.start], seed, flags, runs)
    return {"words": words, "start": start, "config_sha256": made}


def _config(word: str) -> Path:
    """As seen from here, or relative to the root of the repository as in ``Run``."""
    return Path(word).absolute() if Path(word).is_file() else ROOT / word


def read_config(path: Path) -> Any:
    """Read a config, with the parts that it names, which are files next to it."""

    def whole(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: whole(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [whole(inner) for inner in value]
        named = isinstance(value, str) and value.endswith(".yaml") and (path.parent / value).is_file()
        return read_config(path.parent / value) if named else value

    content = yaml.safe_load(path.read_text())
    return whole(content) if isinstance(content, dict) else content


def claim(target: Path, run: Run, seed: int, flags: list[str], runs: dict[str, Run]) -> None:
    """Say whose folder it is, or refuse it."""
    settings = json.dumps(_settings(run, seed, flags, runs), indent=1)
    said = target / "settings.json"
    if said.exists() and said.read_text() != settings:
        raise SystemExit(f"{target} holds a run with other settings: give another --folder, or delete it")
    if not said.exists():
        target.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("w", dir=target, delete=False) as whole:
            whole.write(settings)
        os.replace(whole.name, said)  # at once: another experiment may look at it


def _absolute(word: str) -> str:
    """Words that name files, alone, in a list or by a pattern, as they are seen from the folder of the run."""
    if word.startswith("--"):
        flag, equals, value = word.partition("=")
        return flag + equals + (_absolute(value) if value else "")
    inner = [part.strip() for part in (word[1:-1].split(",") if word.startswith("[") else [word])]
    if not all(Path(part).exists() or glob.glob(part) for part in inner):
        return word
    found = [str(Path(part).absolute()) for part in inner]
    return f"[{','.join(found)}]" if word.startswith("[") else found[0]


def _train(name: str, run: Run, seed: int, folder: Path, threads: int | None, flags: list[str]) -> None:
    target = folder / f"{name}_{seed}"
    # Experiments share runs; of two at the same time the second waits, and finds it done.
    with FileLock(target / "lock"):
        if (target / "done").exists():
            return
        words = [*command(name, run, seed, folder, flags), "--trainer.enable_progress_bar", "false"]
        words = [sys.executable, "-m", "puma_lightning", *words]
        environ = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        with (target / "log.txt").open("a") as log:
            code = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, env=environ, cwd=target).returncode
        if code:
            tail = "\n".join((target / "log.txt").read_text().splitlines()[-5:])
            raise SystemExit(f"{name}, seed {seed} failed, see {target / 'log.txt'}:\n{tail}")
        (target / "done").touch()


def command(name: str, run: Run, seed: int, folder: Path, flags: list[str]) -> list[str]:
    """The words after ``puma`` that make a run, or go on with it, from within its folder."""
    target = folder / f"{name}_{seed}"
    words = _words(run, seed, flags)
    words = [str(_config(word)) if flag == "--config" else _absolute(word) for flag, word in pairwise(["", *words])]
    if run.start is not None:
        flag = "--ckpt_path" if run.command == "validate" else "--model.init_args.init_from"
        words += [flag, str(last_checkpoint(folder / f"{run.start}_{seed}").absolute())]
    if list(target.rglob("last.ckpt")):
        words += ["--ckpt_path", str(last_checkpoint(target).absolute())]
    return [run.command, *words]


def last_checkpoint(folder: Path) -> Path:
    """The newest ``last.ckpt`` in the folder of a run."""
    return max(folder.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime)


def collect(runs: dict[str, Run], seeds: list[int], folder: Path) -> list[Point]:
    """Every validation metric, and what is logged of chains, of all runs.

    Raises:
        SystemExit: If a run is not whole: its last step is missing, or was validated in part.
    """
    return [
        point
        for name, run in runs.items()
        for seed in seeds
        for point in _points(name, seed, folder / f"{name}_{seed}", run.command)
    ]


def _points(name: str, seed: int, target: Path, command: str) -> list[Point]:
    found: dict[tuple[str, int], Point] = {}
    clock = [(0, 0.0)]  # optimizer steps and the seconds they took
    for events in sorted(target.rglob("events.out.tfevents.*"), key=_started):
        reader = EventAccumulator(str(events), size_guidance={"scalars": 0})
        reader.Reload()
        began = reader.FirstEventTimestamp()
        scalars = [(metric, event) for metric in reader.Tags()["scalars"] for event in reader.Scalars(metric)]
        first = min((event.step for _, event in scalars), default=0)
        # A resumed run goes on in a file of its own; what it does again does not count twice.
        before = max(seconds for step, seconds in clock if step <= first)
        for metric, event in scalars:
            step, seconds = event.step + 1, before + event.wall_time - began
            clock.append((step, seconds))
            if metric.startswith(("val/", "chain/")):
                found[metric, step] = Point(name, seed, step, round(seconds, 1), metric, event.value)
    ends = {metric: max(step for named, step in found if named == metric) for metric, _ in found}
    last = max(ends.values(), default=0)
    missing = sorted(metric for metric, end in ends.items() if metric.startswith("val/") and end < last)
    wanted = _steps(target) if command == "fit" else 1
    if missing or last < wanted:
        raise SystemExit(
            f"{target}: step {wanted} was not validated, or without {missing or 'anything'}; the run was interrupted. "
            "Delete the folder and run again"
        )
    return [found[key] for key in sorted(found)]


def _steps(target: Path) -> int:
    """Optimizer steps of a run: of its last checkpoint, or what its config asks for, as it may have been stopped."""
    config = yaml.safe_load(next(target.rglob("config.yaml")).read_text())
    done: int = torch.load(last_checkpoint(target), "cpu", weights_only=True, mmap=True)["global_step"]
    asked: int = config["trainer"]["max_steps"]
    return max(done, asked)


def _started(events: Path) -> int:
    return int(events.name.split(".")[3])


def write_csv(path: Path, points: list[Point]) -> None:
    """Tidy: one value a line."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([getattr(point, column) for column in COLUMNS] for point in points)

"""Programs right over steps on the built-in word problems: several ways to train one model, several seeds.

python benchmarks/words.py                      # 15 runs, two at a time; runs that are finished are not repeated
python benchmarks/words.py --names mdm_from_ar block_mdm_from_ar block_puma_from_ar block_curriculum_from_ar
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from _report import command_line, curves, environment, settings, write
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
NAMES = {
    "ar": "autoregressive",
    "mdm": "MDM",
    "puma": "PUMA",
    "mdm_from_ar": "AR → MDM",
    "puma_from_ar": "AR → PUMA",
    "block_mdm": "block MDM",
    "block_puma": "block PUMA",
    "block_curriculum": "block PUMA 4→16→96",
    "block_mdm_from_ar": "AR → block MDM",
    "block_puma_from_ar": "AR → block PUMA",
    "block_curriculum_from_ar": "AR → block PUMA 4→16→96",
}
FIVE = ["ar", "mdm", "puma", "mdm_from_ar", "puma_from_ar"]


def config_of(name: str) -> Path:
    """The config of a way to train; one from an autoregressive model may be another's, with other weights to start."""
    config = ROOT / "configs" / "words" / f"{name}.yaml"
    return config if config.exists() else config.with_name(f"{name.removesuffix('_from_ar')}.yaml")


def run_folder(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{name}_{seed}" / "runs" / "words" / config_of(name).stem / "version_0"


def train(name: str, seed: int, folder: Path, ar_folder: Path, threads: int, flags: list[str]) -> None:
    """One run through the public command line, unless it is there."""
    target = folder / f"{name}_{seed}"
    if (target / "done").exists():
        return
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    command = [sys.executable, "-m", "puma_lightning", "fit", "--config", str(config_of(name))]
    command += ["--seed_everything", str(seed)]
    if name.endswith("from_ar"):
        start = run_folder(ar_folder, "ar", seed) / "checkpoints" / "last.ckpt"
        command += ["--model.init_args.init_from", str(start.absolute()), "--model.init_args.shifted", "true"]
    command += ["--trainer.enable_progress_bar", "false", *flags]
    print(f"{name}, seed {seed}", flush=True)
    with (target / "log.txt").open("w") as log:
        environ = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env=environ, cwd=target)
    (target / "done").touch()


def accuracy(folder: Path) -> dict[int, float]:
    """The share of right programs by optimizer step."""
    (metric,) = (name for name in curves(folder) if name.startswith("val/program_accuracy/"))
    return curves(folder)[metric]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--names", nargs="+", choices=list(NAMES), default=FIVE)
    parser.add_argument("--folder", type=Path, default=Path("runs/words_seeds"))
    parser.add_argument(
        "--ar_folder", type=Path, help="where the autoregressive runs to start from are; default: FOLDER"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "words.json")
    options, flags = parser.parse_known_args()

    ar_folder = options.ar_folder or options.folder
    starting = [name for name in options.names if name.endswith("from_ar")]
    first = [name for name in options.names if name not in starting]
    if starting and "ar" not in first and options.ar_folder is None:
        first = ["ar", *first]
    for names in (first, starting):
        with ThreadPoolExecutor(options.jobs) as pool:
            jobs = [
                pool.submit(train, name, seed, options.folder, ar_folder, options.threads, flags)
                for seed in options.seeds
                for name in names
            ]
            for job in jobs:
                job.result()

    runs: dict[str, Any] = {}
    for name in options.names:
        folders = {seed: run_folder(options.folder, name, seed) for seed in options.seeds}
        runs[name] = {
            "settings": settings(folders[options.seeds[0]]),
            "seeds": {seed: curves(folder) for seed, folder in folders.items()},
        }
    write(options.out, {"command": command_line(), **environment(), "runs": runs})

    figure = Figure(figsize=(6, 3.6), dpi=130, layout="constrained")
    axis = figure.subplots()
    for name in options.names:
        by_seed = [accuracy(run_folder(options.folder, name, seed)) for seed in options.seeds]
        steps = sorted(by_seed[0])
        columns = [[seed[step] for seed in by_seed] for step in steps]
        (line,) = axis.plot(steps, [statistics.mean(c) for c in columns], marker="o", markersize=3, label=NAMES[name])
        axis.fill_between(steps, list(map(min, columns)), list(map(max, columns)), alpha=0.15, color=line.get_color())
        cells = [f"{statistics.mean(c):6.1%} ({min(c):.1%} to {max(c):.1%})" for c in columns]
        print(f"{NAMES[name]:<24}" + "  ".join(f"{step:>6}: {cell}" for step, cell in zip(steps, cells, strict=True)))
    axis.set(xlabel="optimizer steps", ylabel="programs right", ylim=(0, 1))
    axis.set_title("Built-in word problems, mean and range of the seeds", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="best")
    figure.savefig(options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()

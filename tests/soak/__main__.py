"""``python -m tests.soak --minutes 10``: random runs, killed at random, compared with what they should have been."""

import argparse
import json
import os
import random
import sys
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from tests.soak.configs import DATA, NUMBERED, random_config
from tests.soak.kills import WAYS, clean, trial
from tests.soak.run import prepare


def main() -> int:
    """Run trials until the time is over; return 1 if one went wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="how long to go on")
    parser.add_argument("--trials", type=int, default=None, help="how many trials at most")
    parser.add_argument("--jobs", type=int, default=2, help="trials at the same time")
    parser.add_argument("--seed", type=int, default=0, help="the first trial's seed; the others count on from there")
    parser.add_argument(
        "--processes", type=int, default=None, help="of each run but those of numbered data; 1 or 2 at random"
    )
    parser.add_argument("--data", choices=(*DATA, *NUMBERED), default=None, help="what runs train on; at random")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="how runs are stopped")
    parser.add_argument("--folder", type=Path, default=None, help="where trials are kept that went wrong")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "results.jsonl"
    warnings.filterwarnings("ignore")

    if not os.fork():
        prepare(folder / "shared")  # in a process of its own: this one must start no threads before it forks
        os._exit(0)
    if os.wait()[1]:
        return 1
    end = time.monotonic() + 60 * arguments.minutes
    for job in range(arguments.jobs):
        if not os.fork():
            seed = arguments.seed + job
            last = None if arguments.trials is None else arguments.seed + arguments.trials
            while time.monotonic() < end and (last is None or seed < last):
                _one(seed, folder, results, arguments)
                seed += arguments.jobs
            os._exit(0)
    whole = _watch(results, end, arguments)
    return _summarise(results, folder) or int(not whole)


def _one(seed: int, folder: Path, results: Path, arguments: argparse.Namespace) -> None:
    rng = random.Random(seed)
    config = random_config(rng, arguments.processes, arguments.data)
    where = folder / f"trial-{seed}"
    outcome = trial(config, rng, where, folder / "shared", ways=tuple(arguments.ways))
    line = json.dumps({"seed": seed, **asdict(outcome)}) + "\n"
    with results.open("a") as file:
        file.write(line)
    if not outcome.unlike and not outcome.wrong:
        clean(where)


def _watch(results: Path, end: float, arguments: argparse.Namespace) -> bool:
    """Show how far the jobs are until they end, and return whether they ended well."""
    whole = True
    with tqdm(total=arguments.trials, desc="Trials") as bar:
        jobs = arguments.jobs
        while jobs:
            job, status = os.waitpid(-1, os.WNOHANG)
            if job:
                jobs, whole = jobs - 1, whole and status == 0
            time.sleep(0.2)
            bar.n = len(results.read_text().splitlines()) if results.exists() else 0
            bar.set_postfix_str(f"{max(0.0, end - time.monotonic()) / 60:.1f} min left")
    return whole


def _summarise(results: Path, folder: Path) -> int:
    trials = [json.loads(line) for line in results.read_text().splitlines()]
    kills = [kill for each in trials for kill in each["kills"] if not kill.endswith("too late")]
    unlike = [each for each in trials if each["unlike"]]
    wrong = [each for each in trials if each["wrong"]]
    numbered = [each for each in trials if each["config"]["data"] in NUMBERED and not each["unlike"]]
    whole = sum(each["passes"] > 0 for each in numbered)
    two = sum(each["config"]["processes"] > 1 for each in trials)
    print(f"{len(trials)} runs, {two} of them in two processes, stopped {len(kills)} times")
    ways = sorted({kill.split(":")[0] for kill in kills})
    print("  " + ", ".join(f"{way}: {sum(kill.startswith(way + ':') for kill in kills)}" for way in ways))
    damaged = [sum(each["damaged"].get(name, 0) for each in trials) for name in ("refused", "harmless")]
    print(f"  {damaged[0]} damaged checkpoints refused, {damaged[1]} in which nothing that is read had changed")
    print(
        f"  {len(trials) - len(unlike)} of {len(trials)} computed what they should have: what the run left alone did;"
    )
    print(f"    or, in {len(numbered)}, in other numbers of processes, no sequence of a pass twice ({whole}: or never)")
    print(f"  {len(trials) - len(wrong)} of {len(trials)} ended when and as they should")
    for each in [*unlike, *(each for each in wrong if each not in unlike)]:
        print(f"seed {each['seed']}, see {folder}/trial-{each['seed']}: {[*each['wrong'], *each['unlike'][:2]]}")
    return int(bool(unlike or wrong))


if __name__ == "__main__":
    sys.exit(main())

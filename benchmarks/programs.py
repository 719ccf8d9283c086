"""How many programs are checked in a second. See benchmarks/README.md."""

import argparse
import json
import statistics
import time
from pathlib import Path

import _report
from tqdm import tqdm

from puma_lightning.programs import parse_number, run_programs, same_number
from puma_lightning.programs.runner import default_workers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=Path, required=True, help="JSON lines with code and answer")
    parser.add_argument("--count", type=int, default=1319, help="programs a run, as many as GSM8K's test set has")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=default_workers())
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/programs.json"))
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.programs.read_text().splitlines()[: args.count]]
    codes = [row["code"] for row in rows]
    seconds, right = [], 0
    for _ in tqdm(range(args.runs), "runs", unit="run"):
        start = time.perf_counter()
        runs = run_programs(codes, workers=args.workers)
        seconds.append(time.perf_counter() - start)
        pairs = zip(runs, rows, strict=True)
        right = sum(same_number(run.result, parse_number(row["answer"])) for run, row in pairs)
    rates = [len(rows) / second for second in seconds]
    report = {
        "command": _report.command_line(),
        "environment": _report.environment(),
        "programs": len(rows),
        "workers": args.workers,
        "right": right,
        "seconds": [round(second, 3) for second in seconds],
        "programs_per_second": {
            "median": round(statistics.median(rates), 1),
            "min": round(min(rates), 1),
            "max": round(max(rates), 1),
        },
    }
    _report.write(args.out, report)
    print(f"{len(rows)} programs, {right} right, {args.workers} workers: {statistics.median(seconds):.2f} s")
    print("programs a second:", report["programs_per_second"])


if __name__ == "__main__":
    main()

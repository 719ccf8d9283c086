"""Rows a second, and memory, of preparing TinyGSM: reading, tokenising and caching rows of GSM8K with other numbers.

    python benchmarks/tokenise.py --rows 10000 1000000

Every number of rows is prepared by a process of its own, whose peak memory is that of the whole preparation.
"""

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _report import command_line, environment, write

SHARED = Path(__file__).parents[1] / ".." / "shared"
RESULTS = Path(__file__).parent / "results" / "tokenise.json"
COLUMNS = ("question", "code")
NUM_VAL = 100
PREPARE = "import sys, tokenise; tokenise.prepare(*sys.argv[1:])"


def make_rows(source: Path, target: Path, number: int) -> None:
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    rng = random.Random(0)
    with target.open("w") as file:
        for _ in range(number):
            row = rng.choice(rows)
            digits = {name: re.sub(r"\d", lambda _: rng.choice("0123456789"), row[name]) for name in COLUMNS}
            file.write(json.dumps(digits) + "\n")


def prepare(file: str, tokenizer: str, folder: str) -> None:
    from puma_lightning.data.word_problems.tinygsm import TinyGSMDataModule

    data = TinyGSMDataModule(train_file=file, gsm8k_file=None, tokenizer=tokenizer, num_val=NUM_VAL, cache_dir=folder)
    loading = time.perf_counter()
    data._loaded_rows("train")
    start, busy = time.perf_counter(), time.process_time()
    data.prepare_data()
    data.setup("fit")
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    rows = len(data.train_dataloader().dataset) + NUM_VAL
    tokens = sum(int((batch["input_ids"] != data.eos_id).sum()) for batch in data.val_dataloader())
    usage = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    report = {
        "seconds_to_load": round(start - loading, 1),
        "seconds_to_tokenise": round(seconds, 1),
        "rows_per_second": round(rows / seconds),
        "rows_per_core_second": round(rows / busy),
        "tokens_per_row": round(tokens / NUM_VAL),
        "peak_rss_mb": round(usage[0] / 1024),
        "peak_rss_of_children_mb": round(usage[1] / 1024),
    }
    print(json.dumps(report))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--source", type=Path, default=SHARED / "data/gsm8k/train_programs.jsonl")
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "tokenizers/gpt2")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    runs = {}
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.jsonl"
            make_rows(args.source, file, rows)
            words = [sys.executable, "-c", PREPARE, str(file), str(args.tokenizer.resolve()), folder]
            run = subprocess.run(words, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True, check=True)
            runs[f"{rows}"] = json.loads(run.stdout.splitlines()[-1])
        print(f"{rows:,} rows:", runs[f"{rows}"], flush=True)
    peaks = [run["peak_rss_mb"] + run["peak_rss_of_children_mb"] for run in runs.values()]
    report = {
        "command": command_line(),
        "environment": {**environment(), "cores": os.cpu_count()},
        "tokenizer": args.tokenizer.name,
        "runs_by_rows": runs,
        "peak_rss_growth_mb": peaks[-1] - peaks[0],
    }
    write(args.output, report)


if __name__ == "__main__":
    main()

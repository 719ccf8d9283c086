"""Figure 5: Sudoku, the baseline and PUMA: puzzles solved over steps and time, and how much sooner PUMA gets there.

    python experiments/figure5.py                  # 6x6, few clues and puzzles, on a CPU
    python experiments/figure5.py --scale gpu --data.train_file train.csv.gz --data.val_file test.csv.gz

Runs that are done are skipped, an interrupted one is resumed.
"""

from _comparison import Comparison, main
from _sudoku import RUNS, SOLVED

PAIRS = {"cpu": (("mdm", "puma_k6"), ("mdm", "puma_k3")), "gpu": (("mdm", "puma"),)}
SCALES = {
    scale: Comparison(
        runs,
        PAIRS[scale],
        "val/solved/",
        (
            *((metric, "steps") for metric in SOLVED[scale]),
            (SOLVED[scale][0], "seconds"),
            ("val/loss", "steps"),
            ("chain/mismatch", "steps"),
        ),
    )
    for scale, runs in RUNS.items()
}

if __name__ == "__main__":
    main(__doc__, "figure5", "sudoku", SCALES)

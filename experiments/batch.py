"""Is it the number of distinct puzzles in a step that PUMA lacks? The baseline and PUMA on 6x6 with a larger batch.

    python experiments/batch.py

In every step PUMA takes fresh sequences for a K-th of the batch, the baseline for all of it. What is not named is as in
figure5.py.
"""

from _comparison import Comparison, main
from _sudoku import SOLVED
from search import CPU as SEARCHED

PAIRS = (("mdm", "puma_k6"), ("mdm_batch_128", "puma_k6_batch_128"))
CPU = {name: SEARCHED[name] for pair in PAIRS for name in pair}
SCALES = {
    "cpu": Comparison(
        CPU,
        PAIRS,
        "val/solved/",
        (
            *((metric, "steps") for metric in SOLVED["cpu"]),
            ("val/loss", "steps"),
            ("chain/mismatch", "steps"),
            ("chain/sequences", "steps"),
        ),
    )
}

if __name__ == "__main__":
    main(__doc__, "batch", "sudoku", SCALES)

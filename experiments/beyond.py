"""Beyond the paper: random masks mixed into PUMA or annealed to it, and SAT-Mask as a rival.

    python experiments/beyond.py

The baseline and PUMA are figure5.py's.
"""

from _comparison import Comparison, main
from _runs import Run
from _sudoku import RUNS, SOLVED, STAGES

ANNEALED = "[[0, 1], [500, 2], [1000, 3], [1500, 6]]"  # with K 1 PUMA is random masking
CPU = {
    "mdm": RUNS["cpu"]["mdm"],
    "puma_k6": RUNS["cpu"]["puma_k6"],
    "puma_annealed": Run("PUMA, K 1 to 6", "configs/sudoku/small_puma.yaml", (STAGES, ANNEALED)),
    "mixed": Run("PUMA, half random", "configs/sudoku/small_mixed.yaml"),
    "self_aligned": Run("SAT-Mask", "configs/sudoku/small_self_aligned.yaml"),
}

OTHERS = tuple(name for name in CPU if name != "mdm")
SCALES = {
    "cpu": Comparison(
        CPU,
        (*(("mdm", name) for name in OTHERS), *(("puma_k6", name) for name in OTHERS if name != "puma_k6")),
        "val/solved/",
        (*((metric, "steps") for metric in SOLVED["cpu"]), ("chain/mismatch", "steps"), ("chain/sequences", "steps")),
    )
}

if __name__ == "__main__":
    main(__doc__, "beyond", "sudoku", SCALES)

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

if __name__ == "__main__":
    others = [name for name in CPU if name != "mdm"]
    pairs = (*(("mdm", name) for name in others), *(("puma_k6", name) for name in others if name != "puma_k6"))
    panels = (
        *((metric, "steps") for metric in SOLVED["cpu"]),
        ("chain/mismatch", "steps"),
        ("chain/sequences", "steps"),
    )
    main(__doc__, "beyond", "sudoku", {"cpu": Comparison(CPU, pairs, "val/solved/", panels)})

"""9x9 Sudoku on a CPU: the baseline and PUMA with a smaller model, over far fewer steps, than the paper's.

    python experiments/sudoku_9x9.py --data.train_file train.csv.gz --data.val_file "[easy.csv.gz,hard.csv.gz]"

Without files the puzzles are built-in ones. The paper's own setting is ``figure5.py --scale gpu``.
"""

from _comparison import Comparison, main
from _runs import Run

SMALL = ("--config", "experiments/sudoku_9x9.yaml")
CPU = {
    "mdm": Run("MDM", "configs/sudoku/mdm.yaml", SMALL),
    "puma": Run("PUMA, K 8", "configs/sudoku/puma.yaml", SMALL),
}
SOLVED = ("val/solved/confidence_1", "val/solved/confidence_4")
SCALES = {
    "cpu": Comparison(
        CPU,
        (("mdm", "puma"),),
        "val/solved/",
        (
            *((metric, "steps") for metric in SOLVED),
            (SOLVED[0], "seconds"),
            ("val/cells/confidence_1", "steps"),
            ("val/loss", "steps"),
            ("chain/mismatch", "steps"),
        ),
    )
}

if __name__ == "__main__":
    main(__doc__, "sudoku_9x9", "sudoku_9x9", SCALES)

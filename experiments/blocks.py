"""Block diffusion, with random masks and with PUMA in every block, from an autoregressive model.

    python experiments/blocks.py                   # the built-in word problems, on a CPU
    python experiments/blocks.py --scale gpu --data.train_file "tinygsm/*.parquet" --data.gsm8k_file gsm8k/test.jsonl

The autoregressive models are figure1.py's. Runs that are done are skipped, an interrupted one is resumed.
"""

from _comparison import Comparison, main
from _runs import Run
from _text import FOLDERS, RIGHT, autoregressive, right, short

LABELS = {"mdm_from_ar": "AR → MDM", "block_mdm": "AR → block MDM", "block_puma": "AR → block PUMA"}
SHIFTED = ("--model.init_args.shifted", "true")


def comparison(scale: str) -> Comparison:
    """Blocks of one size, and the whole sequence as one block."""
    flags = short(150, 75) if scale == "cpu" else ()
    runs = {"ar": autoregressive(scale)}
    for name, label in LABELS.items():
        shifted = () if name == "mdm_from_ar" else SHIFTED
        # A run of other settings than figure1.py's needs another name.
        key = "mdm_from_ar_150" if name == "mdm_from_ar" and scale == "cpu" else name
        runs[key] = Run(label, f"configs/{FOLDERS[scale]}/{name}.yaml", (*shifted, *flags), "ar")
    shown = {name: run for name, run in runs.items() if name != "ar"}
    return Comparison(runs, (("block_mdm", "block_puma"),), RIGHT, (right(shown), ("val/loss", "steps")))


if __name__ == "__main__":
    main(__doc__, "blocks", "text", {scale: comparison(scale) for scale in FOLDERS})

"""Block diffusion, with random masks and with PUMA in every block, from an autoregressive model.

    python experiments/blocks.py                   # the built-in word problems, on a CPU
    python experiments/blocks.py --scale gpu --data.train_file "tinygsm/*.parquet" --data.gsm8k_file gsm8k/test.jsonl

The autoregressive models are figure1.py's. Runs that are done are skipped, an interrupted one is resumed.
"""

from _comparison import Comparison, main
from _runs import Run
from _text import FOLDERS, RIGHT, autoregressive, short

BLOCKS = {"block_mdm": "AR → block MDM", "block_puma": "AR → block PUMA"}
SHIFTED = ("--model.init_args.shifted", "true")


def comparison(scale: str) -> Comparison:
    """Blocks of one size, and the whole sequence as one block."""
    folder = FOLDERS[scale]
    flags = short(150, 75) if scale == "cpu" else ()
    whole = "mdm_from_ar_150" if scale == "cpu" else "mdm_from_ar"  # figure1.py's is longer on a CPU
    runs = {"ar": autoregressive(scale), whole: Run("AR → MDM", f"configs/{folder}/mdm_from_ar.yaml", flags, "ar")}
    for name, label in BLOCKS.items():
        runs[name] = Run(label, f"configs/{folder}/{name}.yaml", (*SHIFTED, *flags), "ar")
    return Comparison(runs, (("block_mdm", "block_puma"),), RIGHT, ((RIGHT, "steps"), ("val/loss", "steps")))


if __name__ == "__main__":
    main(__doc__, "blocks", "text", {scale: comparison(scale) for scale in FOLDERS})

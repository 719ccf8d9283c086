"""Figure 1: text, from scratch and from an autoregressive model: programs right over steps, and how much sooner.

    python experiments/figure1.py                  # the built-in word problems, on a CPU
    python experiments/figure1.py --scale gpu --data.train_file "tinygsm/*.parquet" --data.gsm8k_file gsm8k/test.jsonl

Runs that are done are skipped, an interrupted one is resumed.
"""

from _comparison import Comparison, main
from _runs import Run
from _text import FOLDERS, RIGHT, autoregressive, short

LABELS = {"mdm": "MDM", "puma": "PUMA", "mdm_from_ar": "AR → MDM", "puma_from_ar": "AR → PUMA"}
FROM_AR = ("mdm_from_ar", "puma_from_ar")


def comparison(scale: str) -> Comparison:
    """The five ways to train; on a CPU those from an autoregressive model for longer too."""
    folder = FOLDERS[scale]
    flags = short(500, 125) if scale == "cpu" else ()
    runs = {"ar": autoregressive(scale)}
    for name, label in LABELS.items():
        runs[name] = Run(label, f"configs/{folder}/{name}.yaml", flags, "ar" if name in FROM_AR else None)
    pairs = [("mdm", "puma"), FROM_AR]
    if scale == "cpu":
        for name in FROM_AR:
            label = f"{LABELS[name]}, 800 steps"
            runs[f"{name}_800"] = Run(label, f"configs/{folder}/{name}.yaml", short(800, 100), "ar")
        pairs.append(("mdm_from_ar_800", "puma_from_ar_800"))
    return Comparison(runs, tuple(pairs), RIGHT, ((RIGHT, "steps"), (RIGHT, "seconds"), ("val/loss", "steps")))


if __name__ == "__main__":
    main(__doc__, "figure1", "text", {scale: comparison(scale) for scale in FOLDERS})

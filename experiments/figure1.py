"""Figure 1: text, from scratch and from an autoregressive model: programs right over steps, and how much sooner.

    python experiments/figure1.py                  # the built-in word problems, on a CPU
    python experiments/figure1.py --scale gpu --data.train_file "tinygsm/*.parquet" --data.gsm8k_file gsm8k/test.jsonl

Runs that are done are skipped, an interrupted one is resumed.
"""

from dataclasses import replace

from _comparison import Comparison, main
from _runs import Run
from _text import FOLDERS, RIGHT, autoregressive, short

LABELS = {"mdm": "MDM", "puma": "PUMA", "mdm_from_ar": "AR → MDM", "puma_from_ar": "AR → PUMA"}
EVERY_POLICY = ("--config", "experiments/policies_text.yaml")
FROM_AR = ("mdm_from_ar", "puma_from_ar")


def comparison(scale: str) -> Comparison:
    """The five ways to train, and their ends under every policy of ``policies_text.yaml``.

    On a CPU no policies, but those from the autoregressive model also for longer, and judged on more problems.
    """
    folder = FOLDERS[scale]
    flags = short(500, 125) if scale == "cpu" else ()
    runs = {"ar": autoregressive(scale)}
    for name, label in LABELS.items():
        runs[name] = Run(label, f"configs/{folder}/{name}.yaml", flags, "ar" if name in FROM_AR else None)
        if scale == "gpu":
            runs[f"{name}_judged"] = replace(
                runs[name], label=f"{label}, judged", flags=EVERY_POLICY, start=name, command="validate"
            )
    pairs = [("mdm", "puma"), FROM_AR]
    if scale == "cpu":
        for name in FROM_AR:
            longer = Run(f"{LABELS[name]}, 800 steps", f"configs/{folder}/{name}.yaml", short(800, 100), "ar")
            runs[f"{name}_800"] = longer
            # On more problems than during training.
            flags = (*longer.flags, "--data.num_val", "512")
            label = f"{longer.label}, 512 problems"
            runs[f"{name}_800_judged"] = replace(
                longer, label=label, flags=flags, start=f"{name}_800", command="validate"
            )
        pairs.append(("mdm_from_ar_800", "puma_from_ar_800"))
    return Comparison(runs, tuple(pairs), RIGHT, ((RIGHT, "steps"), (RIGHT, "seconds"), ("val/loss", "steps")))


if __name__ == "__main__":
    main(__doc__, "figure1", "text", {scale: comparison(scale) for scale in FOLDERS})

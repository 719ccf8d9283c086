"""Figure 1: text, from scratch and from an autoregressive model: programs right over steps, and how much sooner.

    python experiments/figure1.py                  # the built-in word problems, on a CPU
    python experiments/figure1.py --scale gpu --data.train_file "tinygsm/*.parquet" --data.gsm8k_file gsm8k/test.jsonl

Runs that are done are skipped, an interrupted one is resumed.
"""

from _comparison import Comparison, main
from _curves import curves, draw
from _runs import Point, Run
from matplotlib.axes import Axes

RIGHT = "val/program_accuracy/"
ALONE = {"ar": "autoregressive", "mdm": "MDM", "puma": "PUMA"}
FROM_AR = {"mdm_from_ar": "AR → MDM", "puma_from_ar": "AR → PUMA"}
BLOCKS = {"block_mdm": "AR → block MDM", "block_puma": "AR → block PUMA"}
SHIFTED = ("--model.init_args.shifted", "true")
PAIRS = (("mdm", "puma"), ("mdm_from_ar", "puma_from_ar"), ("mdm", "puma_from_ar"), ("block_mdm", "block_puma"))


def runs(folder: str) -> dict[str, Run]:
    """The five ways to train, and block diffusion, which starts from the autoregressive model too."""
    return {
        **{name: Run(label, f"configs/{folder}/{name}.yaml") for name, label in ALONE.items()},
        **{name: Run(label, f"configs/{folder}/{name}.yaml", start="ar") for name, label in FROM_AR.items()},
        **{name: Run(label, f"configs/{folder}/{name}.yaml", SHIFTED, "ar") for name, label in BLOCKS.items()},
    }


def right(axis: Axes, points: list[Point]) -> None:
    """A panel: programs right over steps, of each run by the first of its samplers."""
    named = {**ALONE, **FROM_AR, **BLOCKS}
    sampled = {
        name: sorted({p.metric for p in points if p.run == name and p.metric.startswith(RIGHT)})[:1] for name in named
    }
    draw(
        axis,
        {named[name]: curves(points, name, metric) for name, metrics in sampled.items() for metric in metrics},
        "optimizer steps",
        "programs right",
    )


if __name__ == "__main__":
    panels = (right, (f"{RIGHT}confidence_2", "seconds"), ("val/loss", "steps"))
    scales = {
        scale: Comparison(runs(folder), PAIRS, RIGHT, panels)
        for scale, folder in {"cpu": "words", "gpu": "tinygsm"}.items()
    }
    main(__doc__, "figure1", "text", scales)

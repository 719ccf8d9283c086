"""Is it the number of distinct puzzles in a step that PUMA lacks? The baseline and PUMA on 6x6 with other batches.

    python experiments/batch.py

Of a batch PUMA takes a K-th anew in every step, the baseline all. What is not named is as in figure5.py.
"""

import statistics

from _comparison import Comparison, Drawn, main, title
from _curves import curves
from _runs import Point
from _sudoku import SOLVED
from matplotlib.axes import Axes
from search import CPU as SEARCHED

BATCHES = {16: "_batch_16", 64: "", 128: "_batch_128"}
SIDES = {"MDM": "mdm", "PUMA, K 6": "puma_k6"}
CPU = {f"{side}{ending}": SEARCHED[f"{side}{ending}"] for ending in BATCHES.values() for side in SIDES.values()}
PAIRS = tuple((f"mdm{ending}", f"puma_k6{ending}") for ending in BATCHES.values())


def finals(metric: str) -> Drawn:
    """A panel: final values over the batch size, mean and range of the seeds."""

    def panel(axis: Axes, points: list[Point]) -> None:
        for place, (label, side) in enumerate(SIDES.items()):
            ends = [
                [curve[max(curve)] for curve in curves(points, f"{side}{ending}", metric)]
                for ending in BATCHES.values()
            ]
            axis.plot(list(BATCHES), list(map(statistics.mean, ends)), "o-", color=f"C{place}", label=label)
            axis.fill_between(list(BATCHES), list(map(min, ends)), list(map(max, ends)), alpha=0.15, color=f"C{place}")
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(BATCHES), list(map(str, BATCHES)))
        axis.set(xlabel="batch size", ylabel=title(metric), ylim=(0, 1))
        axis.grid(alpha=0.3)

    return panel


if __name__ == "__main__":
    asked = Comparison(CPU, PAIRS, "val/solved/", tuple(finals(metric) for metric in SOLVED["cpu"]))
    main(__doc__, "batch", "sudoku", {"cpu": asked})

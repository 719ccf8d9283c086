"""The runs on text of figure1.py and blocks.py. They share a folder, and with it the autoregressive models."""

from _curves import curves, draw
from _runs import Point, Run
from matplotlib.axes import Axes

RIGHT = "val/program_accuracy/"
FOLDERS = {"cpu": "words", "gpu": "tinygsm"}


def short(steps: int, every: int) -> tuple[str, ...]:
    """Flags of a run that a CPU does in minutes, and of how often it is validated."""
    return (
        *("--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(every)),
        *("--data.num_val", "64"),
    )


def autoregressive(scale: str) -> Run:
    """What the others may start from."""
    return Run("autoregressive", f"configs/{FOLDERS[scale]}/ar.yaml", short(500, 125) if scale == "cpu" else ())


def right(runs: dict[str, Run]):  # type: ignore[no-untyped-def]
    """A panel: programs right over steps, of each run by the first of its samplers."""

    def panel(axis: Axes, points: list[Point]) -> None:
        by_label = {}
        for name, run in runs.items():
            metrics = sorted({p.metric for p in points if p.run == name and p.metric.startswith(RIGHT)})
            by_label[run.label] = curves(points, name, metrics[0]) if metrics else []
        draw(axis, by_label, "optimizer steps", "programs right")

    return panel

"""What figure1.py and blocks.py share: a folder, and with it the autoregressive models."""

from _runs import Run

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

"""A progress bar over the whole run, in optimizer steps."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.utilities.types import STEP_OUTPUT


class StepProgressBar(TQDMProgressBar):
    """Count optimizer steps of the whole run, with elapsed time and ETA; epochs mean little to a chain.

    Args:
        refresh_rate: Redraw every this many optimizer steps.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar, at the step a resumed run starts from."""
        self.train_progress_bar = self.init_train_tqdm()
        steps = trainer.estimated_stepping_batches
        self.train_progress_bar.reset(None if steps == float("inf") else int(steps))
        self.train_progress_bar.initial = self.train_progress_bar.n = trainer.global_step
        self.train_progress_bar.set_description("Step")
        self.train_progress_bar.unit = "step"

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Keep counting."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Show the number of optimizer steps taken."""
        bar = self.train_progress_bar
        step = trainer.global_step
        if not self.is_enabled or step == bar.n:
            return
        # Callbacks may see one step in many.
        if step // self.refresh_rate != bar.n // self.refresh_rate or step == bar.total:
            bar.n = step
            bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
            bar.refresh()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep counting."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Return the logged values, without the logger's version number."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

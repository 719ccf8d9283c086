"""A stop at a loss that is not finite, before it reaches the weights or a checkpoint."""

import lightning.pytorch as pl
from torch import Tensor

from puma_lightning.training.weights import latest_checkpoint


class FiniteCheck:
    """Remembers whether all losses were finite, and stops the run if one was not.

    On an accelerator looking at the loss would make the host wait. There it is looked at in the steps that Lightning
    logs, at the end, and before every checkpoint.
    """

    def __init__(self) -> None:
        self._finite: Tensor | None = None

    def reset(self) -> None:
        """Forget earlier losses, at the start of a run."""
        self._finite = None

    def observe(self, loss: Tensor, trainer: pl.Trainer) -> None:
        """Note a loss, and look at it if that is due.

        Raises:
            ValueError: If the loss is not finite; names the step and the last good checkpoint.
        """
        finite = loss.detach().isfinite()
        self._finite = finite if self._finite is None else self._finite & finite
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if loss.device.type == "cpu" or (every and (trainer.global_step + 1) % every == 0):
            self.stop_if_not(trainer)

    @property
    def all_finite(self) -> bool:
        """Whether all losses so far were finite; the host waits for an accelerator to learn it."""
        return self._finite is None or bool(self._finite)

    def stop_if_not(self, trainer: pl.Trainer) -> None:
        """Stop all processes together: those that went on would wait for the others."""
        finite = self.all_finite
        if trainer.world_size > 1:
            finite = trainer.strategy.reduce_boolean_decision(finite)
        if not finite:
            refuse_non_finite(trainer)


def refuse_non_finite(trainer: pl.Trainer) -> None:
    """Raise the ValueError for a loss that is not finite; name the step and the last good checkpoint."""
    last = latest_checkpoint(trainer)
    raise ValueError(
        "loss: expected a number, got one that is not finite (NaN or infinite) by optimizer step "
        f"{trainer.global_step}; go on from the last good checkpoint, {last or 'of which there is none yet'}, with a "
        "lower learning rate or gradient clipping"
    )

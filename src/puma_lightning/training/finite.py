"""A stop at a number that is not finite, before it reaches a checkpoint or is taken for a result."""

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from puma_lightning.training.checkpoints import latest_checkpoint
from puma_lightning.training.host import on_host

MOST_UNSEEN = 1024  # losses that are not looked at where nothing is logged


class FiniteCheck:
    """Remembers whether all losses were finite, and stops the run if one was not.

    On an accelerator looking at the loss would make the host wait. There it is looked at in the steps that Lightning
    logs, at the end, and before every checkpoint. A gradient may be infinite where the loss is not, and is not looked
    at in every step either: weights are, and with them the optimizer's moments, before every checkpoint, before every
    evaluation, and at the end.
    """

    def __init__(self) -> None:
        self._unseen: list[tuple[int, Tensor]] = []  # optimizer steps, and losses that were not looked at
        self._first: int | None = None  # the first step whose loss was not finite

    def reset(self) -> None:
        """Forget earlier losses, at the start of a run."""
        self._unseen, self._first = [], None

    @on_host
    def observe(self, loss: Tensor, trainer: pl.Trainer) -> None:
        """Note a loss, which must stay as it is, and look at it if that is due.

        Raises:
            ValueError: If the loss is not finite; names the step and the last good checkpoint.
        """
        self._unseen.append((trainer.global_step, loss.detach()))
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        due = (trainer.global_step + 1) % every == 0 if every else len(self._unseen) >= MOST_UNSEEN
        if loss.device.type == "cpu" or due:
            self.stop_if_not(trainer)

    @property
    def all_finite(self) -> bool:
        """Whether all losses so far were finite; the host waits for an accelerator to learn it."""
        if self._unseen and self._first is None:
            finite = torch.stack([loss for _, loss in self._unseen]).isfinite().tolist()
            steps = [step for step, _ in self._unseen]
            self._first = next((step for step, is_finite in zip(steps, finite, strict=True) if not is_finite), None)
        self._unseen = []
        return self._first is None

    def stop_if_not(self, trainer: pl.Trainer) -> None:
        """Stop all processes together: those that went on would wait for the others."""
        finite = self.all_finite
        if trainer.world_size > 1:
            finite = trainer.strategy.reduce_boolean_decision(finite)
        if not finite:
            refuse_non_finite(trainer, "loss", self._first)


def check_finite_weights(module: nn.Module, trainer: pl.Trainer | None) -> None:
    """Check that all weights of a module are numbers, before they are judged or said to be the result of a run.

    Raises:
        ValueError: If not; names the first that is not, and the last good checkpoint.
    """
    if name := first_non_finite(dict(module.named_parameters())):
        if trainer is not None and trainer.state.fn == "fit":
            refuse_non_finite(trainer, name)
        raise ValueError(
            f"weights: expected numbers, got NaN or infinity in {name}; take those of an earlier checkpoint, or train "
            "again with a lower learning rate or gradient clipping"
        )


def first_non_finite_in(checkpoint: dict[str, Any], module: nn.Module) -> str | None:
    """Return what a checkpoint of a module holds that is not finite: a weight, its average or a moment; else None."""
    parameters = {name for name, _ in module.named_parameters()}  # buffers may be infinite, as masks are
    for key in ("state_dict", "current_model_state"):
        weights = {name: value for name, value in checkpoint.get(key, {}).items() if name in parameters}
        if name := first_non_finite(weights):
            return name
    return first_non_finite(checkpoint.get("optimizer_states", []), "optimizer_states")


def first_non_finite(state: Any, name: str = "") -> str | None:
    """Return the name of the first tensor in nested dictionaries and lists that holds NaN or infinity, else None."""
    tensors = _named_tensors(state, name)
    return next((name for name, tensor in tensors if not tensor.detach().isfinite().all()), None)


def _named_tensors(state: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(state, Tensor):
        if state.is_floating_point():
            yield name, state
    elif isinstance(state, (dict, list, tuple)):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from _named_tensors(value, f"{name}.{key}" if name else str(key))


def refuse_non_finite(trainer: pl.Trainer, what: str, step: int | None = None) -> None:
    """Raise the ValueError for a number that is not finite in training; name the step and the last good checkpoint."""
    last = latest_checkpoint(trainer) or "of which there is none yet"
    step = trainer.global_step if step is None else step
    raise ValueError(
        f"{what}: expected numbers, got one that is not finite (NaN or infinite) by optimizer step {step}; go on from "
        f"the last good checkpoint, {last}, with a lower learning rate or gradient clipping"
    )

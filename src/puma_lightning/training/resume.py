"""Exact resume: what a checkpoint holds besides weights and optimizer, so that a run goes on as if never stopped."""

from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.fabric.utilities import rank_zero_warn
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.distributed.tensor import DTensor

from puma_lightning.training.checkpoints import CHECKPOINT_KEY, latest_checkpoint
from puma_lightning.training.finite import first_non_finite, first_non_finite_in, refuse_non_finite
from puma_lightning.training.lightning_internals import (
    is_in_accumulation_window,
    is_in_step,
    loads_weights_in_place,
    log_metrics,
    next_logged_step,
    rescale_epoch,
    scales_gradients,
    unlogged_metrics,
)
from puma_lightning.training.logs import KeptRows
from puma_lightning.training.stream import Stream, check_same
from puma_lightning.training.weights import facts_of

if TYPE_CHECKING:
    from puma_lightning.modules.base import StreamedModule


class ExactResume:
    """Saves the stream of every rank and the gradients of a partly accumulated step, and puts them back.

    A checkpoint is loaded before the loaders exist, so what it holds waits here until there is a stream to restore.
    """

    def __init__(self) -> None:
        self._waiting: list[dict[str, Any]] | None = None  # what the checkpoint holds, by rank
        self._unlogged: dict[str, float] | None = None
        self._rows: list[int] | None = None
        self.rows = KeptRows()
        self._backward_at = self._optimizer_at = -1

    def note_backward(self, stream: Stream) -> None:
        """Remember whose gradients there are from here on, for checkpoints saved before the step ends."""
        self._backward_at = stream.step

    def note_optimizer_step(self, stream: Stream) -> None:
        """Remember in which step the weights change from here on."""
        self._optimizer_at = stream.step

    def save(self, module: "StreamedModule", checkpoint: dict[str, Any]) -> None:
        """Add to a checkpoint what every rank holds. To be called on all ranks.

        After an exception the state may be one that no run can go on from exactly: another process may be elsewhere,
        or the optimizer in the middle of its step. Then the checkpoint is written only if the run has no other one.

        Raises:
            ValueError: If a loss, weight, moment or gradient is not finite: such a checkpoint must not be written.
        """
        trainer, stream = module.trainer, module.stream
        # A resumed run that has not begun yet still has the numbers of a step that was not finished.
        in_step = is_in_step(trainer) and stream.yielded is not None
        interrupted = trainer.state.status == "interrupted"
        not_finite = None if module.finite.all_finite else "loss"
        gradients = self._accumulated(module, in_step)
        not_finite = not_finite or first_non_finite_in(checkpoint, module)
        if not scales_gradients(trainer):  # which may be infinite then, and are not used
            not_finite = not_finite or first_non_finite(gradients, "gradients")
        state = {
            "stream": stream.snapshot(in_step),
            "gradients": gradients,
            "finite": not_finite is None,
        }
        states: list[Any] = [state]
        if trainer.world_size > 1 and not interrupted:
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, state)
        if not interrupted and not all(each["finite"] for each in states):
            refuse_non_finite(trainer, not_finite or "loss of another process")
        problem = self._what_is_inexact(module, in_step) if interrupted else None
        if interrupted and not_finite:
            problem = f"{not_finite} is not finite"
        kept = {
            "world_size": trainer.world_size,
            "ranks": states,
            "facts": facts_of(module),
            # Of a resumed run that has not begun yet, what is still to be done with the logs.
            "unlogged": unlogged_metrics(trainer) if self._waiting is None else self._unlogged,
            "rows": self.rows.count(trainer) if self._waiting is None else self._rows,
        }
        if interrupted and trainer.world_size > 1:
            kept["ranks"] = []  # one process knows its own chains alone
        if problem:
            better = latest_checkpoint(trainer)
            if not_finite or better is not None:
                kept["not_to_be_written"] = f"{problem}; go on from {better or 'the start: there is no other yet'}"
            else:
                rank_zero_warn(f"saved after an exception: {problem}, and a resumed run will differ")
        checkpoint[CHECKPOINT_KEY] = kept

    def _what_is_inexact(self, module: "StreamedModule", in_step: bool) -> str | None:
        """Say why a run could not go on exactly from where an exception stopped it; None if it could."""
        if module.trainer.world_size > 1:
            return "an exception stopped one process, and where the others are is not known"
        averages = any(isinstance(callback, WeightAveraging) for callback in module.trainer.callbacks)  # type: ignore[attr-defined]
        if module.trainer.validating and averages:
            return "the exception fell into a validation, for which averaged weights had taken the place of the others"
        if in_step and self._optimizer_at == module.stream.step:
            return "the exception fell into the optimizer's step, when some weights had changed"
        if in_step and self._backward_at == module.stream.step and is_in_accumulation_window(module.trainer, in_step):
            return "the exception fell between a backward pass and the end of its accumulation window"
        return None

    def _accumulated(self, module: "StreamedModule", in_step: bool) -> dict[str, Tensor] | None:
        """Return the gradients of an accumulation window that a checkpoint falls into."""
        if self._waiting is not None:
            return self._waiting_gradients(module.global_rank, module.trainer.world_size)  # to be restored
        if not is_in_accumulation_window(module.trainer, in_step):
            return None
        if in_step and self._backward_at == module.stream.step:
            if module.trainer.state.status != "interrupted":  # ``save`` says so then, or does not save
                rank_zero_warn(
                    "saved between a backward pass and the end of its step: the gradients of this accumulation window "
                    "are not in the checkpoint, and a resumed run will differ"
                )
            return None
        return {name: _part(p.grad).cpu() for name, p in module.named_parameters() if p.grad is not None}

    def load(self, module: "StreamedModule", checkpoint: dict[str, Any]) -> None:
        """Keep what a checkpoint holds until the stream exists."""
        saved = checkpoint.get(CHECKPOINT_KEY)
        if not saved or not saved["ranks"]:
            rank_zero_warn("the checkpoint holds no chains; they start afresh, and the data from the first sequence")
            return
        self._waiting = saved["ranks"]
        self._unlogged = saved.get("unlogged")
        self._rows = saved.get("rows")

    def restore_stream(self, stream: Stream) -> None:
        """Put the stream of this rank back, if a checkpoint has been loaded.

        Raises:
            ValueError: If the checkpoint is of another run, or cannot be dealt to this number of processes.
        """
        if self._waiting is None:
            return
        snapshots = [state["stream"] for state in self._waiting]
        if any(state["gradients"] for state in self._waiting):
            # Part of an update is done already, in so many parts.
            check_same("accumulate_grad_batches", len(snapshots[0]["groups"]), len(stream.groups))
        stream.restore_from(snapshots)

    def restore_gradients(self, module: "StreamedModule") -> None:
        """Put the gradients back, log what was still to be logged, and go on in the epoch; nothing waits any more.

        Raises:
            ValueError: If gradients are shared by another number of processes.
        """
        if self._waiting is not None:
            self.rows.cut(module.trainer, self._rows, next_logged_step(module.trainer))
        else:
            self.rows.begin_anew()
        if self._unlogged is not None:
            log_metrics(module.trainer, self._unlogged)
            self._unlogged = None
        if self._waiting is not None:
            saved, stream = self._waiting[0]["stream"], module.stream
            if saved["num_sequences"] is not None:
                before = saved["num_sequences"] // (saved["num_slots"] * len(self._waiting))
                same = len(saved["groups"]) == len(stream.groups)
                rescale_epoch(module.trainer, before, stream.num_steps, same)
            gradients = self._waiting_gradients(module.global_rank, module.trainer.world_size)
            if gradients and len(self._waiting) != module.trainer.world_size and loads_weights_in_place(module.trainer):
                raise ValueError(
                    f"devices: expected {len(self._waiting)} processes, each of which has its part of the gradients of "
                    f"an update that is not finished, got {module.trainer.world_size}; go on with as many, or from a "
                    "checkpoint saved after an update"
                )
            for name, parameter in module.named_parameters():
                if gradients and name in gradients:
                    parameter.grad = _like(parameter, gradients[name])
        self._waiting = None

    def _waiting_gradients(self, rank: int, ranks: int) -> dict[str, Tensor] | None:
        """Return the gradients that a rank goes on with."""
        assert self._waiting is not None
        saved: list[dict[str, Tensor] | None] = [state["gradients"] for state in self._waiting]
        if len(saved) == ranks:
            return saved[rank]
        # An update is made of the mean over the ranks, so each of another number of ranks may have just that.
        given = [gradients for gradients in saved if gradients]
        names = {name for gradients in given for name in gradients}
        mean = {name: sum(g[name] for g in given if name in g) / len(saved) for name in sorted(names)}
        return cast(dict[str, Tensor], mean) or None


def _part(gradient: Tensor) -> Tensor:
    """Return what this process holds of a gradient that processes may share."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _like(parameter: Tensor, part: Tensor) -> Tensor:
    """Return a part of a gradient as the gradient of a parameter."""
    if not isinstance(parameter, DTensor):
        return part.to(parameter)
    part = part.to(parameter.to_local())
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(part, mesh, placements, shape=parameter.shape, stride=parameter.stride())

"""What stands in the way of recording the training step of a run, which is looked for before training."""

from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch

from puma_lightning import graphs
from puma_lightning.data.base import offer_of
from puma_lightning.training.lightning_internals import is_on_one_device, scales_gradients

if TYPE_CHECKING:
    from puma_lightning.modules.base import StreamedModule

LENGTHS = "sequences of different lengths, or padding"

# What is part of a step, and may be somebody's own: of the module, and of callbacks.
MODULE_HOOKS = (
    "training_step", "finish_step", "loss", "backward", "optimizer_step", "optimizer_zero_grad",
    "configure_gradient_clipping", "on_before_zero_grad", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step",
)  # fmt: skip
TRANSFERS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
CALLBACK_HOOKS = ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step")


def what_stands_in_the_way(module: "StreamedModule") -> str | None:
    """Say why the steps of a module whose training begins cannot be recorded; None if they can."""
    return _of_device(module.trainer) or _of_hooks(module) or _of_chains(module) or module.what_looks_at_values()


def _of_device(trainer: pl.Trainer) -> str | None:
    device = trainer.strategy.root_device
    if trainer.world_size > 1 or not is_on_one_device(trainer):
        return (
            f"{trainer.world_size} process(es) under {type(trainer.strategy).__name__}, which share gradients within it"
        )
    if not graphs.can_record(device):
        return f"a run on a device of type {device.type}, which has no CUDA graphs"
    if scales_gradients(trainer):
        return f"precision {trainer.precision}, whose gradients are scaled by what the host sees of them"
    return None


def _of_hooks(module: "StreamedModule") -> str | None:
    """Say what of a step is somebody's own, and may do what is not repeated by a recording."""
    trainer = module.trainer
    for name in (*MODULE_HOOKS, *TRANSFERS):
        method = getattr(type(module), name, None)
        known = method is None or method.__module__.partition(".")[0] in ("puma_lightning", "lightning")
        if not known or name in vars(module):
            return f"{name} of {type(module).__name__}, which may do more than work on tensors"
    if (hook := offer_of(trainer).own_hook(TRANSFERS)) is not None:
        return f"{hook} of the DataModule, which may change a batch"
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for name in CALLBACK_HOOKS:
            if getattr(type(callback), name) is not getattr(pl.Callback, name) or name in vars(callback):
                return f"{name} of {type(callback).__name__}, which is to be called within it"
    for name, parameter in module.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            return f"a hook on the gradient of {name}"
    for name, part in module.named_modules():
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
            return f"a hook on {name or type(module).__name__}"
    for observer in module.stream.observers:
        owner = getattr(observer, "__self__", observer)
        if not getattr(owner, "in_place", False):
            return f"{type(owner).__name__}, which observes it and is not in_place"
    optimizer = trainer.optimizers[0]
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return f"a hook on the step of {type(optimizer).__name__}"
    for config in trainer.lr_scheduler_configs:
        if getattr(config.scheduler, "cycle_momentum", False):
            return (
                f"the scheduler {type(config.scheduler).__name__} with cycle_momentum, which changes more than the rate"
            )
    if torch.is_anomaly_enabled():
        return "detect_anomaly, which looks at every value"
    if any("capturable" not in group for group in optimizer.param_groups):
        return f"the optimizer {type(optimizer).__name__}, which is not capturable"
    return None


def _of_chains(module: "StreamedModule") -> str | None:
    stream, process = module.stream, module.forward_process
    for name in ("start", "advance"):
        owner = next(base for base in type(process).__mro__ if name in vars(base))
        if not vars(owner).get("recordable", False):
            return f"{name} of {owner.__name__}, which does not say that it is recordable"
    if stream.sequences.lengths_may_vary or stream.peek()["chains"].attention_mask is not None:
        return LENGTHS
    if not stream.draws_for_all_rows:
        return "a run that was begun before version 0.3.0, and draws for as many rows as enter"
    return None

"""What every training run here has in common: the stream, exact resume, optimizer, a stop at a non-finite loss."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from puma_lightning.checkpoints import (
    CHECKPOINT_KEY,
    check_facts,
    check_weights,
    fit_vocabulary,
    latest_checkpoint,
    read_weights,
)
from puma_lightning.forward_process import ForwardProcess
from puma_lightning.optim import WarmupCosine
from puma_lightning.schedule import StepSchedule
from puma_lightning.sequences import CleanSequences, derived_seed
from puma_lightning.stream import Stream


class StreamedModule(pl.LightningModule):
    """A LightningModule whose ``training_step`` is fed by a ``Stream`` built over any train DataLoader.

    Subclasses call ``self.stream.advance(predictions, self.global_step)`` once in every training step, and
    ``self.check_finite(loss)``.

    Args:
        backbone: xt (B, L) int64 to logits (B, L, V); has ``vocab_size``.
        forward_process: What the model trains on.
        mask_id: The mask token.
        optimizer: Called with the parameters.
        scheduler: Called with the optimizer; stepped every optimizer step.
        init_from: Weights to start from, unless others have been loaded: a checkpoint, a folder with a Qwen2 model, or
            its name on the hub.
    """

    stream: Stream
    shifted = False  # whether the backbone predicts position i+1 at position i
    block_size: StepSchedule | None = None  # blocks that sequences are cut into; None for one as long as they are

    def __init__(
        self,
        backbone: nn.Module,
        forward_process: ForwardProcess,
        mask_id: int,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        init_from: str | None,
    ) -> None:
        super().__init__()
        if _given_hyperparameters.get() is not None:
            # Made by the command line: plain values, enough for load_from_checkpoint to rebuild the module.
            # By hand, they would be whole modules, which a checkpoint must not hold.
            self.save_hyperparameters()
        vocab_size = getattr(backbone, "vocab_size", None)
        if not isinstance(vocab_size, int):
            raise ValueError(
                f"the backbone {type(backbone).__name__} needs an integer attribute vocab_size, the V of its logits"
            )
        if not 0 <= mask_id < vocab_size:
            raise ValueError(f"mask_id must be in 0..{vocab_size - 1} (vocabulary {vocab_size}), got {mask_id}")
        self.backbone = backbone
        self.forward_process = forward_process
        self.mask_id = mask_id
        self.vocab_size = vocab_size
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.init_from = init_from
        self._snapshots: list[dict[str, Any]] | None = None
        self._has_weights = False  # those of init_from, a checkpoint or training
        self._fits = 0
        self._backward_at = -1
        self._all_finite: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the module, such as EMA makes, has no stream: it is not trained."""
        state: dict[str, Any] = super().__getstate__()
        state.pop("stream", None)
        return state

    # The stream ---------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Put the stream between Lightning and the user's train loader."""
        if stage != "fit":
            return
        for option in ("overfit_batches", "reload_dataloaders_every_n_epochs"):
            if getattr(self.trainer, option):
                raise ValueError(
                    f"Trainer({option}) works on loaders, which the stream of slots replaces; "
                    "leave it out and choose the sequences in the DataModule"
                )
        self._random_before = torch.get_rng_state()
        # It is: the stream's state is in this module's part of the checkpoint.
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
        # Private, as of lightning 2.6: the one handle on loaders however they were given.
        source = self.trainer.fit_loop._data_source
        seed = derived_seed(self._shared_seed(), self._fits) if self._fits else self._shared_seed()
        self._fits += 1
        self.trainer.fit_loop._data_source = _StreamSource(
            source.instance, source.name, partial(self._build_stream, seed=seed)
        )

    def _shared_seed(self) -> int:
        # Without seed_everything each process has another initial seed.
        return int(self.trainer.strategy.broadcast(torch.initial_seed())) & (2**63 - 1)

    def _build_stream(self, loader: Any, seed: int) -> Stream:
        if not isinstance(loader, DataLoader):
            raise ValueError(
                f"train_dataloader must return one torch.utils.data.DataLoader, got {type(loader).__name__}"
            )
        trainer = self.trainer
        sequences = CleanSequences(
            loader,
            self.mask_id,
            self.vocab_size,
            trainer.global_rank,
            trainer.world_size,
            seed,
            first_given=self.shifted,
        )
        groups = max(
            [trainer.accumulate_grad_batches]
            + [
                max(callback.scheduling.values())
                for callback in trainer.callbacks  # type: ignore[attr-defined]
                if isinstance(callback, GradientAccumulationScheduler)
            ]
        )
        slots = sequences.batch_size * groups
        if sequences.num_sequences // trainer.world_size < slots:
            raise ValueError(
                f"the training set has {sequences.num_sequences} sequences for {trainer.world_size} process(es) of "
                f"{slots} slots (batch size {sequences.batch_size} x accumulation {groups}); "
                "lower the batch size or bring more sequences"
            )
        self.stream = Stream(
            sequences,
            self.forward_process,
            self.mask_id,
            sequences.batch_size,
            num_groups=groups,
            num_steps=sequences.num_sequences // (sequences.batch_size * trainer.world_size),
            seed=seed,
            device=trainer.strategy.root_device,
            block_size=self.block_size,
        )
        if self._snapshots is not None:
            self.stream.restore(self._snapshots[self.global_rank]["stream"])
        return self.stream

    def on_fit_start(self) -> None:
        """Start from the weights of ``init_from``, unless there are others already."""
        self._start_from_weights()

    def on_validation_start(self) -> None:
        """As in training."""
        self._start_from_weights()

    def on_test_start(self) -> None:
        """As in training."""
        self._start_from_weights()

    def on_predict_start(self) -> None:
        """As in training."""
        self._start_from_weights()

    def _start_from_weights(self) -> None:
        if self.init_from is not None and not self._has_weights:
            self.load_weights(self.init_from)
        self._has_weights = True

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever weights are loaded, those of ``init_from`` do not replace them."""
        self._has_weights = True
        return super().load_state_dict(*args, **kwargs)

    def on_train_start(self) -> None:
        """Try the first batch before any step is taken, so that bad input is refused at once."""
        self._all_finite = None
        batch = self.stream.peek()
        # Not compiled, as the shape of a trial is not that of training; but for blocks, whose attention must be.
        stance = torch.compiler.set_stance("force_eager" if self.block_size is None else "default")
        with torch.no_grad(), self.in_eval_mode(), stance, self.trainer.precision_plugin.forward_context():
            self.preflight(batch)
        # Only now: Lightning clears all gradients while it sets up.
        self._restore_gradients()
        self._snapshots = None

    @contextmanager
    def in_eval_mode(self) -> Iterator[None]:
        """Turn off dropout and the like, then put every submodule back into the mode it was in."""
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode

    def teardown(self, stage: str) -> None:
        """Let the loader's worker processes end."""
        if stage == "fit" and hasattr(self, "stream"):
            self.stream.sequences.close()
            # The seed of the last step is not to be that of what comes next in this process.
            torch.set_rng_state(self._random_before)

    def preflight(self, batch: dict[str, Tensor]) -> None:
        """Check what the first batch gives; subclasses raise ValueError."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Tie dropout, and whatever else draws from the global generators, to (seed, rank, step)."""
        # After a resume from within a step, lightning 2.6 has counted that step twice, and by these numbers it tells
        # where in a step a later checkpoint was saved.
        total: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        total.ready, total.started = total.completed + 1, total.completed
        torch.manual_seed(derived_seed(self.stream.seed, self.global_rank, self.stream.step))

    def on_before_backward(self, loss: Tensor) -> None:
        """Remember whose gradients there are from here on, for checkpoints saved before the step ends."""
        self._backward_at = self.stream.step

    # Exact resume -------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the stream of every rank."""
        if self._trainer is None or not hasattr(self, "stream"):
            return
        trainer = self.trainer
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        # A resumed run that has not begun yet still has the numbers of a step that was not finished.
        in_flight = progress.ready > progress.processed and self.stream.yielded is not None
        state: dict[str, Any] = {
            "stream": self.stream.snapshot(in_flight),
            "gradients": self._partial_gradients(in_flight),
        }
        state["finite"] = self._all_finite is None or bool(self._all_finite)
        states: list[Any] = [state]
        # Perhaps this process alone failed and saves: the others would never answer.
        alone = trainer.state.status == "interrupted"
        if trainer.world_size > 1 and not alone:
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, state)
        if not all(state["finite"] for state in states):
            self._refuse_non_finite()
        if trainer.world_size > 1 and alone:
            rank_zero_warn("saved after an exception: the slots of other processes are not in this checkpoint")
            states = []
        checkpoint[CHECKPOINT_KEY] = {"world_size": trainer.world_size, "ranks": states, "facts": self.facts()}

    def _partial_gradients(self, in_flight: bool) -> dict[str, Tensor] | None:
        """Gradients of an accumulation window that a checkpoint falls into."""
        if self._snapshots is not None:
            waiting: dict[str, Tensor] | None = self._snapshots[self.global_rank]["gradients"]
            return waiting  # to be restored
        loop = self.trainer.fit_loop
        if in_flight:
            partial_window = (loop.epoch_loop.batch_progress.current.ready - 1) % self.trainer.accumulate_grad_batches
        else:
            partial_window = loop._should_accumulate()
        if in_flight and partial_window and self._backward_at == self.stream.step:
            rank_zero_warn(
                "saved between a backward pass and the end of its step: the gradients of this accumulation window are "
                "not in the checkpoint, and a resumed run will differ"
            )
        elif partial_window:
            return {n: p.grad.cpu() for n, p in self.named_parameters() if p.grad is not None}
        return None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the streams until the loaders exist; refuse a checkpoint of another model.

        Raises:
            ValueError: If the weights do not fit this model, or the number of processes is another.
        """
        if ("block_size" in checkpoint) != (self.block_size is not None):
            kinds = ("a block model", "none") if self.block_size is None else ("none", "a block model")
            raise ValueError(
                f"the checkpoint is of {kinds[0]} and this {type(self).__name__} is {kinds[1]}: use the class it was "
                "saved from, or start from its weights with init_from"
            )
        if self.strict_loading:
            check_weights(self, checkpoint.get("state_dict", {}), "the checkpoint")
            check_facts(self.facts(), checkpoint.get(CHECKPOINT_KEY, {}).get("facts", {}), "the checkpoint")
        if self._trainer is None or self.trainer.state.fn != "fit":
            return
        saved = checkpoint.get(CHECKPOINT_KEY)
        if not saved or not saved["ranks"]:
            rank_zero_warn("the checkpoint holds no slots; they start afresh, and the data from the first sequence")
            return
        if saved["world_size"] != self.trainer.world_size:
            raise ValueError(
                f"the checkpoint was saved by {saved['world_size']} process(es), this run has "
                f"{self.trainer.world_size}; resume with {saved['world_size']}, or start a new run from its weights "
                "with `--model.init_args.init_from CHECKPOINT` (MaskedDiffusion(init_from=...)) and without --ckpt_path"
            )
        self._snapshots = saved["ranks"]

    def _restore_gradients(self) -> None:
        gradients = self._snapshots[self.global_rank]["gradients"] if self._snapshots else None
        for name, parameter in self.named_parameters():
            if gradients and name in gradients:
                parameter.grad = gradients[name].to(parameter)

    def facts(self) -> dict[str, Any]:
        """What the names and shapes of the weights do not show, and a checkpoint of them should say."""
        datamodule = getattr(self._trainer, "datamodule", None)
        return {
            "tokenizer": getattr(datamodule, "tokenizer_fingerprint", None),
            "shifted": self.shifted,
            **getattr(self.backbone, "settings", {}),
        }

    def load_weights(self, path: str) -> None:
        """Take the weights of a checkpoint or a Qwen2 model, and nothing else of it.

        Raises:
            ValueError: If they are not there, or are of another model or tokenizer.
        """
        weights = read_weights(path)
        check_facts(self.facts(), weights.facts, path)
        per_token = [f"backbone.{name}" for name in getattr(self.backbone, "weights_per_token", [])]
        tensors = fit_vocabulary(weights, per_token, self.vocab_size)
        check_weights(self, tensors, path)
        self.load_state_dict(tensors)
        rank_zero_info(f"Starting from the weights of {path}")

    # Loss and optimizer -------------------------------------------------------------------------------------

    def check_finite(self, loss: Tensor) -> None:
        """Stop the run at a NaN or infinite loss, before it reaches the weights or a checkpoint.

        On an accelerator looking at the loss would make the host wait, so there it is looked at in the steps that
        Lightning logs, and before every checkpoint.

        Raises:
            ValueError: If the loss is not finite; names the step and the last good checkpoint.
        """
        finite = loss.detach().isfinite()
        self._all_finite = finite if self._all_finite is None else self._all_finite & finite
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        due = loss.device.type == "cpu" or (every and (self.global_step + 1) % every == 0)
        if due:
            self._stop_at_non_finite()

    def on_train_end(self) -> None:
        """Look at the losses since the last look."""
        self._stop_at_non_finite()

    def _stop_at_non_finite(self) -> None:
        """All processes stop together: those that went on would wait for the others."""
        finite = self._all_finite is None or bool(self._all_finite)
        if self.trainer.world_size > 1:
            finite = self.trainer.strategy.reduce_boolean_decision(finite)
        if not finite:
            self._refuse_non_finite()

    def _refuse_non_finite(self) -> None:
        last = latest_checkpoint(self.trainer)
        raise ValueError(
            f"the loss is not finite (NaN or infinite) by optimizer step {self.global_step}; the last good checkpoint "
            f"is {last or 'none, nothing was saved yet'}; go on from it with a lower learning rate or gradient clipping"
        )

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the Trainer says.

        Lightning refuses to with mixed precision and a fused optimizer, which is right where gradients are scaled, and
        with bfloat16 they are not.
        """
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.scaler is None:
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or GradClipAlgorithmType.NORM)
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0, algorithm)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer and, stepped every optimizer step, the scheduler."""
        optimizer = self.optimizer(self.parameters())
        scaled = self.trainer.precision == "16-mixed" and self.trainer.gradient_clip_val
        if scaled and any(group.get("fused") for group in optimizer.param_groups):
            raise ValueError(
                "a fused optimizer scales float16's gradients back within its step, so that they cannot be clipped "
                "before: set fused to false, use bf16-mixed precision, or leave out gradient_clip_val"
            )
        if self.scheduler is None:
            return optimizer
        scheduler = self.scheduler(optimizer)
        if isinstance(scheduler, WarmupCosine) and scheduler.total_steps is None:
            steps = self.trainer.estimated_stepping_batches
            if steps == float("inf"):
                raise ValueError("WarmupCosine needs a run of known length: set max_steps, max_epochs or total_steps")
            scheduler.set_total_steps(int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class _StreamSource(_DataLoaderSource):
    """Lightning's source of the train loader (a DataModule, a module or a loader), with a stream around it."""

    def __init__(self, instance: Any, name: str, wrap: Any) -> None:
        super().__init__(instance, name)
        self.wrap = wrap

    def dataloader(self) -> Any:
        return self.wrap(super().dataloader())

"""The LightningModule under all models here: it holds the objects of ``training/`` and lends them Lightning's hooks."""

from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import lightning.pytorch as pl
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from puma_lightning.chain.stages import StepSchedule
from puma_lightning.chain.teacher import ForwardProcess
from puma_lightning.output.prediction import Prediction
from puma_lightning.training.captured import CapturedStep
from puma_lightning.training.checkpoints import check_sums, make_saving_safe
from puma_lightning.training.executions import Executions
from puma_lightning.training.finite import FiniteCheck, check_finite_weights
from puma_lightning.training.host import on_host
from puma_lightning.training.lightning_internals import (
    compute_alone_after_fork,
    correct_place,
    count_step_once,
    is_made_by_command_line,
    keep_double_precision,
    listen_too,
    refuse_missing_last,
    set_accumulation,
    trainer_of,
)
from puma_lightning.training.loading import StreamLoading
from puma_lightning.training.optim import Optimization, clip_unscaled
from puma_lightning.training.resume import ExactResume
from puma_lightning.training.sequences import derived_seed, seed_device
from puma_lightning.training.stopping import GracefulStop
from puma_lightning.training.stream import Stream
from puma_lightning.training.weights import StartingWeights, check_checkpoint, load_weights


class StreamedModule(pl.LightningModule):
    """A LightningModule whose ``training_step`` is fed by a ``Stream`` built over any train DataLoader.

    A subclass's ``training_step`` makes one forward pass and calls ``self.finish_step(loss, predictions, batch)``.

    What the host does in a step is decorated with ``on_host``, so that ``torch.compile`` of the module
    compiles the rest.

    Args:
        backbone: xt (B, L) int64 to logits (B, L, V); has ``vocab_size``.
        forward_process: What the model trains on.
        mask_id: The mask token.
        optimizer: Called with the parameters.
        scheduler: Called with the optimizer; stepped every optimizer step.
        init_from: Weights to start from, unless others have been loaded: a checkpoint, a folder with a Qwen2 model, or
            its name on the hub.
        steps_per_execution: Optimizer steps for each time that callbacks and loggers have a turn, see ``Executions``.
        captured: Whether to record the training step as a CUDA graph, see ``CapturedStep``.

    Raises:
        ValueError: If the backbone has no ``vocab_size``, or ``mask_id`` is outside the vocabulary.
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
        steps_per_execution: int | Literal["auto"] = 1,
        captured: bool | Literal["auto"] = False,
    ) -> None:
        super().__init__()
        if is_made_by_command_line():
            # The arguments are plain values then, enough for load_from_checkpoint to rebuild the module. A module made
            # by hand has whole modules as arguments, which a checkpoint must not hold.
            self.save_hyperparameters()
        vocab_size = getattr(backbone, "vocab_size", None)
        if not isinstance(vocab_size, int):
            raise ValueError(
                f"backbone: expected an integer attribute vocab_size, the V of its logits, got {vocab_size!r} from "
                f"{type(backbone).__name__}; set one"
            )
        if not 0 <= mask_id < vocab_size:
            raise ValueError(
                f"mask_id: expected a token in 0..{vocab_size - 1} (vocabulary {vocab_size}), got {mask_id}; give the "
                "mask an id of its own"
            )
        self.backbone = backbone
        self.forward_process = forward_process
        self.mask_id = mask_id
        self.vocab_size = vocab_size
        self.optimization = Optimization(optimizer, scheduler)
        self.starting_weights = StartingWeights(init_from)
        self.loading = StreamLoading()
        self.resume = ExactResume()
        self.finite = FiniteCheck()
        self.stopping = GracefulStop()
        self.executions = Executions(steps_per_execution)
        self.captured = CapturedStep(captured)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the stream out of copies of the module, such as EMA makes: they are not trained."""
        state: dict[str, Any] = super().__getstate__()
        state.pop("stream", None)
        return state

    @property
    def trainer(self) -> pl.Trainer:
        """The Trainer; see Lightning."""
        return super().trainer

    @trainer.setter
    def trainer(self, trainer: Any) -> None:
        pl.LightningModule.trainer.fset(self, trainer)  # type: ignore[attr-defined]
        if isinstance(trainer, pl.Trainer):
            refuse_missing_last(trainer)  # which has not looked for a checkpoint yet

    # Data ---------------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[pl.Callback]:
        """Add none. It is the first thing that a Trainer asks, before it opens logs and sets up data."""
        compute_alone_after_fork(self.trainer)
        if self.trainer.state.fn == "fit":
            self.resume.rows.open(self.trainer)
        return []

    def setup(self, stage: str) -> None:
        """Make checkpoints safe; put the stream between Lightning and the user's train loader."""
        compute_alone_after_fork(self.trainer)  # for those who override ``configure_callbacks``
        make_saving_safe(self.trainer)
        keep_double_precision(self.trainer, self)
        if stage == "fit":
            listen_too(self.trainer, partial(self.stopping.begin, self.trainer), self._end)
            self.executions.set_up(self.trainer)
            self.loading.begin(self)

    def _end(self) -> None:
        """Leave signals, loaders and the Trainer as they were, and let the loader's worker processes end."""
        self.stopping.end()
        self.executions.end()
        try:
            self.captured.end()
        finally:  # a device that has failed says so again
            self.loading.end(self)

    # Weights ------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Start from the weights of ``init_from``, unless there are others already.

        Raises:
            ValueError: If weights are not finite: what they learn or say would mean nothing.
        """
        self.starting_weights.load_once(self)
        check_finite_weights(self, self.trainer)

    on_validation_start = on_test_start = on_predict_start = on_fit_start

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Make a module with the settings and weights of a checkpoint, whose checksums are looked at first.

        Raises:
            ValueError: If the file is damaged.
        """
        if isinstance(checkpoint_path, (str, Path)) and Path(checkpoint_path).is_file():
            check_sums(checkpoint_path)
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load weights; whatever they are, those of ``init_from`` do not replace them."""
        self.starting_weights.loaded = True
        return super().load_state_dict(*args, **kwargs)

    def load_weights(self, path: str) -> None:
        """Take the weights of a checkpoint or of a Qwen2 model, and nothing else of it.

        Raises:
            ValueError: If they are not there, or are of another model or tokenizer.
        """
        load_weights(self, path)

    # Steps --------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Begin where the checkpoint was saved, if the run is resumed."""
        self.finite.reset()
        self.stopping.connect(self.trainer)
        set_accumulation(self.trainer)
        # Only now: Lightning clears all gradients while it sets up.
        self.resume.restore_gradients(self)
        correct_place(self.trainer)
        self.captured.begin(self)
        self.executions.begin(self.trainer, on_device=self.captured.is_active)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Tie dropout, and whatever else draws from the global generators, to (seed, rank, step)."""
        count_step_once(self.trainer)
        seed_device(derived_seed(self.stream.seed, self.global_rank, self.stream.step), self.device)

    @on_host
    def finish_step(self, loss: Tensor, predictions: Tensor | Prediction, batch: Any) -> None:
        """Do all that a step does after its forward pass: look at the loss, move the chains, log.

        Args:
            loss: Of the batch, ().
            predictions: See ``Stream.advance``.
            batch: The batch that ``training_step`` was given.

        Raises:
            ValueError: If the loss is not finite.
        """
        if self.captured.is_being_taken:
            self.captured.advance(predictions)
            return
        self.finite.observe(loss, self.trainer)
        self.stream.advance(predictions, self.global_step)
        self.log_step(loss, batch)

    def log_step(self, loss: Tensor, batch: Any) -> None:
        """Log the loss of a batch, if that is due."""
        if (mean := self.executions.note(loss)) is not None:
            self.log("train/loss", mean, prog_bar=True, batch_size=len(batch["input_ids"]))

    def predicted_positions(self, batch: Any) -> Tensor:
        """Tell which positions of a batch of the stream are predicted, bool."""
        raise NotImplementedError

    def what_looks_at_values(self) -> str | None:
        """Say what of a training step looks at values of tensors, and so cannot be part of a recorded one."""
        return None

    def on_before_backward(self, loss: Tensor) -> None:
        """Remember whose gradients there are from here on."""
        self.resume.note_backward(self.stream)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End the run here if it has been asked to end."""
        self.stopping.stop_if_asked(self)

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """End the run here if it has been asked to end."""
        self.stopping.stop_validation_if_asked(self)

    def on_train_end(self) -> None:
        """Look at the losses since the last look, and at what they led to."""
        self.stopping.disconnect()
        self.finite.stop_if_not(self.trainer)
        check_finite_weights(self, self.trainer)

    # Checkpoints --------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the stream of every rank."""
        if trainer_of(self) is not None and hasattr(self, "stream"):
            self.resume.save(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model; keep the streams until the loaders exist.

        Raises:
            ValueError: If the weights do not fit this model.
        """
        check_checkpoint(self, checkpoint)
        trainer = trainer_of(self)
        if trainer is not None and trainer.state.fn == "fit":
            self.resume.load(self, checkpoint)

    # Optimizer ----------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimizer and, stepped every optimizer step, the scheduler."""
        return self.optimization.configure(self.parameters(), self.trainer)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the Trainer says; the optimizer's step comes next."""
        self.resume.note_optimizer_step(self.stream)
        if not clip_unscaled(self.trainer, optimizer, gradient_clip_val, gradient_clip_algorithm):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

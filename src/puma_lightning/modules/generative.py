"""What every generative module has in common: evaluation by likelihood, and completing sequences."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from puma_lightning.chain.chains import Chains, padding_token
from puma_lightning.chain.student import AnySampler, Sample
from puma_lightning.data.base import offer_of
from puma_lightning.data.batch import (
    Batch,
    check_batch,
    check_first,
    padded_to_multiple,
    padding_last,
    real_first,
)
from puma_lightning.models.calling import logits_of
from puma_lightning.models.transformer import TransformerBackbone
from puma_lightning.modules.base import StreamedModule
from puma_lightning.modules.eval_mode import eval_mode
from puma_lightning.modules.preflight import preflight, what_looks_at_values
from puma_lightning.output.alignment import align
from puma_lightning.output.prediction import exclude_token
from puma_lightning.training.host import on_host
from puma_lightning.training.loading import shared_seed
from puma_lightning.training.sequences import derived_seed
from puma_lightning.training.stream import begin


class GenerativeModule(StreamedModule):
    """A ``StreamedModule`` that is judged by its likelihood and by what it generates.

    Subclasses define ``training_step``, ``evaluation_loss`` and ``complete``.
    """

    large_vocabulary: int | None = 4096  # tokens from which the output layer is run on positions that count alone
    sampler: AnySampler
    sampler_class: type[AnySampler]
    trained_in: int | None = None  # the block size of the training batch seen last, of a model with blocks
    _sampling_seed = 0

    def setup(self, stage: str) -> None:
        """Let predictions follow the run's seed; evaluation draws the same numbers every time."""
        super().setup(stage)
        self._sampling_seed = shared_seed(self.trainer) if stage == "predict" else 0
        if stage == "fit":
            # A curriculum begins at its first block size, unless a checkpoint is loaded after this.
            self.trained_in = None

    def on_train_start(self) -> None:
        """Try the first batch before any step is taken, so that bad input is refused at once."""
        self.preflight()
        super().on_train_start()

    def preflight(self) -> None:
        """Check what the model makes of the first batch; see ``preflight.py``. Extend it to refuse more.

        Raises:
            ValueError: If something would go wrong later.
        """
        preflight(self)

    def what_looks_at_values(self) -> str | None:
        return what_looks_at_values(self)

    def forward(self, xt: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Predict every position, never as the mask token.

        Args:
            xt: Partly masked sequences, (B, L) int64.
            attention_mask: False where a position is padding, which belongs at the end, (B, L) bool; None where nothing
                is.

        Returns:
            Logits aligned with positions, (B, L, V); -inf for the mask token.
        """
        return exclude_token(align(logits_of(self.backbone, xt, attention_mask), self.shifted), self.mask_id)

    def denoise(self, chains: Chains) -> Tensor:
        """Predict every position of chains: logits aligned with positions, (N, L, V); -inf for the mask token."""
        logits: Tensor = self(chains.xt, **padding_of(chains.attention_mask))
        return logits

    @on_host
    def chains(self, batch: Any, generator: torch.Generator | None = None) -> Chains:
        """Start the chains of a clean batch, at stages spread evenly, as in the first batch of a run.

        For trying things out without a Trainer: ``denoise`` predicts for them, ``forward_process.advance`` moves them
        on, and ``training_step`` gives the loss of a clean batch.

        Args:
            batch: A clean batch from any DataModule, on any device.
            generator: Source of all randomness, on the model's device; PyTorch's own by default.

        Example:
            ``chains = module.chains(batch)`` and then
            ``chains = module.forward_process.advance(chains, module.denoise(chains), step=0)``.

        Raises:
            ValueError: If it is no clean batch.
        """
        limits: dict[str, Any] = {"mask_id": self.mask_id, "vocab_size": self.vocab_size}
        clean = padding_last(check_batch(batch, **limits, first_given=self.shifted))
        size = None if self.block_size is None else self.trained_in or self.block_size.at(0)
        clean = padded_to_multiple(clean, size or 1, self.mask_id)
        clean = {name: rows.to(self.device) for name, rows in clean.items()}
        rows, num_stages = len(clean["input_ids"]), self.forward_process.num_stages_at(0)
        stage = torch.arange(rows, device=self.device) * num_stages // rows
        return begin(self.forward_process, clean, self.mask_id, num_stages, stage, size, generator)

    def head(self, any_vocabulary: bool = False) -> nn.Linear | None:
        """Return the backbone's output layer, where it is worth running on the positions that count alone.

        That is with a large vocabulary: its logits would be most of a step's memory and time. A small one gains nothing
        and keeps static shapes. The backbone must be a ``TransformerBackbone`` that nobody has given another
        ``forward``, hooks or a compiled call: only then are its logits known to be the head of its hidden states. A
        module that overrides ``forward`` sets ``large_vocabulary`` to None.
        """
        backbone, head = self.backbone, getattr(self.backbone, "lm_head", None)
        known = (
            isinstance(backbone, TransformerBackbone)
            and type(backbone).forward is TransformerBackbone.forward
            and "forward" not in vars(backbone)
            and backbone._compiled_call_impl is None
            and type(head) is nn.Linear
            and head.weight.shape[0] == self.vocab_size
            and not any(m._forward_hooks or m._forward_pre_hooks for m in (backbone, head))
        )
        large = self.large_vocabulary is not None and self.vocab_size >= self.large_vocabulary
        return head if known and (large or any_vocabulary) else None

    # Evaluation ---------------------------------------------------------------------------------------------

    def evaluation_loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, int]:
        """Return the loss of a clean batch in nats per token, and its weight in the mean over batches."""
        raise NotImplementedError

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log ``val/loss``, or ``test/loss``, in nats per token. A batch of questions alone has none."""
        if is_questions(batch, self.mask_id):
            return
        batch = self.checked(batch)
        loss, weight = self.evaluation_loss(batch, self.evaluation_generator(dataloader_idx, batch_idx))
        self.log_evaluation(loss, weight, dataloader_idx)

    @on_host
    def log_evaluation(self, loss: Tensor, weight: int, dataloader_idx: int) -> None:
        """Log the loss of a batch, which counts for its weight in the mean over batches."""
        name = f"{stage_name(self.trainer)}/loss{loader_suffix(self.trainer, dataloader_idx)}"
        self.log(name, loss, on_step=False, on_epoch=True, batch_size=weight, sync_dist=True, add_dataloader_idx=False)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the perplexity, exp(loss); for a diffusion model it is a bound."""
        for name, loss in list(self.trainer.callback_metrics.items()):
            if name.startswith(f"{stage_name(self.trainer)}/loss"):
                self.log(name.replace("/loss", "/perplexity"), loss.exp())

    on_test_epoch_end = on_validation_epoch_end

    @on_host
    def checked(self, batch: Any) -> Batch:
        """Return a batch of evaluation in its one form: clean sequences, or questions alone.

        It has ``input_ids`` and ``prompt_mask``, and an ``attention_mask`` if anything is padding, which is last then.

        Raises:
            ValueError: If it is neither.
        """
        return padding_last(
            check_batch(
                batch,
                mask_id=self.mask_id,
                vocab_size=self.vocab_size,
                first_given=self.shifted,
                clean=not is_questions(batch, self.mask_id),
            )
        )

    @on_host
    def evaluation_generator(self, *keys: int) -> torch.Generator:
        """Return a generator that leaves those of training alone: the same numbers every time for the same keys."""
        seed = derived_seed(self._sampling_seed, self.global_rank, *keys)
        return torch.Generator(self.device).manual_seed(seed)

    # Generation ---------------------------------------------------------------------------------------------

    @on_host
    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Complete everything that is not prompt.

        Returns:
            ``{"tokens": (B, L), "reveal_step": (B, L), "nfe": (B,)}``, see ``Sample``; and ``"attention_mask"``, (B, L)
            bool, if anything is padding.
        """
        batch = check_batch(batch, mask_id=self.mask_id, vocab_size=self.vocab_size, may_be_given=True, clean=False)
        generator = self.evaluation_generator(dataloader_idx, batch_idx)
        real = batch.get("attention_mask")
        sample = self.sample(batch["input_ids"], batch["prompt_mask"], None, generator, real)
        return {name: value for name, value in vars(sample).items() if value is not None}

    def sample(
        self,
        input_ids: Tensor,
        prompt_mask: Tensor,
        sampler: AnySampler | None = None,
        generator: torch.Generator | None = None,
        attention_mask: Tensor | None = None,
    ) -> Sample:
        """Complete sequences given their prompts.

        Padding stays where it is, unless a sampler generates further than the sequences go: then it comes last.

        Args:
            input_ids: (B, L) int64; only the prompt is read.
            prompt_mask: True where a position is given, (B, L) bool.
            sampler: Another sampler than the module's own.
            generator: Source of all randomness, on the device of ``input_ids``.
            attention_mask: False where a position is padding, (B, L) bool; None where nothing is.

        Returns:
            The completed sequences.

        Raises:
            ValueError: If the sampler is not one for this kind of model, or a shifted model has no first position.
        """
        sampler = sampler or self.sampler
        self.check_sampler(sampler)
        xt = input_ids.masked_fill(~prompt_mask, self.mask_id)
        order = None
        if attention_mask is not None:
            order = real_first(attention_mask)
            xt = xt.masked_fill(~attention_mask, padding_token(self.mask_id)).gather(1, order)
            prompt_mask, attention_mask = prompt_mask.gather(1, order), attention_mask.gather(1, order)
        if self.shifted:
            check_first(prompt_mask)
        with eval_mode(self):
            sample = self.complete(xt, sampler, generator, **padding_of(attention_mask))
        if order is None or getattr(sampler, "length", None):
            return sample
        return replace(sample, attention_mask=attention_mask).in_order(order.argsort(1))

    def complete(
        self, xt: Tensor, sampler: Any, generator: torch.Generator | None, attention_mask: Tensor | None = None
    ) -> Sample:
        """Fill in the masked positions of xt, (B, L), with a sampler for this kind of model; padding is last."""
        raise NotImplementedError

    def check_sampler(self, sampler: AnySampler) -> None:
        """Check that a sampler is one for this kind of model.

        Raises:
            ValueError: If not; names the right one.
        """
        if not isinstance(sampler, self.sampler_class):
            raise ValueError(
                f"sampler: expected a {self.sampler_class.__name__} for {type(self).__name__}, got a "
                f"{type(sampler).__name__}; give one"
            )


def padding_of(attention_mask: Tensor | None) -> dict[str, Tensor]:
    """Return the argument that says what is padding: none where nothing is, as not all models know of it."""
    return {} if attention_mask is None else {"attention_mask": attention_mask}


def check_eos(eos_id: int | None, vocab_size: int, mask_id: int) -> int | None:
    """Return the token that ends an answer, or None if there is none.

    Raises:
        ValueError: If it is outside the vocabulary or the mask token.
    """
    if eos_id is not None and (not 0 <= eos_id < vocab_size or eos_id == mask_id):
        raise ValueError(
            f"eos_id: expected a token in 0..{vocab_size - 1} (vocabulary {vocab_size}), and not the mask token "
            f"{mask_id}, got {eos_id}; null says that there is none"
        )
    return eos_id


@on_host
def is_questions(batch: Any, mask_id: int) -> bool:
    """Tell whether a batch has prompts alone: every position that is not given is masked."""
    if not isinstance(batch, Mapping) or not isinstance(batch.get("prompt_mask"), Tensor):
        return False
    answer = ~batch["prompt_mask"].bool()
    real = batch.get("attention_mask")
    if isinstance(real, Tensor) and real.shape == answer.shape:
        answer = answer & real.bool()
    return bool(answer.any(1).all() and ((batch["input_ids"] == mask_id) | ~answer).all())


def stage_name(trainer: pl.Trainer) -> Literal["val", "test"]:
    """Return what the names of metrics start with: ``val`` or ``test``."""
    return "test" if trainer.testing else "val"


def loader_suffix(trainer: pl.Trainer, dataloader_idx: int) -> str:
    """Return what a metric's name ends in: nothing for the first set, which checkpoints can watch, else ``/name``."""
    if dataloader_idx == 0:
        return ""
    number = len(trainer.num_test_batches if trainer.testing else trainer.num_val_batches)
    return f"/{offer_of(trainer).set_names(stage_name(trainer), number)[dataloader_idx]}"

"""What every generative module has in common: evaluation, prediction, and logits aligned with positions."""

from collections.abc import Collection
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from puma_lightning.data.base import Batch, check_batch, check_first
from puma_lightning.models.transformer import TransformerBackbone
from puma_lightning.modules.base import StreamedModule
from puma_lightning.output_layer import predict
from puma_lightning.sampling import AnySampler, Sample
from puma_lightning.sequences import derived_seed
from puma_lightning.unmasking import Prediction, Statistic, exclude_token


class GenerativeModule(StreamedModule):
    """A ``StreamedModule`` that is judged by its likelihood and by what it generates.

    Subclasses define ``training_step``, ``evaluation_loss`` and ``complete``.
    """

    large_vocabulary: int | None = 4096  # tokens from which the output layer is run on positions that count alone
    sampler: AnySampler
    sampler_class: type[AnySampler]
    _sampling_seed = 0

    def setup(self, stage: str) -> None:
        """Predictions follow the run's seed; evaluation draws the same numbers every time."""
        super().setup(stage)
        self._sampling_seed = self._shared_seed() if stage == "predict" else 0

    def forward(self, xt: Tensor) -> Tensor:
        """Predict every position, never as the mask token.

        Args:
            xt: Partly masked sequences, (B, L) int64.

        Returns:
            Logits aligned with positions, (B, L, V); -inf for the mask token.
        """
        return self.predictions(self.align(self.backbone(xt)))

    def predictions(self, logits: Tensor) -> Tensor:
        """Logits aligned with positions, (..., V), with -inf for the mask token."""
        return exclude_token(logits, self.mask_id)

    def head(self, any_vocabulary: bool = False) -> nn.Linear | None:
        """The backbone's output layer, where it is worth running on the positions that count alone.

        That is with a large vocabulary: its logits would be most of a step's memory and time. A small one gains nothing
        and keeps static shapes. The backbone must be a ``TransformerBackbone`` that nobody has given another
        ``forward``, hooks or a compiled call: only then are its logits known to be the head of its hidden states. A
        module that overrides ``forward`` sets ``large_vocabulary`` to None.
        """
        backbone, head = self.backbone, getattr(self.backbone, "lm_head", None)
        known = (
            isinstance(backbone, TransformerBackbone)
            and getattr(backbone.forward, "__func__", None) is TransformerBackbone.forward
            and backbone._compiled_call_impl is None
            and type(head) is nn.Linear
            and head.weight.shape[0] == self.vocab_size
            and not any(m._forward_hooks or m._forward_pre_hooks for m in (backbone, head))
        )
        large = self.large_vocabulary is not None and self.vocab_size >= self.large_vocabulary
        return head if known and (large or any_vocabulary) else None

    def select(self, rows: Tensor) -> "GenerativeModule":
        """The model for these rows (n,) of a batch alone: itself, because it looks at each row on its own.

        To be overridden by a model that knows more of the rows of a batch than is in xt.
        """
        return self

    @property
    def static_shapes(self) -> bool:
        """Whether parts of the backbone are compiled, so that a batch of another size may be compiled for anew."""
        return any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in self.backbone.modules())

    def predict_at(
        self,
        states: Tensor,
        masked: Tensor,
        reads: Collection[Statistic],
        temperature: float,
        top_p: float,
        generator: torch.Generator | None,
    ) -> Prediction:
        """What the output layer says of the masked positions.

        Args:
            states: Hidden states aligned with positions, (B, L, D).
            masked: True where they count, (B, L) bool.
            reads: The statistics wanted.
            temperature: Of the drawn tokens; 0 takes the most likely one.
            top_p: Draw only from the smallest set of tokens with at least this probability.
            generator: Source of the draws, on the device of ``states``.

        Returns:
            The statistics and ``drawn``, (B, L) each; 0 at other positions.
        """
        head = self.head()
        assert head is not None
        index = true_positions(masked)
        found = predict(
            states.flatten(0, 1)[index],
            head.weight,
            head.bias,
            self.mask_id,
            None,
            reads,
            temperature,
            top_p,
            generator,
        )
        return spread(found, index, masked.shape)

    def align(self, outputs: Tensor, before: Tensor | None = None) -> Tensor:
        """The one place of the shift: what the backbone says about each position, at that position.

        Args:
            outputs: Hidden states or logits of the backbone, (B, L, D) or (B, L, V), for sequences or for blocks.
            before: The same at the position before the first, which is where a block goes on from, (B, 1, D) or
                (B, 1, V). Without it nothing is said about the first position, which must be given and keeps its own
                output.

        Returns:
            The same; of a shifted backbone moved by one position.
        """
        if not self.shifted:
            return outputs
        return torch.cat([outputs[:, :1] if before is None else before, outputs[:, :-1]], dim=1)

    def preflight(self, batch: Batch) -> None:
        """Check the samplers, and what the backbone makes of the first batch."""
        for sampler in self.all_samplers():
            self.check_sampler(sampler)
        xt = self.few(batch["xt"])
        self.check_logits(xt, self(xt))

    def all_samplers(self) -> list[AnySampler]:
        """The module's own and those of the callbacks, each once."""
        samplers = [self.sampler]
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            samplers += getattr(callback, "samplers", [getattr(callback, "sampler", None) or self.sampler])
        return list({id(sampler): sampler for sampler in samplers}.values())

    def check_sampler(self, sampler: AnySampler) -> None:
        """Check that a sampler is one for this kind of model.

        Raises:
            ValueError: If not; names the right one.
        """
        if not isinstance(sampler, self.sampler_class):
            raise ValueError(
                f"{type(self).__name__} is sampled from with a {self.sampler_class.__name__}, "
                f"got a {type(sampler).__name__}"
            )

    def few(self, rows: Tensor) -> Tensor:
        """As many rows of a batch as logits can be kept of, for checks: one where the vocabulary is large."""
        return rows if self.head() is None else rows[:1]

    def check_logits(self, xt: Tensor, logits: Tensor) -> None:
        """Check what the backbone made of a batch.

        Raises:
            ValueError: If the logits have another shape.
        """
        expected = (*xt.shape, self.vocab_size)
        if logits.shape != expected:
            raise ValueError(f"the backbone must return logits (B, L, V) = {expected}, got {tuple(logits.shape)}")

    def check_eos(self, eos_id: int | None) -> int | None:
        """Return the token that ends an answer, or None if there is none.

        Raises:
            ValueError: If it is outside the vocabulary or the mask token.
        """
        if eos_id is not None and (not 0 <= eos_id < self.vocab_size or eos_id == self.mask_id):
            raise ValueError(
                f"eos_id must be in 0..{self.vocab_size - 1} (vocabulary {self.vocab_size}) and not the mask token "
                f"{self.mask_id}, got {eos_id}"
            )
        return eos_id

    def evaluation_loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, int]:
        """The loss of a clean batch in nats per token, and its weight in the mean over batches."""
        raise NotImplementedError

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log ``val/loss``, in nats per token. A batch of questions alone has none."""
        self._evaluate("val", batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """As in validation."""
        self._evaluate("test", batch, batch_idx, dataloader_idx)

    def _evaluate(self, stage: str, batch: Batch, batch_idx: int, dataloader_idx: int) -> None:
        if is_questions(batch, self.mask_id):
            return
        batch = self.checked(batch)
        loss, weight = self.evaluation_loss(batch, self.evaluation_generator(dataloader_idx, batch_idx))
        name = f"{stage}/loss{loader_suffix(self.trainer, dataloader_idx)}"
        self.log(name, loss, on_step=False, on_epoch=True, batch_size=weight, sync_dist=True, add_dataloader_idx=False)

    def checked(self, batch: Any) -> Batch:
        """A batch of evaluation, ``{"input_ids", "prompt_mask"}``: clean sequences, or questions alone.

        Raises:
            ValueError: If it is neither.
        """
        return check_batch(
            batch,
            mask_id=self.mask_id,
            vocab_size=self.vocab_size,
            first_given=self.shifted,
            clean=not is_questions(batch, self.mask_id),
        )

    def on_validation_epoch_end(self) -> None:
        """The perplexity, exp(val/loss); of a diffusion model a bound on it."""
        self._log_perplexity("val")

    def on_test_epoch_end(self) -> None:
        """The perplexity, exp(test/loss); of a diffusion model a bound on it."""
        self._log_perplexity("test")

    def _log_perplexity(self, stage: str) -> None:
        for name, loss in list(self.trainer.callback_metrics.items()):
            if name.startswith(f"{stage}/loss"):
                self.log(name.replace("/loss", "/perplexity"), loss.exp())

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Complete everything that is not prompt.

        Returns:
            ``{"tokens": (B, L), "reveal_step": (B, L), "nfe": (B,)}``, see ``Sample``.
        """
        batch = check_batch(batch, mask_id=self.mask_id, vocab_size=self.vocab_size, may_be_given=True, clean=False)
        sample = self.sample(
            batch["input_ids"], batch["prompt_mask"], generator=self.evaluation_generator(dataloader_idx, batch_idx)
        )
        return {"tokens": sample.tokens, "reveal_step": sample.reveal_step, "nfe": sample.nfe}

    def sample(
        self,
        input_ids: Tensor,
        prompt_mask: Tensor,
        sampler: AnySampler | None = None,
        generator: torch.Generator | None = None,
    ) -> Sample:
        """Complete sequences given their prompts.

        Args:
            input_ids: (B, L) int64; only the prompt is read.
            prompt_mask: True where a position is given, (B, L) bool.
            sampler: Another sampler than the module's own.
            generator: Source of all randomness, on the device of ``input_ids``.

        Returns:
            The completed sequences.

        Raises:
            ValueError: If the sampler is not one for this kind of model, or a shifted model has no first position.
        """
        sampler = sampler or self.sampler
        self.check_sampler(sampler)
        if self.shifted:
            check_first(prompt_mask)
        xt = input_ids.masked_fill(~prompt_mask, self.mask_id)
        with self.in_eval_mode():
            return self.complete(xt, sampler, generator)

    def complete(self, xt: Tensor, sampler: Any, generator: torch.Generator | None) -> Sample:
        """Fill in the masked positions of xt, (B, L), with a sampler for this kind of model."""
        raise NotImplementedError

    def evaluation_generator(self, *keys: int) -> torch.Generator:
        """A generator that leaves those of training alone: the same numbers every time for the same keys."""
        seed = derived_seed(self._sampling_seed, self.global_rank, *keys)
        return torch.Generator(self.device).manual_seed(seed)


def true_positions(mask: Tensor, number: int | None = None) -> Tensor:
    """Where a mask, (B, L) bool, is true, in the flattened mask and in order, (``number``,) int64.

    Without the number the host would wait for the device to learn it.
    """
    if number is None:
        return mask.flatten().nonzero().squeeze(1)
    return mask.flatten().argsort(descending=True, stable=True)[:number]


def spread(found: Prediction, index: Tensor, shape: torch.Size) -> Prediction:
    """What was found at some positions, (N,), at their places among all, (B, L); 0 at the others."""
    return found.map(lambda value: value.new_zeros(shape.numel()).index_copy(0, index, value).view(shape))


def is_questions(batch: Any, mask_id: int) -> bool:
    """Whether a batch has prompts alone: every position that is not given is masked."""
    if not isinstance(batch, dict) or not isinstance(batch.get("prompt_mask"), Tensor):
        return False
    answer = ~batch["prompt_mask"].bool()
    return bool(answer.any(1).all() and ((batch["input_ids"] == mask_id) | ~answer).all())


def loader_suffix(trainer: pl.Trainer, dataloader_idx: int) -> str:
    """What a metric's name ends in: nothing for the first set, which checkpoints can watch; ``/name`` for others."""
    if dataloader_idx == 0:
        return ""
    names = getattr(trainer.datamodule, "test_names" if trainer.testing else "val_names", None)  # type: ignore[attr-defined]
    return f"/{names[dataloader_idx] if names else dataloader_idx}"

"""Masked diffusion: a model that fills in sequences in any order."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from puma_lightning.data.base import Batch, check_batch
from puma_lightning.forward_process import ForwardProcess, ProgressiveUnmasking, stratified_masking
from puma_lightning.losses import masked_cross_entropy
from puma_lightning.modules.base import StreamedModule
from puma_lightning.optim import WarmupCosine
from puma_lightning.sampling import Sample, Sampler
from puma_lightning.sequences import derived_seed
from puma_lightning.unmasking import exclude_token


class MaskedDiffusion(StreamedModule):
    """A masked diffusion model; with ``ProgressiveUnmasking`` trained by PUMA, with ``RandomMasking`` as usual.

    Args:
        backbone: Any module from token ids (B, L) int64 to logits (B, L, V), with an attribute ``vocab_size``.
        mask_id: The mask token. The command line links it to the DataModule's.
        forward_process: What the model trains on: ``ProgressiveUnmasking``, ``RandomMasking`` or one of your own.
        sampler: How ``predict`` completes sequences.
        optimizer: Called with the parameters.
        scheduler: Called with the optimizer and stepped every optimizer step; null for a constant rate.
        init_from: Checkpoint to take the weights from at the start of training (not a resume).

    Raises:
        ValueError: If the backbone has no ``vocab_size`` or is causal, or ``mask_id`` is outside the vocabulary.
    """

    def __init__(
        self,
        backbone: nn.Module,
        mask_id: int,
        forward_process: ForwardProcess = ProgressiveUnmasking(),  # noqa: B008 - holds no state
        sampler: Sampler = Sampler(),  # noqa: B008 - holds no state
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=3e-4, weight_decay=0.01),
        scheduler: LRSchedulerCallable | None = WarmupCosine,
        init_from: str | None = None,
    ) -> None:
        super().__init__(backbone, forward_process, mask_id, optimizer, scheduler, init_from)
        if getattr(backbone, "causal", False):
            raise ValueError(
                "a causal backbone predicts the next position from earlier ones; MaskedDiffusion needs one that sees "
                "all positions (causal=False)"
            )
        self.sampler = sampler
        self._sampling_seed = 0

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
        logits: Tensor = self.backbone(xt)
        return exclude_token(logits, self.mask_id)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One forward pass gives the loss and moves the chains."""
        xt = batch["xt"]
        logits = self(xt)
        loss = masked_cross_entropy(logits, batch["input_ids"], xt == self.mask_id).mean()
        self.check_finite(loss)
        self.stream.advance(logits.detach(), self.global_step)
        self.log("train/loss", loss, prog_bar=True, batch_size=xt.shape[0])
        return loss

    def preflight(self, batch: Batch) -> None:
        """Check the shapes of the logits and of the policy's scores on the first batch."""
        xt = batch["xt"]
        logits = self(xt)
        if logits.shape != (*xt.shape, self.vocab_size):
            raise ValueError(
                f"the backbone must return logits (B, L, V) = {(*xt.shape, self.vocab_size)}, got {tuple(logits.shape)}"
            )
        parts = [self.forward_process, self.sampler]
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            parts += getattr(callback, "samplers", [getattr(callback, "sampler", None)])
        for policy in [part.policy for part in parts if hasattr(part, "policy")]:
            scores = policy(logits, xt)
            if scores.shape != xt.shape:
                raise ValueError(
                    f"policy {policy!r} must return scores (B, L) = {tuple(xt.shape)}, got {tuple(scores.shape)}"
                )
            if (scores.isnan() & (xt == self.mask_id)).any() and not logits.isnan().any():
                raise ValueError(
                    f"policy {policy!r} returned NaN where the logits have none (the mask token's is -inf); "
                    "scores must be numbers"
                )

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """The per-token NELBO in nats: n stratified over the batch, the same masks at every validation."""
        self._evaluate("val", batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """As in validation."""
        self._evaluate("test", batch, batch_idx, dataloader_idx)

    def _evaluate(self, stage: str, batch: Batch, batch_idx: int, dataloader_idx: int) -> None:
        batch = check_batch(batch, mask_id=self.mask_id, vocab_size=self.vocab_size)
        x0, prompt_mask = batch["input_ids"], batch["prompt_mask"]
        generator = self.evaluation_generator(dataloader_idx, batch_idx)
        xt = stratified_masking(x0, prompt_mask, self.mask_id, generator)
        loss = masked_cross_entropy(self(xt), x0, xt == self.mask_id).mean()
        name = f"{stage}/loss{loader_suffix(self.trainer, dataloader_idx)}"
        self.log(name, loss, on_step=False, on_epoch=True, batch_size=len(x0), sync_dist=True, add_dataloader_idx=False)

    def on_validation_epoch_end(self) -> None:
        """The perplexity bound, exp(val/loss)."""
        self._log_perplexity("val")

    def on_test_epoch_end(self) -> None:
        """The perplexity bound, exp(test/loss)."""
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
        batch = check_batch(batch, mask_id=self.mask_id, vocab_size=self.vocab_size, min_answer_length=0, clean=False)
        sample = self.sample(
            batch["input_ids"], batch["prompt_mask"], generator=self.evaluation_generator(dataloader_idx, batch_idx)
        )
        return {"tokens": sample.tokens, "reveal_step": sample.reveal_step, "nfe": sample.nfe}

    def sample(
        self,
        input_ids: Tensor,
        prompt_mask: Tensor,
        sampler: Sampler | None = None,
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
        """
        xt = input_ids.masked_fill(~prompt_mask, self.mask_id)
        with self.in_eval_mode():
            return (sampler or self.sampler)(self, xt, self.mask_id, generator)

    def evaluation_generator(self, *keys: int) -> torch.Generator:
        """A generator that leaves those of training alone: the same numbers every time for the same keys."""
        seed = derived_seed(self._sampling_seed, self.global_rank, *keys)
        return torch.Generator(self.device).manual_seed(seed)


def loader_suffix(trainer: pl.Trainer, dataloader_idx: int) -> str:
    """What a metric's name ends in: nothing for the first set, which checkpoints can watch; ``/name`` for others."""
    if dataloader_idx == 0:
        return ""
    names = getattr(trainer.datamodule, "test_names" if trainer.testing else "val_names", None)  # type: ignore[attr-defined]
    return f"/{names[dataloader_idx] if names else dataloader_idx}"

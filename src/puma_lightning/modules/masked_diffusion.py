"""Masked diffusion: a model that fills in sequences in any order."""

from collections.abc import Collection
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from puma_lightning.data.base import Batch
from puma_lightning.forward_process import ForwardProcess, ProgressiveUnmasking, stratified_masking
from puma_lightning.losses import masked_cross_entropy
from puma_lightning.modules.generative import GenerativeModule, spread, true_positions
from puma_lightning.optim import WarmupCosine
from puma_lightning.output_layer import linear_cross_entropy
from puma_lightning.sampling import AnySampler, Sample, Sampler
from puma_lightning.unmasking import Prediction, Statistic, cut_blocks


class MaskedDiffusion(GenerativeModule):
    """A masked diffusion model; with ``ProgressiveUnmasking`` trained by PUMA, with ``RandomMasking`` as usual.

    Args:
        backbone: Any module from token ids (B, L) int64 to logits (B, L, V), with an attribute ``vocab_size``.
        mask_id: The mask token. The command line links it to the DataModule's.
        forward_process: What the model trains on: ``ProgressiveUnmasking``, ``RandomMasking`` or one of your own.
        sampler: How ``predict`` completes sequences.
        optimizer: Called with the parameters.
        scheduler: Called with the optimizer and stepped every optimizer step; null for a constant rate.
        init_from: Weights to start from (not a resume): a checkpoint of a diffusion or autoregressive
            model, a folder with a Qwen2 model in safetensors, or its name on the Hugging Face hub.
        shifted: Whether the backbone predicts position i+1 at position i, as it does when it is initialised from
            an autoregressive model. Loss, policies and samplers see logits aligned with positions all the same.

    Raises:
        ValueError: If the backbone has no ``vocab_size`` or is causal, or ``mask_id`` is outside the vocabulary.
    """

    sampler_class: type[AnySampler] = Sampler

    def __init__(
        self,
        backbone: nn.Module,
        mask_id: int,
        forward_process: ForwardProcess = ProgressiveUnmasking(),  # noqa: B008 - holds no state
        sampler: Sampler = Sampler(),  # noqa: B008 - holds no state
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=3e-4, weight_decay=0.01, fused=True),
        scheduler: LRSchedulerCallable | None = WarmupCosine,
        init_from: str | None = None,
        shifted: bool = False,
    ) -> None:
        super().__init__(backbone, forward_process, mask_id, optimizer, scheduler, init_from)
        if getattr(backbone, "causal", False):
            raise ValueError(
                f"{type(self).__name__} needs a backbone that sees all positions: set causal to false (also to "
                "initialise it from a causal one, with init_from and shifted), or train an AutoregressiveLM"
            )
        self.sampler = sampler
        self.shifted = shifted

    def denoise(self, xt: Tensor, x0: Tensor, block_size: int) -> Tensor:
        """Predict the masked positions; a block model also sees the clean blocks before each.

        Args:
            xt: Partly masked sequences, (B, L) int64.
            x0: The clean ones, (B, L) int64.
            block_size: L, or the length of the blocks of a block model.

        Returns:
            Logits aligned with positions, (B, L, V); -inf for the mask token.
        """
        logits: Tensor = self(xt)
        return logits

    @staticmethod
    def block_size_of(batch: Batch) -> int:
        """The length of the blocks of a training batch; its stages are (B, number of blocks)."""
        return batch["xt"].shape[1] // batch["stage"].shape[1]

    def aligned_states(self, xt: Tensor, x0: Tensor, block_size: int) -> Tensor:
        """As ``denoise``, but what the output layer reads: hidden states aligned with positions, (B, L, D)."""
        return self.align(self.backbone.hidden_states(xt))  # type: ignore[operator]

    def loss(
        self,
        xt: Tensor,
        x0: Tensor,
        block_size: int,
        weights: Tensor,
        reads: Collection[Statistic] | None = (),
        num_masked: int | None = None,
    ) -> tuple[Tensor, Tensor | Prediction]:
        """The weighted sum of the losses of all blocks, and what the model predicts.

        Args:
            xt: Partly masked sequences, (B, L) int64.
            x0: The clean ones, (B, L) int64.
            block_size: L, or the length of the blocks of a block model.
            weights: What each block counts for, (B * L / block size,) float.
            reads: The statistics wanted of the predictions; None for logits.
            num_masked: Masked positions of all sequences together. Without it the host waits for a GPU to count them.

        Returns:
            The loss, () float32, and the predictions without gradient: logits (B, L, V) or statistics, (B, L) each.
        """
        masked = xt == self.mask_id
        head = self.head()
        if head is None or reads is None:
            logits = self.denoise(xt, x0, block_size)
            rows = (cut_blocks(tensor, block_size) for tensor in (logits, x0, masked))
            return (masked_cross_entropy(*rows) * weights).sum(), logits.detach()
        index = true_positions(masked, num_masked)
        number = cut_blocks(masked, block_size).sum(1)
        each = (weights / number.clamp_min(1)).repeat_interleave(block_size) * masked.flatten()
        states = self.aligned_states(xt, x0, block_size).flatten(0, 1)
        loss, found = linear_cross_entropy(
            states[index], head.weight, x0.flatten()[index], each[index], head.bias, self.mask_id, reads
        )
        return loss, spread(found, index, xt.shape)

    def predict_masked(self, xt: Tensor, masked: Tensor, *wanted: Any) -> Prediction | None:
        """What a sampler needs of the masked positions, see ``predict_at``; None where logits do."""
        if self.head() is None:
            return None
        return self.predict_at(self.aligned_states(xt, xt, xt.shape[1]), masked, *wanted)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One forward pass gives the loss and moves the chains."""
        x0, xt = batch["input_ids"], batch["xt"]
        block_size = self.block_size_of(batch)
        # Blocks with nothing masked have no loss and do not count.
        counted = cut_blocks(xt == self.mask_id, block_size).any(1)
        # In float32 whatever the default dtype, which a Trainer in half precision changes.
        weights = counted.float() / counted.sum()
        known = {"num_masked": self.stream.num_masked} if xt.is_cuda else {}
        loss, predictions = self.loss(xt, x0, block_size, weights, self.forward_process.reads(), **known)
        self.check_finite(loss)
        self.stream.advance(predictions, self.global_step)
        self.log("train/loss", loss, prog_bar=True, batch_size=xt.shape[0])
        return loss

    def preflight(self, batch: Batch) -> None:
        """Check the shapes of the logits and of the policy's scores on the first batch."""
        x0, xt = batch["input_ids"], batch["xt"]
        block_size = self.block_size_of(batch)
        samplers = self.all_samplers()
        for sampler in samplers:
            self.check_sampler(sampler)
        parts: list[object] = [self.forward_process, *(getattr(s, "within", s) for s in samplers)]
        policies = [part.policy for part in parts if hasattr(part, "policy")]
        x0, xt = self.few(x0), self.few(xt)
        logits = self.denoise(xt, x0, block_size)
        self.check_logits(xt, logits)
        logits, xt = cut_blocks(logits, block_size), cut_blocks(xt, block_size)
        for policy in policies:
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

    def evaluation_loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, int]:
        """The per-token NELBO: n stratified over the batch, the same masks at every evaluation.

        Of a block model it is the sum of the NELBOs of its blocks, over the length of the answer.
        """
        x0 = batch["input_ids"]
        block_size = self.current_block_size() or x0.shape[1]
        rows, given = cut_blocks(x0, block_size), cut_blocks(batch["prompt_mask"], block_size)
        xt = stratified_masking(rows, given, self.mask_id, generator).view_as(x0)
        answer_length = (~given).sum(1).float().view(len(x0), -1)
        weights = answer_length / answer_length.sum(1, keepdim=True) / len(x0)
        return self.loss(xt, x0, block_size, weights.flatten())[0], len(x0)

    def current_block_size(self) -> int | None:
        """The length of the blocks now; None for one block as long as the sequence."""
        return None

    def complete(self, xt: Tensor, sampler: Sampler, generator: torch.Generator | None) -> Sample:
        return sampler(self, xt, self.mask_id, generator)

"""Autoregressive language models: the baseline from the left, and where diffusion models can start from."""

import copy
import inspect
from typing import Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from puma_lightning.chain.student import LeftToRightSampler, Sample
from puma_lightning.chain.teacher import NoMasking
from puma_lightning.data.batch import Batch
from puma_lightning.models.cache import KeyValueCache
from puma_lightning.models.calling import logits_of
from puma_lightning.modules.generative import GenerativeModule, check_eos
from puma_lightning.output.alignment import align
from puma_lightning.output.head import linear_cross_entropy, true_positions
from puma_lightning.output.losses import next_token_cross_entropy, trained_positions
from puma_lightning.output.prediction import Prediction
from puma_lightning.training.optim import WarmupCosine


class AutoregressiveLM(GenerativeModule):
    """A language model that predicts each token from those before it.

    Trained on the answer up to and including its first EOS.

    Args:
        backbone: A causal module from token ids (B, L) int64 to logits of the *next* token (B, L, V), with an
            attribute ``vocab_size``. If its ``forward`` takes a ``cache`` (see ``KeyValueCache``), sampling uses it.
        mask_id: The mask token: never predicted, but part of the vocabulary, so that a diffusion model can be
            initialised from this one. The command line links it to the DataModule's.
        eos_id: The token that ends and pads an answer; null if there is none. Linked to the DataModule's.
        sampler: How ``predict`` completes sequences.
        optimizer: Called with the parameters.
        scheduler: Called with the optimizer and stepped every optimizer step; null for a constant rate.
        init_from: Weights to start from (not a resume): a checkpoint, a folder with a Qwen2 model in
            safetensors, or its name on the Hugging Face hub.
        steps_per_execution: Optimizer steps for each time that callbacks and loggers have a turn; ``auto`` for as many
            as all intervals that are set allow, at most 64. What is learned is the same.
        captured: Whether to record the training step as a CUDA graph and replay it; ``auto`` for where that is
            possible.

    Raises:
        ValueError: If the backbone has no ``vocab_size`` or is not causal, or an id is outside the vocabulary.
    """

    shifted = True
    sampler_class = LeftToRightSampler

    def __init__(
        self,
        backbone: nn.Module,
        mask_id: int,
        eos_id: int | None = None,
        sampler: LeftToRightSampler = LeftToRightSampler(),  # noqa: B008 - holds no state
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=3e-4, weight_decay=0.01, fused=True),
        scheduler: LRSchedulerCallable | None = WarmupCosine,
        init_from: str | None = None,
        steps_per_execution: int | Literal["auto"] = 1,
        captured: bool | Literal["auto"] = False,
    ) -> None:
        super().__init__(backbone, NoMasking(), mask_id, optimizer, scheduler, init_from, steps_per_execution, captured)
        if not getattr(backbone, "causal", True):
            raise ValueError(
                "backbone: expected one that sees earlier positions alone for AutoregressiveLM, got causal = false; "
                "set causal to true"
            )
        self.eos_id = check_eos(eos_id, self.vocab_size, mask_id)
        self.sampler = sampler

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Predict every token of the answers from those before it; without a Trainer the batch is a clean one."""
        if "chains" not in batch:
            return self._loss(self.checked(batch))[0]
        known = self.head() is not None and self.captured.is_being_taken
        loss, _ = self._loss(batch, self.stream.num_masked if known else None)
        self.finish_step(loss, Prediction(), batch)  # no chain reads anything
        return loss

    def evaluation_loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, int]:
        """Return the negative log-likelihood; its mean over batches weighs every token the same."""
        loss, trained = self._loss(batch)
        return loss, max(1, int(trained.sum()))

    def predicted_positions(self, batch: Batch) -> Tensor:
        return trained_positions(batch["input_ids"], batch["prompt_mask"], self.eos_id)

    def _loss(self, batch: Batch, number: int | None = None) -> tuple[Tensor, Tensor]:
        # Padding is last, where no position that counts sees it: the model need not be told.
        x0 = batch["input_ids"]
        trained = self.predicted_positions(batch)
        head = self.head()
        if head is None:
            return next_token_cross_entropy(self(x0), x0, trained), trained
        index = true_positions(trained, number)
        states = align(self.backbone.hidden_states(x0), self.shifted).flatten(0, 1)[index]  # type: ignore[operator]
        weights = trained.flatten()[index].float() / trained.sum().clamp_min(1)
        target = x0.flatten()[index]
        loss, _ = linear_cross_entropy(states, head.weight, target, weights, head.bias, self.mask_id)
        return loss, trained

    def complete(
        self,
        xt: Tensor,
        sampler: LeftToRightSampler,
        generator: torch.Generator | None,
        attention_mask: Tensor | None = None,
    ) -> Sample:
        reader = _Reader(self.backbone, xt.shape[1], self.head(any_vocabulary=True))
        return sampler(reader, xt, self.mask_id, self.eos_id, generator)


class _Reader:
    """The model as a sampler from the left sees it: it reads sequences piece by piece and predicts what comes next."""

    def __init__(self, backbone: nn.Module, length: int, head: nn.Linear | None) -> None:
        self.backbone = backbone
        self.head = head
        cached = "cache" in inspect.signature(backbone.forward).parameters
        self.cache = KeyValueCache(length) if cached else None
        self.seen: Tensor | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        if self.cache is not None and self.head is not None:
            # Only the logits of the last position are wanted, also when a whole prompt is read.
            logits = self.head(self.backbone.hidden_states(tokens, self.cache)[:, -1:])  # type: ignore[operator]
        elif self.cache is not None:
            logits = logits_of(self.backbone, tokens, cache=self.cache)
        else:
            self.seen = tokens if self.seen is None else torch.cat([self.seen, tokens], dim=1)
            logits = logits_of(self.backbone, self.seen)
        last: Tensor = logits[:, -1]
        return last

    def select(self, rows: Tensor) -> "_Reader":
        chosen = copy.copy(self)
        chosen.cache = None if self.cache is None else self.cache.select(rows)
        chosen.seen = None if self.seen is None else self.seen[rows]
        return chosen

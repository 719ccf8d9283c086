"""Masked diffusion: a model that fills in sequences in any order."""

from collections.abc import Collection
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from puma_lightning.chain.chains import Chains
from puma_lightning.chain.student import AnySampler, Sample, Sampler
from puma_lightning.chain.student.recorded import Passes
from puma_lightning.chain.teacher import ForwardProcess, ProgressiveUnmasking
from puma_lightning.chain.teacher.random_masking import stratified_masking
from puma_lightning.data.batch import Batch, padded_to_multiple
from puma_lightning.modules.generative import GenerativeModule, check_eos, padding_of
from puma_lightning.output.alignment import align
from puma_lightning.output.head import linear_cross_entropy, predict_where, spread, true_positions
from puma_lightning.output.losses import masked_cross_entropy
from puma_lightning.output.prediction import Prediction, Statistic
from puma_lightning.training.host import on_host
from puma_lightning.training.optim import WarmupCosine


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
        eos_id: The token that ends an answer, for samplers that ``end_at_eos``; null if there is none. Linked to the
            DataModule's.
        steps_per_execution: Optimizer steps for each time that callbacks and loggers have a turn; ``auto`` for as many
            as all intervals that are set allow, at most 64. What is learned is the same.
        captured: Whether to record the training step as a CUDA graph and replay it; ``auto`` for where that is
            possible.

    Raises:
        ValueError: If the backbone has no ``vocab_size`` or is causal, or an id is outside the vocabulary.
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
        eos_id: int | None = None,
        steps_per_execution: int | Literal["auto"] = 1,
        captured: bool | Literal["auto"] = False,
    ) -> None:
        super().__init__(
            backbone, forward_process, mask_id, optimizer, scheduler, init_from, steps_per_execution, captured
        )
        if getattr(backbone, "causal", False):
            raise ValueError(
                f"backbone: expected one that sees all positions for {type(self).__name__}, got a causal one; set "
                "causal to false (also to initialise from a causal one, with init_from and shifted), or train an "
                "AutoregressiveLM"
            )
        self.sampler = sampler
        self.shifted = shifted
        self.eos_id = check_eos(eos_id, self.vocab_size, mask_id)

    def check_sampler(self, sampler: AnySampler) -> None:
        """Check that a sampler is one for this kind of model, and that there is an EOS if it ends at one."""
        super().check_sampler(sampler)
        within: Any = getattr(sampler, "within", sampler)  # of a block
        if getattr(within, "end_at_eos", False):
            within.check_eos(self.eos_id)

    def current_block_size(self) -> int | None:
        """Return the length of the blocks that the model was trained in last, which is what it can be evaluated in.

        None for a model without blocks.
        """
        return None if self.block_size is None else self.trained_in or self.block_size.at(0)

    def aligned_states(self, chains: Chains) -> Tensor:
        """Return what the output layer reads: hidden states aligned with positions, (N, L, D)."""
        states = self.backbone.hidden_states(chains.xt, **padding_of(chains.attention_mask))  # type: ignore[operator]
        return align(states, self.shifted)

    def loss(
        self,
        chains: Chains,
        weights: Tensor,
        reads: Collection[Statistic] | None = (),
        num_masked: int | None = None,
    ) -> tuple[Tensor, Tensor | Prediction]:
        """Return the weighted sum of the losses of all chains, and what the model predicts.

        Args:
            chains: Partly masked sequences, or their blocks.
            weights: What each chain counts for (N,) float.
            reads: The statistics wanted of the predictions; None for logits.
            num_masked: Masked positions of all chains together. Without it the host waits for a GPU to count them.

        Returns:
            The loss, () float32, and the predictions without gradient: logits, (N, L, V), or statistics, (N, L) each.
        """
        head = self.head()
        if head is None or reads is None:
            logits = self.denoise(chains)
            return (masked_cross_entropy(logits, chains.x0, chains.masked) * weights).sum(), logits.detach()
        return self._loss_of_masked(self.aligned_states(chains), head, chains, weights, reads, num_masked)

    @on_host
    def _loss_of_masked(
        self,
        states: Tensor,
        head: nn.Linear,
        chains: Chains,
        weights: Tensor,
        reads: Collection[Statistic],
        num_masked: int | None,
    ) -> tuple[Tensor, Prediction]:
        """Run the output layer on the masked positions alone, of which every batch has another number."""
        masked = chains.masked
        index = true_positions(masked, num_masked)
        each = ((weights / masked.sum(1).clamp_min(1))[:, None] * masked).flatten()
        states, target = states.flatten(0, 1)[index], chains.x0.flatten()[index]
        loss, found = linear_cross_entropy(states, head.weight, target, each[index], head.bias, self.mask_id, reads)
        return loss, spread(found, index, masked.shape)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Take one forward pass, which gives the loss and moves the chains.

        Without a Trainer the batch is a clean one, whose chains are started by ``chains`` and not moved.
        """
        chains: Chains = batch["chains"] if "chains" in batch else self.chains(batch)
        # Chains with nothing masked have no loss and do not count.
        counted = chains.masked.any(1)
        # In float32 whatever the default dtype, which a Trainer in half precision changes.
        weights = counted.float() / counted.sum()
        if "chains" not in batch:
            return self.loss(chains, weights)[0]
        known = self.head() is not None and (chains.xt.is_cuda or self.captured.is_being_taken)
        number = self.stream.num_masked if known else None
        loss, predictions = self.loss(chains, weights, self.forward_process.reads(), number)
        self.finish_step(loss, predictions, batch)
        return loss

    def predicted_positions(self, batch: Any) -> Tensor:
        chains: Chains = batch["chains"]
        return chains.masked

    def log_step(self, loss: Tensor, batch: Any) -> None:
        super().log_step(loss, batch)
        if self.block_size is not None:
            self.trained_in = batch["chains"].x0.shape[1]
            # Lightning would make a tensor of a number, by a copy that waits for the device.
            block_size = torch.full((), float(self.trained_in), device=self.device)
            self.log("train/block_size", block_size, batch_size=len(batch["input_ids"]))

    def evaluation_loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, int]:
        """Return the per-token NELBO, with n stratified over the batch, and the same masks at every evaluation.

        For a block model it is the sum of the NELBOs of its blocks, over the length of the answer.
        """
        chains, weights = self._chains_of_evaluation(batch, generator)
        return self.loss(chains, weights)[0], len(batch["input_ids"])

    @on_host
    def _chains_of_evaluation(self, batch: Batch, generator: torch.Generator) -> tuple[Chains, Tensor]:
        """Return partly masked chains of a clean batch, and what each counts for."""
        size = len(batch["input_ids"])
        block_size = self.current_block_size()
        batch = padded_to_multiple(batch, block_size or 1, self.mask_id)
        chains = Chains.fully_masked(
            batch["input_ids"],
            batch["prompt_mask"],
            self.mask_id,
            block_size=block_size,
            attention_mask=batch.get("attention_mask"),
        )
        answer_length = chains.answer_length.float().view(size, -1)
        weights = answer_length / answer_length.sum(1, keepdim=True) / size
        return stratified_masking(chains, generator), weights.flatten()

    def complete(
        self,
        xt: Tensor,
        sampler: Sampler,
        generator: torch.Generator | None,
        attention_mask: Tensor | None = None,
    ) -> Sample:
        ends: dict[str, Any] = {"eos_id": self.eos_id} if getattr(sampler, "end_at_eos", False) else {}
        return sampler(Canvas(self, attention_mask), xt, self.mask_id, generator, **ends)


class Canvas:
    """A masked diffusion model as an any-order sampler sees it: it looks at whole sequences, each on its own.

    A model that knows more of the rows of a batch than is in xt defines ``select(rows)``, which returns the model for
    these rows alone.

    Args:
        model: The model.
        attention_mask: False where a position of the batch is padding, (B, L) bool; None where nothing is.

    Attributes:
        static_shapes: Whether parts of the backbone are compiled, so that a batch of another size would be compiled for
            again.
    """

    def __init__(self, model: MaskedDiffusion, attention_mask: Tensor | None = None) -> None:
        self.model = model
        self.attention_mask = attention_mask
        modules = model.backbone.modules()
        self.static_shapes = any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in modules)

    def __call__(self, xt: Tensor) -> Tensor:
        """Return logits of partly masked sequences, (B, L, V), from xt, (B, L)."""
        logits: Tensor = self.model(xt, **padding_of(self.attention_mask))
        return logits

    @property
    def per_position(self) -> bool:
        """Whether the output layer runs on masked positions alone."""
        return self.model.head() is not None

    @property
    def passes(self) -> Passes | None:
        """Recorded passes of the model, which holds them; None where one more call of its Python could do other things.

        That is if it has a ``select`` or hooks, or if weights are gathered for a pass, as FSDP does. And none are
        recorded of a model that is not ``captured``.
        """
        model = self.model
        parts = list(model.modules())
        if (
            not model.captured.captured
            or hasattr(model, "select")
            or any(m._forward_hooks or m._forward_pre_hooks for m in parts)
            or any(hasattr(m, "_fsdp_wrapped_module") for m in parts)
            or any(type(weight) is not nn.Parameter for weight in model.parameters())
        ):
            return None
        passes: Passes = vars(model).setdefault("_passes", Passes())
        return passes

    def inputs(self) -> dict[str, Tensor]:
        """Return what is known of the rows of the batch besides xt."""
        return padding_of(self.attention_mask)

    def with_inputs(self, inputs: dict[str, Tensor]) -> "Canvas":
        """Return the model for rows of which this is known."""
        return Canvas(self.model, **inputs)

    def predict_masked(
        self,
        xt: Tensor,
        masked: Tensor,
        reads: Collection[Statistic],
        temperature: float,
        top_p: float,
        generator: torch.Generator | None,
        number: int | None = None,
    ) -> Prediction | None:
        """Say what a sampler needs of the masked positions, see ``predict_where``; None where logits do."""
        head = self.model.head()
        if head is None:
            return None
        padding = padding_of(self.attention_mask)
        states = self.model.backbone.hidden_states(xt, **padding)  # type: ignore[operator]
        states, mask_id = align(states, self.model.shifted), self.model.mask_id
        return predict_where(masked, states, head, mask_id, reads, temperature, top_p, generator, number)

    def select(self, rows: Tensor) -> "Canvas":
        """Return the model for these rows, (n,), of a batch alone: itself, unless it says otherwise."""
        select = getattr(self.model, "select", None)
        if select is None and self.attention_mask is None:
            return self
        kept = None if self.attention_mask is None else self.attention_mask[rows]
        return Canvas(self.model if select is None else select(rows), kept)

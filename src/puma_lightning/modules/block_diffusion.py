"""Block diffusion: blocks from left to right, the positions of a block in any order."""

import copy
import inspect
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from puma_lightning.chain.blocks import check_block_size, cut_blocks, join_blocks
from puma_lightning.chain.chains import Chains, padding_token
from puma_lightning.chain.stages import StepSchedule
from puma_lightning.chain.student import AnySampler, BlockSampler, Sample, Sampler
from puma_lightning.chain.teacher import ForwardProcess, ProgressiveUnmasking
from puma_lightning.models.cache import KeyValueCache
from puma_lightning.models.calling import check_takes_padding
from puma_lightning.modules.generative import padding_of
from puma_lightning.modules.masked_diffusion import MaskedDiffusion
from puma_lightning.output.alignment import align
from puma_lightning.output.head import predict_where
from puma_lightning.output.prediction import Prediction, exclude_token
from puma_lightning.training.optim import WarmupCosine


class BlockDiffusion(MaskedDiffusion):
    """A block diffusion model: each block is a masked diffusion model given the clean blocks before it.

    Sequences are cut into blocks, each of which runs a chain of its own; with ``ProgressiveUnmasking`` that is PUMA
    for block diffusion. One forward pass over ``[xt ; x0]`` trains all blocks at once (arXiv 2503.09573). Blocks of one
    position make an autoregressive model, one block as long as the sequence makes ``MaskedDiffusion``.

    Args:
        backbone: A ``TransformerBackbone``, or a module with the same ``hidden_states``, ``lm_head`` and
            ``vocab_size``.
        mask_id: The mask token. The command line links it to the DataModule's.
        block_size: Length of a block; or a curriculum of ``[optimizer step, length]`` pairs such as
            ``[[0, 4], [20000, 16], [60000, 64]]``. On a switch, sequences stay as masked as they are. Where
            a size does not divide the sequences, they are padded to a multiple of all sizes, and the last block is
            shorter.
        eos_id: The token that ends an answer, after which nothing is generated; null if there is none. Linked to the
            DataModule's.
        forward_process: What each block trains on: ``ProgressiveUnmasking``, ``RandomMasking`` or one of your own.
        sampler: How ``predict`` completes sequences: a ``BlockSampler``.
        optimizer: Called with the parameters.
        scheduler: Called with the optimizer and stepped every optimizer step; null for a constant rate.
        init_from: Weights to start from (not a resume): a checkpoint of a block, masked diffusion or
            autoregressive model, a folder with a Qwen2 model in safetensors, or its name on the Hugging Face hub.
        shifted: Whether the backbone predicts position i+1 at position i, as it does when it is initialised from
            an autoregressive model. The first position of a block is then predicted at the clean one before it.
        steps_per_execution: Optimizer steps for each time that callbacks and loggers have a turn; ``auto`` for as many
            as all intervals that are set allow, at most 64. What is learned is the same.
        captured: Whether to record the training step as a CUDA graph and replay it; ``auto`` for where that is
            possible.

    Raises:
        ValueError: If the backbone or the sampler cannot be used, an id is outside the vocabulary, or ``block_size`` is
            no schedule of growing lengths.
    """

    sampler_class = BlockSampler

    def __init__(
        self,
        backbone: nn.Module,
        mask_id: int,
        block_size: int | list[tuple[int, int]],
        eos_id: int | None = None,
        forward_process: ForwardProcess = ProgressiveUnmasking(4),  # noqa: B008 - holds no state
        sampler: BlockSampler | Sampler = BlockSampler(),  # noqa: B008 - holds no state
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=3e-4, weight_decay=0.01, fused=True),
        scheduler: LRSchedulerCallable | None = WarmupCosine,
        init_from: str | None = None,
        shifted: bool = False,
        steps_per_execution: int | Literal["auto"] = 1,
        captured: bool | Literal["auto"] = False,
    ) -> None:
        schedule = StepSchedule("block_size", block_size)
        _check_backbone(backbone)
        super().__init__(
            backbone,
            mask_id,
            forward_process,
            sampler,  # type: ignore[arg-type]
            optimizer,
            scheduler,
            init_from,
            shifted,
            eos_id,
            steps_per_execution,
            captured,
        )
        self.block_size: StepSchedule = schedule
        self.check_sampler(sampler)

    def forward(  # type: ignore[override]
        self, xt: Tensor, x0: Tensor, block_size: int | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Predict every position, never as the mask token; all blocks in one pass.

        Args:
            xt: Partly masked sequences, (B, L) int64.
            x0: What each block sees of the blocks before it, (B, L) int64.
            block_size: Length of a block; the current one if not given.
            attention_mask: False where a position is padding, which belongs at the end, (B, L) bool; None where nothing
                is.

        Returns:
            Logits aligned with positions, (B, L, V); -inf for the mask token.
        """
        states = _states(self, xt, x0, attention_mask, block_size or self.current_block_size() or xt.shape[1])
        logits = exclude_token(self.backbone.lm_head(states), self.mask_id)  # type: ignore[operator]
        return logits.view(*xt.shape, -1)

    def denoise(self, chains: Chains) -> Tensor:
        size = chains.x0.shape[1]
        xt, x0, attention_mask = _sequences(chains)
        return cut_blocks(self(xt, x0, size, **padding_of(attention_mask)), size)

    def aligned_states(self, chains: Chains) -> Tensor:
        return _states(self, *_sequences(chains), chains.x0.shape[1])

    def check_sampler(self, sampler: AnySampler) -> None:
        """Check that a sampler is one for block models, and that it can generate as far as it is asked to."""
        if isinstance(sampler, Sampler):
            raise ValueError(
                "sampler: expected a BlockSampler for BlockDiffusion, got a Sampler, which completes a whole sequence "
                "in any order; say with it how each block is completed: BlockSampler(within=Sampler(...)), or "
                "`within: {...}` in YAML"
            )
        super().check_sampler(sampler)
        assert isinstance(sampler, BlockSampler)
        longest = getattr(self.backbone, "max_length", None)
        if sampler.length is not None:
            for size in self.block_size.values:
                check_block_size(size, sampler.length)
            if isinstance(longest, int) and sampler.length > longest:
                raise ValueError(
                    f"sampler: expected a length of at most the backbone's max_length {longest}, got {sampler.length}; "
                    "raise max_length, which changes no weights but those of learned positions"
                )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add how far the curriculum has come."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["block_size"] = self.current_block_size()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the curriculum from where it was."""
        super().on_load_checkpoint(checkpoint)
        self.trained_in = checkpoint["block_size"]

    def complete(  # type: ignore[override]
        self,
        xt: Tensor,
        sampler: BlockSampler,
        generator: torch.Generator | None,
        attention_mask: Tensor | None = None,
    ) -> Sample:
        size = self.current_block_size()
        assert size is not None
        wanted = max(xt.shape[1], sampler.length or 0)
        length, real = -(-wanted // size) * size, attention_mask
        if real is not None or length > wanted:
            more = (0, length - xt.shape[1])
            real = F.pad(torch.ones_like(xt, dtype=torch.bool) if real is None else real, more)
            # A row is generated up to the sampler's length, however long the longest in its batch is.
            new = ~real & (torch.arange(length, device=xt.device) < (sampler.length or 0))
            xt, real = F.pad(xt, more, value=padding_token(self.mask_id)).masked_fill(new, self.mask_id), real | new
        sample = sampler(CachedBlocks(self, length, **padding_of(real)), xt, self.mask_id, size, self.eos_id, generator)
        if real is None:
            return sample
        columns = torch.arange(wanted, device=xt.device).expand(len(xt), -1)
        return replace(sample, attention_mask=None if real[:, :wanted].all() else real).in_order(columns)


class CachedBlocks:
    """Predicts the next block of sequences whose finished blocks it has read; their keys and values are kept.

    Exact, because a clean position sees nothing that is still to be filled in.

    Args:
        model: The model.
        length: How many positions there will be.
        attention_mask: False where one of them is padding, (B, ``length``) bool; None where nothing is.
    """

    def __init__(self, model: BlockDiffusion, length: int, attention_mask: Tensor | None = None) -> None:
        self.model = model
        self.cache = KeyValueCache(length)
        self.attention_mask = attention_mask
        self.before: Tensor | None = None

    def read(self, tokens: Tensor, block_size: int) -> None:
        """Take the next finished blocks of every row, (B, n)."""
        padding = self._padding(tokens)
        hidden = self.model.backbone.hidden_states(tokens, self.cache, block_size, **padding)  # type: ignore[operator]
        self.before = hidden[:, -1:]

    def __call__(self, xt: Tensor) -> Tensor:
        """Return logits of the block after them, (B, S, V), from its partly masked tokens, (B, S)."""
        logits: Tensor = self.model.backbone.lm_head(self._states(xt))  # type: ignore[operator]
        return logits

    def predict_masked(self, xt: Tensor, masked: Tensor, *wanted: Any) -> Prediction | None:
        """Say what a sampler needs of the masked positions of the block after them; None where logits do."""
        head = self.model.head()
        return None if head is None else predict_where(masked, self._states(xt), head, self.model.mask_id, *wanted)

    def _states(self, xt: Tensor) -> Tensor:
        start = self.cache.length
        hidden = self.model.backbone.hidden_states(xt, self.cache, **self._padding(xt))  # type: ignore[operator]
        self.cache.length = start
        return align(hidden, self.model.shifted, self.before)

    def _padding(self, tokens: Tensor) -> dict[str, Tensor]:
        """Say what is padding of the positions in the cache and those that come next."""
        end = self.cache.length + tokens.shape[1]
        return padding_of(None if self.attention_mask is None else self.attention_mask[:, :end])

    def select(self, rows: Tensor) -> "CachedBlocks":
        """Return the same for these rows, (n,), of the batch alone."""
        chosen = copy.copy(self)
        chosen.cache = self.cache.select(rows)
        chosen.attention_mask = None if self.attention_mask is None else self.attention_mask[rows]
        chosen.before = None if self.before is None else self.before[rows]
        return chosen


def _sequences(chains: Chains) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return xt, x0 and attention mask of whole sequences, (B, L) each."""
    real = chains.attention_mask
    xt, x0 = (join_blocks(rows, chains.num_blocks) for rows in (chains.xt, chains.x0))
    return xt, x0, None if real is None else join_blocks(real, chains.num_blocks)


def _states(model: BlockDiffusion, xt: Tensor, x0: Tensor, attention_mask: Tensor | None, block_size: int) -> Tensor:
    """Return hidden states aligned with positions, (B * L / S, S, D), of one pass over ``[xt ; x0]``."""
    length = xt.shape[1]
    # Nobody sees the last block of x0.
    seen = length - block_size
    options = padding_of(attention_mask)
    if options:
        check_takes_padding(model.backbone.hidden_states)  # type: ignore[arg-type]
    hidden = model.backbone.hidden_states(xt, block_size=block_size, clean=x0[:, :seen], **options)  # type: ignore[operator]
    noisy, clean = hidden.split([length, seen], dim=1)
    before = torch.cat([noisy[:, :1], clean[:, block_size - 1 :: block_size]], dim=1)
    return align(cut_blocks(noisy, block_size), model.shifted, before.flatten(0, 1)[:, None])


def _check_backbone(backbone: nn.Module) -> None:
    states = getattr(backbone, "hidden_states", None)
    needed = {"cache", "block_size", "clean"}
    missing = needed if states is None else needed - set(inspect.signature(states).parameters)
    if missing or not hasattr(backbone, "lm_head"):
        raise ValueError(
            "backbone: expected lm_head and hidden_states(input_ids, cache, block_size, clean), as "
            f"TransformerBackbone has them and block diffusion needs them, got {type(backbone).__name__}; use a "
            "TransformerBackbone, or add them"
        )

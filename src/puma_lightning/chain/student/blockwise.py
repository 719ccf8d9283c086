"""The student's chain in block diffusion: blocks from the left, the positions of a block in any order."""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from puma_lightning.chain.blocks import check_block_size
from puma_lightning.chain.student.any_order import Sampler
from puma_lightning.chain.student.sample import Sample, Selectable


class BlockReader(Selectable, Protocol):
    """A block diffusion model that remembers the finished blocks it has read.

    Example:
        >>> class AlwaysSeven:
        ...     def read(self, tokens, block_size):
        ...         pass
        ...     def __call__(self, xt):
        ...         return torch.nn.functional.one_hot(torch.full_like(xt, 7), 10).float()
        ...     def select(self, rows):
        ...         return self
        >>> BlockSampler()(AlwaysSeven(), torch.tensor([[5, 9, 9, 9]]), mask_id=9, block_size=2).tokens
        tensor([[5, 7, 7, 7]])
    """

    def read(self, tokens: Tensor, block_size: int) -> None:
        """Take the next finished blocks of every row, (B, n) with n a multiple of the block size."""

    def __call__(self, xt: Tensor) -> Tensor:
        """Return logits of the block after them, (B, S, V), from its partly masked tokens, (B, S)."""


class BlockSampler:
    """Block diffusion: one block after another, each completed in any order and then read once.

    Its passes are never recorded, as those of a ``Sampler`` are: what a model has read grows from block to block, and
    so do the shapes of a pass.

    A row ends with the block in which it first generates EOS, and within it there if ``within`` has ``end_at_eos``. The
    number of forward passes includes those that read a finished block, and one that reads the blocks that are given.

    Args:
        within: How a block is completed; its ``num_steps`` are for each block.
        length: Generate up to this many positions where sequences are shorter, a multiple of the block size. It may be
            more than in training if the backbone's ``max_length`` allows; null for the length of the sequences.

    Raises:
        ValueError: If the length is below 1.

    Example:
        >>> BlockSampler(Sampler(tokens_per_step=2), length=64).name
        'block_confidence_2_L64'
    """

    def __init__(self, within: Sampler = Sampler(), length: int | None = None) -> None:  # noqa: B008 - holds no state
        if length is not None and length < 1:
            raise ValueError(f"length: expected at least 1, got {length}; null generates as far as the sequences go")
        self.within = within
        self.length = length

    @property
    def name(self) -> str:
        """A short name for logs: ``block_confidence_1``."""
        return f"block_{self.within.name}" + (f"_L{self.length}" if self.length else "")

    @torch.no_grad()
    def __call__(
        self,
        model: BlockReader,
        xt: Tensor,
        mask_id: int,
        block_size: int,
        eos_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Sample:
        """Complete a batch.

        Args:
            model: Reads finished blocks and predicts the next.
            xt: Sequences with the mask token at the positions to fill, (B, L) int64.
            mask_id: The mask token; it is never drawn.
            block_size: Length of a block.
            eos_id: The token that ends a row; the blocks after it are filled with it.
            generator: Source of all randomness, on the device of ``xt``.

        Returns:
            The completed sequences, (B, ``length``) where that is longer.

        Raises:
            ValueError: If the blocks do not fill the sequences.
        """
        tokens = F.pad(xt, (0, max(0, (self.length or 0) - xt.shape[1])), value=mask_id)
        check_block_size(block_size, tokens.shape[1])
        masked = tokens == mask_id
        whole = Sample.of_masked(tokens, mask_id)
        tokens, reveal_step, nfe = whole.tokens, whole.reveal_step, whole.nfe
        to_fill = masked.view(len(masked), -1, block_size).any(2)
        blocks = torch.arange(to_fill.shape[1], device=tokens.device)
        first, last = to_fill.long().argmax(1), torch.where(to_fill, blocks, -1).amax(1)
        rows = (last >= 0).nonzero().squeeze(1)
        if not len(rows):
            return whole
        if len(rows) < len(tokens):
            model = model.select(rows)
        # A row pays one pass for its prompt, in however many parts the batch's other rows let it be read.
        nfe[rows] += first[rows] > 0
        start = int(first[rows].min())
        if start:
            model.read(tokens[rows, : start * block_size], block_size)
        # A sampler of one's own may know nothing of an EOS.
        ends: dict[str, Any] = {"eos_id": eos_id} if getattr(self.within, "end_at_eos", False) else {}
        for block in range(start, to_fill.shape[1]):
            here = slice(block * block_size, (block + 1) * block_size)
            sample = self.within(model, tokens[rows, here], mask_id, generator, **ends)
            filled = masked[rows, here]
            tokens[rows, here] = sample.tokens
            reveal_step[rows, here] = torch.where(filled, nfe[rows, None] + sample.reveal_step, -1)
            nfe[rows] += sample.nfe
            going = last[rows] > block
            if eos_id is not None:
                ended = (filled & (sample.tokens == eos_id)).any(1)
                whole.end_rows(rows[ended], masked, here.stop, eos_id)
                going &= ~ended
            if not going.all():
                rows = rows[going]
                if not len(rows):
                    break
                model = model.select(going.nonzero().squeeze(1))
            model.read(tokens[rows, here], block_size)
            nfe[rows] += first[rows] <= block
        return whole

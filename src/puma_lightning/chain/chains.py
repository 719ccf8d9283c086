"""The state of the chains that a training batch holds: one chain a row."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from puma_lightning.chain.blocks import cut_blocks, join_blocks


def padding_token(mask_id: int) -> int:
    """Return the token that stands where there is only padding. It is not the mask token, and nothing sees it.

    Example:
        >>> padding_token(9), padding_token(0)
        (0, 1)
    """
    return int(mask_id == 0)


@dataclass(eq=False)
class Chains:
    """N clean sequences, each somewhere on its way from fully masked to clean.

    In block diffusion every block of a sequence runs a chain of its own; L is the length of a block then, and the
    blocks of one sequence are consecutive rows. A process never changes chains in place: it returns others, made with
    ``dataclasses.replace``.

    Attributes:
        x0: Clean sequences, (N, L) int64.
        prompt_mask: True where a position is given, (N, L) bool.
        xt: The partly masked sequences to train on, (N, L) int64.
        stage: How far along its chain each sequence is, s in 0..K-1, (N,) int64.
        done: True where the chain is over, (N,) bool.
        num_stages: The K that ``stage`` counts in.
        mask_id: The mask token.
        num_blocks: Chains of each sequence.
        attention_mask: False where a position is padding, (N, L) bool; None where nothing is. Padding is part of the
            ``prompt_mask``, as it is not to be predicted; unlike what is given, no position sees it.

    Example:
        >>> import torch
        >>> x0 = torch.tensor([[5, 3, 8, 1]])
        >>> given = torch.tensor([[True, False, False, False]])
        >>> chains = Chains.fully_masked(x0, given, mask_id=9)
        >>> chains.xt
        tensor([[5, 9, 9, 9]])
        >>> chains.answer_length, chains.revealed
        (tensor([3]), tensor([0]))
    """

    x0: Tensor
    prompt_mask: Tensor
    xt: Tensor
    stage: Tensor
    done: Tensor
    num_stages: int
    mask_id: int
    num_blocks: int = 1
    attention_mask: Tensor | None = None

    @classmethod
    def fully_masked(
        cls,
        x0: Tensor,
        prompt_mask: Tensor,
        mask_id: int,
        num_stages: int = 1,
        stage: Tensor | None = None,
        block_size: int | None = None,
        attention_mask: Tensor | None = None,
    ) -> "Chains":
        """Make chains of clean sequences with the whole answer masked; a chain without an answer is over.

        Args:
            x0: Clean sequences, (B, L) int64.
            prompt_mask: True where a position is given, (B, L) bool.
            mask_id: The mask token.
            num_stages: K.
            stage: The stage each chain starts at, (N,) int64; 0 by default.
            block_size: Cut every sequence into blocks of this length, each a chain; by default the whole is one.
            attention_mask: False where a position is padding, (B, L) bool; None where nothing is. Padding must be part
                of ``prompt_mask`` and hold another token than the mask; ``padded`` makes it so.

        Raises:
            ValueError: If the block size does not divide L.
        """
        num_blocks = 1
        if block_size is not None:
            num_blocks = x0.shape[1] // block_size
            x0, prompt_mask = cut_blocks(x0, block_size), cut_blocks(prompt_mask, block_size)
            attention_mask = None if attention_mask is None else cut_blocks(attention_mask, block_size)
        if stage is None:
            stage = torch.zeros(len(x0), dtype=torch.long, device=x0.device)
        xt = x0.masked_fill(~prompt_mask, mask_id)
        return cls(x0, prompt_mask, xt, stage, prompt_mask.all(1), num_stages, mask_id, num_blocks, attention_mask)

    @property
    def masked(self) -> Tensor:
        """True where xt is masked, (N, L) bool."""
        return self.xt == self.mask_id

    @property
    def answer_length(self) -> Tensor:
        """A, the positions that are not given, (N,) int64."""
        return (~self.prompt_mask).sum(1)

    @property
    def revealed(self) -> Tensor:
        """How many answer positions are not masked, (N,) int64."""
        return self.answer_length - self.masked.sum(1)

    def uniform(self, generator: torch.Generator | None) -> Tensor:
        """Draw a number in [0, 1) for each chain, (N,) float32, from a generator on the chains' device."""
        return torch.rand(len(self.x0), dtype=torch.float, device=self.x0.device, generator=generator)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensor fields by name."""
        named: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def with_length(self, length: int, block_size: int | None = None) -> "Chains":
        """Pad the sequences at their ends, or cut padding off, so that they have another length.

        Args:
            length: The new length of whole sequences.
            block_size: The length of the blocks, which divides it; None if each sequence is one chain, however long.

        Example:
            >>> import torch
            >>> x0, given = torch.tensor([[5, 3]]), torch.tensor([[True, False]])
            >>> longer = Chains.fully_masked(x0, given, mask_id=9).with_length(4)
            >>> longer.xt, longer.attention_mask
            (tensor([[5, 9, 0, 0]]), tensor([[ True,  True, False, False]]))
        """
        now = self.num_blocks * self.x0.shape[1]
        if length == now:
            return self
        blocks = 1 if block_size is None else length // block_size
        token = padding_token(self.mask_id)
        filling: dict[str, Any] = {"x0": token, "xt": token, "prompt_mask": True, "attention_mask": False}
        real = torch.ones_like(self.prompt_mask) if self.attention_mask is None else self.attention_mask
        changed: dict[str, Any] = {}
        for name, rows in {**self.tensors(), "attention_mask": real}.items():
            if name in filling:
                whole = F.pad(join_blocks(rows, self.num_blocks), (0, length - now), value=filling[name])
                changed[name] = cut_blocks(whole, block_size or length)
            else:  # one for each chain: those of new blocks are over, as there is nothing to predict
                over = int(name == "done")
                changed[name] = F.pad(
                    rows.view(-1, self.num_blocks), (0, blocks - self.num_blocks), value=over
                ).flatten()
        return replace(self, **changed, num_blocks=blocks)

    def with_rows(self, rows: Tensor, others: "Chains") -> "Chains":
        """Put other chains in some rows, (n,) int64."""
        if self.attention_mask is None and others.attention_mask is not None:
            return self.with_attention().with_rows(rows, others)
        old, new = self.tensors(), (others if self.attention_mask is None else others.with_attention()).tensors()
        changed: dict[str, Any] = {name: old[name].index_copy(0, rows, new[name]) for name in old}
        return replace(self, **changed)

    def with_attention(self) -> "Chains":
        """Return the same chains with an ``attention_mask``, of True if they had none."""
        return self if self.attention_mask is not None else replace(self, attention_mask=self.prompt_mask | True)

    def to(self, device: torch.device | str) -> "Chains":
        """Return the same chains on a device."""
        return self.map(lambda tensor: tensor.to(device))

    def map(self, function: Callable[[Tensor], Tensor]) -> "Chains":
        """Apply a function to every tensor field."""
        changed: dict[str, Any] = {name: function(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **changed)

"""The state of the chains that a training batch holds: one chain a row."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from puma_lightning.chain.blocks import cut_blocks


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

    @classmethod
    def fully_masked(
        cls,
        x0: Tensor,
        prompt_mask: Tensor,
        mask_id: int,
        num_stages: int = 1,
        stage: Tensor | None = None,
        block_size: int | None = None,
    ) -> "Chains":
        """Make chains of clean sequences with the whole answer masked; a chain without an answer is over.

        Args:
            x0: Clean sequences, (B, L) int64.
            prompt_mask: True where a position is given, (B, L) bool.
            mask_id: The mask token.
            num_stages: K.
            stage: The stage each chain starts at, (N,) int64; 0 by default.
            block_size: Cut every sequence into blocks of this length, each a chain; by default the whole is one.

        Raises:
            ValueError: If the block size does not divide L.
        """
        num_blocks = 1
        if block_size is not None:
            num_blocks = x0.shape[1] // block_size
            x0, prompt_mask = cut_blocks(x0, block_size), cut_blocks(prompt_mask, block_size)
        if stage is None:
            stage = torch.zeros(len(x0), dtype=torch.long, device=x0.device)
        xt = x0.masked_fill(~prompt_mask, mask_id)
        return cls(x0, prompt_mask, xt, stage, prompt_mask.all(1), num_stages, mask_id, num_blocks)

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

    def with_rows(self, rows: Tensor, others: "Chains") -> "Chains":
        """Put other chains in some rows, (n,) int64."""
        old, new = self.tensors(), others.tensors()
        changed: dict[str, Any] = {name: old[name].index_copy(0, rows, new[name]) for name in old}
        return replace(self, **changed)

    def to(self, device: torch.device | str) -> "Chains":
        """Return the same chains on a device."""
        return self.map(lambda tensor: tensor.to(device))

    def map(self, function: Callable[[Tensor], Tensor]) -> "Chains":
        """Apply a function to every tensor field."""
        changed: dict[str, Any] = {name: function(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **changed)

"""What samplers return, and what they ask of a model."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from puma_lightning.output.prediction import Prediction, Statistic


@dataclass(frozen=True)
class Sample:
    """Completed sequences and how they came about.

    Attributes:
        tokens: The sequences, (B, L) int64, without a mask token.
        reveal_step: The forward pass after which each position was revealed, counted from 0; -1 where it was
            given, (B, L) int64.
        nfe: Forward passes each sequence took, (B,) int64.
        attention_mask: False where a position is padding, (B, L) bool; None where nothing is.

    Example:
        >>> empty = Sample.of_masked(torch.tensor([[5, 9]]), mask_id=9)
        >>> empty.reveal_step, empty.nfe
        (tensor([[-1,  0]]), tensor([0]))
    """

    tokens: Tensor
    reveal_step: Tensor
    nfe: Tensor
    attention_mask: Tensor | None = None

    @classmethod
    def of_masked(cls, xt: Tensor, mask_id: int) -> "Sample":
        """Make a sample of sequences, (B, L), in which nothing is revealed yet, for a sampler to fill in place."""
        nfe = torch.zeros(len(xt), dtype=torch.long, device=xt.device)
        return cls(xt.clone(), torch.where(xt == mask_id, 0, -1), nfe)

    def in_order(self, order: Tensor) -> "Sample":
        """Return the same with the positions of each row in another order, (B, L) int64; what comes after is cut."""
        places = {"tokens": self.tokens, "reveal_step": self.reveal_step, "attention_mask": self.attention_mask}
        moved: dict[str, Any] = {n: value.gather(1, order) for n, value in places.items() if value is not None}
        return replace(self, **moved)

    def end_rows(self, rows: Tensor, masked: Tensor, start: int, eos_id: int) -> None:
        """Fill the rest of rows that have generated EOS with EOS, in place.

        Args:
            rows: The rows, (n,) int64.
            masked: True where a position was to be filled, (B, L) bool.
            start: The first position of the rest.
            eos_id: EOS.
        """
        rest = masked[rows]
        rest[:, :start] = False
        self.tokens[rows] = self.tokens[rows].masked_fill(rest, eos_id)
        self.reveal_step[rows] = torch.where(rest, self.nfe[rows, None] - 1, self.reveal_step[rows])


def end_at_first_eos(xt: Tensor, answer: Tensor, mask_id: int, eos_id: int) -> Tensor:
    """Fill what is still masked after the first EOS of an answer with EOS; nothing else changes.

    Args:
        xt: Partly masked sequences, (B, L) int64.
        answer: True where a position is generated, (B, L) bool: an EOS that is given ends nothing.
        mask_id: The mask token.
        eos_id: EOS.

    Returns:
        The new xt, (B, L) int64.

    Example:
        >>> xt = torch.tensor([[0, 9, 0, 9, 5, 9]])
        >>> end_at_first_eos(xt, torch.arange(6) > 0, mask_id=9, eos_id=0)
        tensor([[0, 9, 0, 0, 5, 0]])
    """
    ended = ((xt == eos_id) & answer).cumsum(1) > 0
    return xt.masked_fill(ended & (xt == mask_id), eos_id)


def name_of_draw(temperature: float, top_p: float) -> list[str]:
    """Return the parts of a sampler's name that say how tokens are drawn.

    Example:
        >>> name_of_draw(0.8, 0.95)
        ['T0.8', 'p0.95']
    """
    return ([f"T{temperature:g}"] if temperature else []) + ([f"p{top_p:g}"] if top_p < 1 else [])


@runtime_checkable
class Selectable(Protocol):
    """A model that can go on with some rows of a batch.

    Example:
        >>> class Rows:
        ...     def select(self, rows):
        ...         return self
        >>> isinstance(Rows(), Selectable)
        True
    """

    def select(self, rows: Tensor) -> Any:
        """Return the same model for these rows, (n,), of the batch alone; this one stays as it is."""


@runtime_checkable
class MaskedPredictor(Protocol):
    """A model that can say what a sampler needs of the masked positions alone, without logits of all positions.

    Example:
        >>> isinstance(torch.nn.Linear(2, 2), MaskedPredictor)
        False
    """

    def predict_masked(
        self,
        xt: Tensor,
        masked: Tensor,
        reads: Collection[Statistic],
        temperature: float,
        top_p: float,
        generator: torch.Generator | None,
    ) -> Prediction | None:
        """Return statistics and a drawn token of every masked position, (B, L) each; None where logits do as well.

        A ``Recordable`` model may also be given a ``number``: how many positions are masked at most.
        """

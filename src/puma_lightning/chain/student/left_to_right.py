"""The student's chain from the left: one token after another."""

from typing import Protocol

import torch
from torch import Tensor

from puma_lightning.chain.student.sample import Sample, Selectable, name_of_draw
from puma_lightning.output.drawing import check_draw, draw


class Reader(Selectable, Protocol):
    """An autoregressive model that reads a batch piece by piece and remembers what it has read.

    Example:
        >>> class AlwaysSeven:
        ...     def __call__(self, tokens):
        ...         return torch.nn.functional.one_hot(torch.full((len(tokens),), 7), 10).float()
        ...     def select(self, rows):
        ...         return self
        >>> LeftToRightSampler()(AlwaysSeven(), torch.tensor([[5, 9, 9]]), mask_id=9).tokens
        tensor([[5, 7, 7]])
    """

    def __call__(self, tokens: Tensor) -> Tensor:
        """Read the next tokens of every row, (B, n); return logits of the token after them, (B, V)."""


class LeftToRightSampler:
    """Autoregressive sampling: one token after another, each read once; a row ends at its first EOS.

    Its passes are never recorded, as those of a ``Sampler`` are: what a model has read grows with each.

    Args:
        temperature: 0 takes the most likely token, otherwise tokens are drawn from softmax(logits / temperature).
        top_p: Draw only from the smallest set of tokens with at least this probability.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> LeftToRightSampler(temperature=0.8, top_p=0.95).name
        'left_to_right_T0.8_p0.95'
    """

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0) -> None:
        check_draw(temperature, top_p)
        self.temperature = temperature
        self.top_p = top_p

    @property
    def name(self) -> str:
        """A short name for logs: ``left_to_right``, ``left_to_right_T0.8_p0.95``."""
        return "_".join(["left_to_right", *name_of_draw(self.temperature, self.top_p)])

    @torch.no_grad()
    def __call__(
        self,
        model: Reader,
        xt: Tensor,
        mask_id: int,
        eos_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Sample:
        """Complete a batch.

        Args:
            model: Reads the rows piece by piece.
            xt: Sequences with the mask token at the positions to fill, (B, L) int64; position 0 is given.
            mask_id: The mask token; it is never drawn.
            eos_id: The token that ends a row; what is left of the row is filled with it.
            generator: Source of all randomness, on the device of ``xt``.

        Returns:
            The completed sequences.

        Raises:
            ValueError: If position 0 of a row is to be filled.
        """
        masked = xt == mask_id
        if masked[:, 0].any():
            raise ValueError(
                "prompt_mask: expected position 0 to be given, as sampling from the left needs a token to go on from, "
                "got a row where it is not; start every row with a given token"
            )
        sample = Sample.of_masked(xt, mask_id)
        tokens, reveal_step, nfe = sample.tokens, sample.reveal_step, sample.nfe
        columns = masked.any(0).nonzero().squeeze(1).tolist()
        last = torch.where(masked, torch.arange(xt.shape[1], device=xt.device), -1).amax(1)
        rows = torch.arange(len(xt), device=xt.device)
        position = columns[0] if columns else xt.shape[1]
        read = tokens[:, :position]
        while position < xt.shape[1]:
            drawn = draw(model(read)[:, None], mask_id, self.temperature, self.top_p, generator)[:, 0]
            fill = masked[rows, position]
            tokens[rows, position] = torch.where(fill, drawn, tokens[rows, position])
            reveal_step[rows, position] = torch.where(fill, nfe[rows], -1)
            nfe[rows] += fill
            going = last[rows] > position
            if eos_id is not None:
                sample.end_rows(rows[fill & (drawn == eos_id)], masked, position + 1, eos_id)
                going &= ~(fill & (drawn == eos_id))
            if not going.all():
                rows = rows[going]
                if not len(rows):
                    break
                model = model.select(going.nonzero().squeeze(1))
            read = tokens[rows, position, None]
            position += 1
        return sample

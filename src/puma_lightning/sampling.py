"""The student's chain: complete masked sequences with the model's own tokens."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from puma_lightning.output_layer import draw_tokens
from puma_lightning.unmasking import (
    Confidence,
    PolicyLike,
    Prediction,
    Statistic,
    check_block_size,
    check_policy,
    exclude_token,
    policy_name,
    reveal,
    score,
    statistics_read,
)


@dataclass(frozen=True)
class Sample:
    """Completed sequences and how they came about.

    Attributes:
        tokens: The sequences, (B, L) int64, without a mask token.
        reveal_step: The forward pass after which each position was revealed, counted from 0; -1 where it was
            given, (B, L) int64.
        nfe: Forward passes each sequence took, (B,) int64.
    """

    tokens: Tensor
    reveal_step: Tensor
    nfe: Tensor


def _check_draw(temperature: float, top_p: float) -> None:
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")


def _draw_names(temperature: float, top_p: float) -> list[str]:
    return ([f"T{temperature:g}"] if temperature else []) + ([f"p{top_p:g}"] if top_p < 1 else [])


def _fill_rest(
    tokens: Tensor, reveal_step: Tensor, nfe: Tensor, masked: Tensor, ended: Tensor, start: int, eos_id: int
) -> None:
    """Rows ``ended`` (n,) have generated EOS: what is to be filled from ``start`` on becomes EOS, in place."""
    rest = masked[ended]
    rest[:, :start] = False
    tokens[ended] = tokens[ended].masked_fill(rest, eos_id)
    reveal_step[ended] = torch.where(rest, nfe[ended, None] - 1, reveal_step[ended])


class Sampler:
    """Any-order sampling: score the masked positions, reveal the best, repeat until none is masked.

    Args:
        policy: Scores masked positions; the highest are revealed first.
        tokens_per_step: Positions revealed in each forward pass; 1 if nothing else is given.
        num_steps: Instead: the number of forward passes, over which the positions are spread evenly.
        threshold: Also reveal every masked position whose top-1 probability exceeds it.
        temperature: 0 takes the most likely token, otherwise tokens are drawn from softmax(logits / temperature).
        top_p: Draw only from the smallest set of tokens with at least this probability.

    Raises:
        ValueError: If an argument is out of range, or both ``tokens_per_step`` and ``num_steps`` are given.
    """

    def __init__(
        self,
        policy: PolicyLike = Confidence(),  # noqa: B008 - policies hold no state
        tokens_per_step: int | None = None,
        num_steps: int | None = None,
        threshold: float | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> None:
        if tokens_per_step is not None and num_steps is not None:
            raise ValueError("give tokens_per_step or num_steps, not both")
        for name, number in (("tokens_per_step", tokens_per_step), ("num_steps", num_steps)):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if threshold is not None and not 0 < threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1] or null, got {threshold}")
        _check_draw(temperature, top_p)
        self.policy = check_policy(policy)
        self.tokens_per_step = tokens_per_step or 1
        self.num_steps = num_steps
        self.threshold = threshold
        self.temperature = temperature
        self.top_p = top_p

    @property
    def name(self) -> str:
        """A short name for logs: ``confidence_1``, ``margin_steps8``, ``confidence_1_tau0.9``."""
        pace = f"steps{self.num_steps}" if self.num_steps else str(self.tokens_per_step)
        return "_".join(
            [policy_name(self.policy), pace]
            + ([f"tau{self.threshold:g}"] if self.threshold is not None else [])
            + _draw_names(self.temperature, self.top_p)
        )

    @torch.no_grad()
    def __call__(
        self,
        model: Callable[[Tensor], Tensor],
        xt: Tensor,
        mask_id: int,
        generator: torch.Generator | None = None,
    ) -> Sample:
        """Complete a batch.

        From a model that can ``select`` rows they leave the batch as they are finished, unless it says by an attribute
        ``static_shapes`` that a batch of another size costs it more.

        Args:
            model: xt (B, L) to logits aligned with positions (B, L, V).
            xt: Sequences with the mask token at the positions to fill, (B, L) int64.
            mask_id: The mask token; it is never drawn.
            generator: Source of all randomness, on the device of ``xt``.

        Returns:
            The completed sequences.
        """
        tokens = xt.clone()
        reveal_step = torch.where(xt == mask_id, 0, -1)
        nfe = torch.zeros(len(xt), dtype=torch.long, device=xt.device)
        rows = torch.arange(len(xt), device=xt.device)
        leaving = isinstance(model, Selectable) and not getattr(model, "static_shapes", False)
        step = 0
        while number := int((going := (tokens[rows] == mask_id).any(1)).sum()):
            if number < len(rows) and leaving:
                kept = going.nonzero().squeeze(1)
                rows, model = rows[kept], model.select(kept)  # type: ignore[attr-defined]
            xt = tokens[rows]
            masked = xt == mask_id
            predicted, scores, confident = self._predict(model, xt, masked, mask_id, generator)
            remaining = masked.sum(1)
            if self.num_steps:
                steps_left = max(1, self.num_steps - step)
                count = (remaining + steps_left - 1) // steps_left
            else:
                count = torch.full_like(remaining, self.tokens_per_step)
            xt = reveal(xt, predicted, scores, count, mask_id, also=confident, generator=generator)
            tokens[rows] = xt
            reveal_step[rows] = torch.where(masked & (xt != mask_id), step, reveal_step[rows])
            nfe[rows] += remaining > 0
            step += 1
        return Sample(tokens, reveal_step, nfe)

    def _predict(
        self,
        model: Callable[[Tensor], Tensor],
        xt: Tensor,
        masked: Tensor,
        mask_id: int,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens for the masked positions, the policy's scores, and where the threshold is passed, (B, L) each."""
        reads = statistics_read(self.policy, self.threshold)
        found = None
        if reads is not None and isinstance(model, MaskedPredictor):
            found = model.predict_masked(xt, masked, reads, self.temperature, self.top_p, generator)
        predictions: Tensor | Prediction
        if found is not None and found.drawn is not None:
            predictions, tokens = found, found.drawn
        else:
            predictions = exclude_token(model(xt), mask_id)
            tokens = draw(predictions, mask_id, self.temperature, self.top_p, generator)
        confident = None if self.threshold is None else score(Confidence(), predictions, xt) > self.threshold
        return tokens, score(self.policy, predictions, xt), confident


@runtime_checkable
class MaskedPredictor(Protocol):
    """A model that can say what a sampler needs of the masked positions alone, without logits of all of them."""

    def predict_masked(
        self,
        xt: Tensor,
        masked: Tensor,
        reads: Collection[Statistic],
        temperature: float,
        top_p: float,
        generator: torch.Generator | None,
    ) -> Prediction | None:
        """Statistics and a drawn token of every masked position, (B, L) each; None where logits do as well."""


@runtime_checkable
class Selectable(Protocol):
    """A model that can go on with a part of a batch."""

    def select(self, rows: Tensor) -> Any:
        """The same model for these rows (n,) of the batch alone; this one stays as it is."""


class Reader(Selectable, Protocol):
    """An autoregressive model that reads a batch piece by piece and remembers what it has read."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """The next tokens of every row, (B, n), to logits of the one after them, (B, V)."""


class LeftToRightSampler:
    """Autoregressive sampling: one token after another, each read once; a row ends at its first EOS.

    Args:
        temperature: 0 takes the most likely token, otherwise tokens are drawn from softmax(logits / temperature).
        top_p: Draw only from the smallest set of tokens with at least this probability.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0) -> None:
        _check_draw(temperature, top_p)
        self.temperature = temperature
        self.top_p = top_p

    @property
    def name(self) -> str:
        """A short name for logs: ``left_to_right``, ``left_to_right_T0.8_p0.95``."""
        return "_".join(["left_to_right", *_draw_names(self.temperature, self.top_p)])

    @torch.no_grad()
    def __call__(
        self,
        model: "Reader",
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
            raise ValueError("left-to-right sampling needs a first token to go on from: position 0 must be given")
        tokens = xt.clone()
        reveal_step = torch.where(masked, 0, -1)
        nfe = torch.zeros(len(xt), dtype=torch.long, device=xt.device)
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
                _fill_rest(tokens, reveal_step, nfe, masked, rows[fill & (drawn == eos_id)], position + 1, eos_id)
                going &= ~(fill & (drawn == eos_id))
            if not going.all():
                rows = rows[going]
                if not len(rows):
                    break
                model = model.select(going.nonzero().squeeze(1))
            read = tokens[rows, position, None]
            position += 1
        return Sample(tokens, reveal_step, nfe)


class BlockReader(Selectable, Protocol):
    """A block diffusion model that remembers the finished blocks it has read."""

    def read(self, tokens: Tensor, block_size: int) -> None:
        """Take the next finished blocks of every row, (B, n) with n a multiple of the block size."""

    def __call__(self, xt: Tensor) -> Tensor:
        """The block after them, (B, S) with masked positions, to its logits, (B, S, V)."""


class BlockSampler:
    """Block diffusion: one block after another, each completed in any order and then read once.

    A row ends with the block in which it first generates EOS. A forward pass that reads a finished block counts, and
    one for the blocks that are given.

    Args:
        within: How a block is completed; its ``num_steps`` are for each block.
        length: Generate up to this many positions where sequences are shorter, a multiple of the block size. It may be
            more than in training if the backbone's ``max_length`` allows; null for the length they have.

    Raises:
        ValueError: If the length is below 1.
    """

    def __init__(self, within: Sampler = Sampler(), length: int | None = None) -> None:  # noqa: B008 - holds no state
        if length is not None and length < 1:
            raise ValueError(f"length must be at least 1 or null, got {length}")
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
        reveal_step = torch.where(masked, 0, -1)
        nfe = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
        to_fill = masked.view(len(masked), -1, block_size).any(2)
        blocks = torch.arange(to_fill.shape[1], device=tokens.device)
        first, last = to_fill.long().argmax(1), torch.where(to_fill, blocks, -1).amax(1)
        rows = (last >= 0).nonzero().squeeze(1)
        if not len(rows):
            return Sample(tokens, reveal_step, nfe)
        # A row pays one pass for its prompt, in however many parts the batch's other rows let it be read.
        nfe[rows] += first[rows] > 0
        start = int(first[rows].min())
        if start:
            model.read(tokens[rows, : start * block_size], block_size)
        for block in range(start, to_fill.shape[1]):
            here = slice(block * block_size, (block + 1) * block_size)
            sample = self.within(model, tokens[rows, here], mask_id, generator)
            filled = masked[rows, here]
            tokens[rows, here] = sample.tokens
            reveal_step[rows, here] = torch.where(filled, nfe[rows, None] + sample.reveal_step, -1)
            nfe[rows] += sample.nfe
            going = last[rows] > block
            if eos_id is not None:
                ended = (filled & (sample.tokens == eos_id)).any(1)
                _fill_rest(tokens, reveal_step, nfe, masked, rows[ended], here.stop, eos_id)
                going &= ~ended
            if not going.all():
                rows = rows[going]
                if not len(rows):
                    break
                model = model.select(going.nonzero().squeeze(1))
            model.read(tokens[rows, here], block_size)
            nfe[rows] += first[rows] <= block
        return Sample(tokens, reveal_step, nfe)


AnySampler = Sampler | LeftToRightSampler | BlockSampler


def draw(
    logits: Tensor,
    mask_id: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a token for every position, never the mask token.

    Args:
        logits: (B, L, V).
        mask_id: The mask token.
        temperature: 0 takes the most likely token.
        top_p: Draw only from the smallest set of tokens with at least this probability.
        generator: Source of the draws, on the device of ``logits``.

    Returns:
        Tokens, (B, L) int64.
    """
    # Finite, so that even where nothing else has a probability the mask token is the worst choice.
    logits = exclude_token(logits.float().clamp_min(torch.finfo(torch.float).min), mask_id)
    if temperature == 0:
        return logits.argmax(-1)
    uniform = torch.rand(logits.shape[:2], dtype=torch.float, device=logits.device, generator=generator)
    return draw_tokens(logits.flatten(0, 1), uniform.flatten(), temperature, top_p).view(uniform.shape)

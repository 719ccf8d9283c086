"""How a board becomes a sequence of tokens, and where it lies in one. Nothing else knows.

Tokens: 0 is an empty cell, 1..order are digits, order + 1 is the mask. With the layout ``in_place`` a sequence has one
token for each cell of the solution, and the clues among them are the prompt. With ``prompt_answer`` the puzzle comes
first and is the prompt, and the solution follows it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from puma_lightning.data.base import Picture
from puma_lightning.data.sudoku.board import ORDERS, Boards, geometry

if TYPE_CHECKING:
    from torch import Tensor

Layout = Literal["in_place", "prompt_answer"]
_Array = TypeVar("_Array", "Tensor", NDArray[Any])


def sequence_length(order: int, layout: Layout) -> int:
    """Return the number of tokens of a board: one for each cell, twice as many for ``prompt_answer``.

    Raises:
        ValueError: For an unknown order or layout.
    """
    if layout not in ("in_place", "prompt_answer"):
        raise ValueError(f"layout: expected in_place or prompt_answer, got {layout!r}; choose one of these")
    return geometry(order).cells * (1 if layout == "in_place" else 2)


def board_of_length(length: int) -> tuple[int, Layout]:
    """Return the (order, layout) of the sequences of a length; no two share one.

    Raises:
        ValueError: If no board has that length.
    """
    layouts: tuple[Layout, ...] = ("in_place", "prompt_answer")
    known = {sequence_length(order, layout): (order, layout) for layout in layouts for order in ORDERS}
    if length not in known:
        raise ValueError(
            f"length: expected sequences of {sorted(known)} tokens, which are boards, got {length}; give sequences of "
            "a SudokuDataModule"
        )
    return known[length]


def lay_out(boards: Boards, layout: Layout) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Write boards as sequences.

    Args:
        boards: B puzzles with their solutions.
        layout: How.

    Returns:
        The tokens (B, L), and True where a position is given (B, L).
    """
    puzzles, solutions = boards
    clues = puzzles > 0
    if layout == "in_place":
        tokens, given = np.where(clues, puzzles, solutions), clues
    else:
        tokens = np.concatenate([puzzles, solutions], axis=1)
        given = np.concatenate([np.ones_like(clues), np.zeros_like(clues)], axis=1)
    return tokens.astype(np.int64), given


def board_of(sequences: _Array, order: int) -> _Array:
    """Return the board that is filled in: the last cells of sequences (..., L), as (..., order * order).

    Args:
        sequences: Whatever there is for each position: tokens, the step that revealed them, ...
        order: The boards' order.
    """
    return sequences[..., -geometry(order).cells :]


def clues_of(sequences: Tensor, prompt_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the puzzle of each sequence.

    Args:
        sequences: Tokens (B, L).
        prompt_mask: True where a position is given (B, L).

    Returns:
        Tokens (B, order * order), and which of them are clues (B, order * order): the given ones of an ``in_place``
        board, the digits in the first half of a ``prompt_answer`` board.

    Raises:
        ValueError: If no board has L tokens.
    """
    order, layout = board_of_length(sequences.shape[1])
    if layout == "in_place":
        return sequences, prompt_mask
    puzzle = sequences[:, : geometry(order).cells]
    return puzzle, puzzle != 0


def picture_of(order: int, layout: Layout) -> Picture:
    """Return how to draw a sequence: as the board that is filled in, with its boxes."""
    shape = geometry(order)
    board = board_of(torch.arange(sequence_length(order, layout)), order)
    return Picture(board.reshape(order, order), (shape.box_rows, shape.box_cols))

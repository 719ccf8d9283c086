"""The geometry of Sudoku boards: what the groups are, what counts as solved, and which symmetries there are.

A board is a row of ``order * order`` digits, row by row; 0 is an empty cell.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from puma_lightning.data.sudoku.hashing import UInt64, hash_keys, mix, random_permutations

Grid = NDArray[np.uint8]

ORDERS = (4, 6, 9)
_BOX_SHAPES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}
_CHUNK = 4096


class Boards(NamedTuple):
    """Puzzles with their solutions, each (N, order * order) uint8, 0 = empty."""

    puzzles: Grid
    solutions: Grid

    def take(self, rows: NDArray[np.integer] | slice) -> Boards:
        """Return the boards at ``rows``."""
        return Boards(self.puzzles[rows], self.solutions[rows])


@dataclass(frozen=True)
class Geometry:
    """The shape of a board of one order.

    Attributes:
        order: Number of digits, and of cells in a group.
        cells: ``order * order``.
        box_rows: Rows of one box.
        box_cols: Columns of one box.
        bands: Number of boxes one above the other.
        stacks: Number of boxes side by side.
        groups: Cell numbers of the rows, then the columns, then the boxes, (3 * order, order).
    """

    order: int
    cells: int
    box_rows: int
    box_cols: int
    bands: int
    stacks: int
    groups: NDArray[np.int64]

    @property
    def square(self) -> bool:
        """Whether boxes are square, so that transposing is a symmetry."""
        return self.box_rows == self.box_cols

    def split(self, length: int) -> tuple[int, int, int, int, int]:
        """Return the shape that splits (length, cells) into (length, band, row in it, stack, column in it)."""
        return length, self.bands, self.box_rows, self.stacks, self.box_cols


@cache
def geometry(order: int) -> Geometry:
    """Return the geometry of boards of ``order`` 4 (2x2 boxes), 6 (2 rows x 3 columns) or 9 (3x3).

    Raises:
        ValueError: For any other order.
    """
    if order not in _BOX_SHAPES:
        raise ValueError(f"order: expected one of {ORDERS}, got {order!r}; choose one of these")
    box_rows, box_cols = _BOX_SHAPES[order]
    bands, stacks = order // box_rows, order // box_cols
    cells = np.arange(order * order).reshape(order, order)
    boxes = cells.reshape(bands, box_rows, stacks, box_cols).swapaxes(1, 2).reshape(order, order)
    groups = np.concatenate([cells, cells.T, boxes])
    return Geometry(order, order * order, box_rows, box_cols, bands, stacks, groups)


def order_of_cells(cells: int) -> int:
    """Return the order of a board with that many cells.

    Raises:
        ValueError: If there is no such board.
    """
    for order in ORDERS:
        if order * order == cells:
            return order
    raise ValueError(f"boards: expected {[order * order for order in ORDERS]} cells, got {cells}; give whole boards")


def is_solved(grids: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Tell which grids are full and hold every digit once in every row, column and box.

    Args:
        grids: (N, order * order); an integer that is no digit is just wrong.

    Returns:
        (N,).
    """
    shape = geometry(order_of_cells(grids.shape[1]))
    legal = (grids >= 1) & (grids <= shape.order)  # the others share bit 0, which no full group has
    bits = np.uint16(1) << np.where(legal, grids, 0).astype(np.uint16)
    every_digit = (2 << shape.order) - 2
    solved = np.ones(len(grids), np.bool_)
    for group in shape.groups:
        solved &= np.bitwise_or.reduce(bits[:, group], axis=1) == every_digit
    return solved


class Symmetry(NamedTuple):
    """One symmetry for each of N boards: new[i] = digits[old[cells[i]]].

    Attributes:
        cells: Which old cell each new cell takes, (N, order * order).
        digits: What each digit becomes, (N, order + 1); empty stays empty.
    """

    cells: NDArray[np.int64]
    digits: Grid

    def __call__(self, grids: Grid) -> Grid:
        """Apply symmetry n to board n: (N, order * order) to (N, order * order)."""
        moved = np.take_along_axis(grids, self.cells, axis=1)
        return np.take_along_axis(self.digits, moved.astype(np.intp), axis=1)


def random_symmetry(order: int, seed: int, *index: int | NDArray[np.integer]) -> Symmetry:
    """Draw uniformly among all symmetries of the boards of an order.

    They permute bands, rows in bands, stacks, columns in stacks and digits, and transpose square boxes.

    Args:
        order: 4, 6 or 9.
        seed: With ``index``, all that the draw depends on.
        index: One or more integer arrays, broadcast to (N,).

    Returns:
        N symmetries.
    """
    shape = geometry(order)
    keys = hash_keys(seed, *index)

    def lines(tag: int, blocks: int, per_block: int) -> NDArray[np.int64]:
        outer = random_permutations(hash_keys(keys, tag), blocks)
        inner = random_permutations(hash_keys(keys[:, None], tag + 1, np.arange(blocks)), per_block)
        return (outer[:, :, None] * per_block + inner).reshape(len(keys), order)

    rows = lines(0, shape.bands, shape.box_rows)
    cols = lines(2, shape.stacks, shape.box_cols)
    cells = rows[:, :, None] * order + cols[:, None, :]
    if shape.square:
        flip = hash_keys(keys, 4) >> np.uint64(63) == 1
        cells[flip] = cells[flip].swapaxes(1, 2)
    digits = np.zeros((len(keys), order + 1), np.uint8)
    digits[:, 1:] = random_permutations(hash_keys(keys, 5), order) + 1
    return Symmetry(cells.reshape(len(keys), shape.cells), digits)


@cache
def _moves_of_order_4() -> NDArray[np.int64]:
    """Return all 128 geometric symmetries of a 4x4 board as cell numbers, (128, 16)."""
    lines = [np.array([*a, *b]) for a, b in itertools.permutations([(0, 1), (2, 3)])]
    lines = [line[[i, 1 - i, 2 + j, 3 - j]] for line in lines for i in (0, 1) for j in (0, 1)]
    moves = [rows[:, None] * 4 + cols[None, :] for rows in lines for cols in lines]
    moves += [move.T for move in moves]
    return np.stack([move.reshape(16) for move in moves])


def canonical_code(puzzles: Grid) -> UInt64:
    """Return a number that two 4x4 puzzles share exactly when a symmetry turns one into the other.

    It is the least, over all 128 geometric symmetries, of the board read as a number in base 5 with its
    digits renamed in order of first occurrence.

    Args:
        puzzles: (N, 16).

    Returns:
        (N,).
    """
    place = np.uint64(5) ** np.arange(15, -1, -1, dtype=np.uint64)
    best = np.full(len(puzzles), np.iinfo(np.uint64).max, np.uint64)
    for move in _moves_of_order_4():
        moved = puzzles[:, move]
        # The places a digit stands at add up to its share of the number, whatever its new name will be.
        share = np.stack([(moved == digit) @ place for digit in range(1, 5)], axis=1)
        # Places are powers of 5, so an earlier first occurrence means a larger share.
        code = np.sort(share, axis=1)[:, ::-1] @ np.arange(1, 5, dtype=np.uint64)
        best = np.minimum(best, code)
    return best


def invariant(boards: Boards, rounds: int = 4) -> UInt64:
    """Return a number that is the same for equivalent puzzles and nearly always differs for others.

    Colour refinement (Weisfeiler and Lehman 1968): a cell starts as "clue" or "empty", and each round adds
    the multisets of colours in its row, column, box, band, stack and in the cells with the same solution
    digit. Sums of hashes stand for multisets, so no symmetry can change them.

    Args:
        boards: N puzzles with their solutions.
        rounds: Rounds of refinement.

    Returns:
        (N,).
    """
    parts = [slice(start, start + _CHUNK) for start in range(0, len(boards.puzzles), _CHUNK)]
    return np.concatenate([_refine(boards.take(part), rounds) for part in parts] or [np.zeros(0, np.uint64)])


def _refine(boards: Boards, rounds: int) -> UInt64:
    shape = geometry(order_of_cells(boards.puzzles.shape[1]))
    n, order = len(boards.puzzles), shape.order
    # Where boxes are square a row can become a column, so the two must look alike; elsewhere it can't.
    upright = np.uint64(0 if shape.square else 1)
    cells_of_digit = np.argsort(boards.solutions, axis=1, kind="stable")
    digit_of_cell = boards.solutions.astype(np.intp) - 1
    colour = mix((boards.puzzles > 0).astype(np.uint64))
    for _ in range(rounds):
        split = colour.reshape(shape.split(n))
        rows, cols = split.sum(axis=(3, 4)), split.sum(axis=(1, 2))
        bands, stacks = rows.sum(axis=2, keepdims=True), cols.sum(axis=2, keepdims=True)
        across = mix(mix(rows) + bands)[:, :, :, None, None]
        down = mix(mix(cols) + stacks + upright)[:, None, None, :, :]
        boxes = mix(split.sum(axis=(2, 4)) + np.uint64(2))[:, :, None, :, None]
        digits = np.take_along_axis(colour, cells_of_digit, axis=1).reshape(n, order, order).sum(axis=2)
        same_digit = np.take_along_axis(mix(digits + np.uint64(3)), digit_of_cell, axis=1)
        around = (across + down) * np.uint64(3) + boxes * np.uint64(5)
        colour = mix(colour + around.reshape(n, shape.cells) + same_digit * np.uint64(7))
    return mix(colour.sum(axis=1))


def equivalence_key(boards: Boards) -> UInt64:
    """Return a number shared by equivalent puzzles: exact for order 4, an ``invariant`` for 6 and 9.

    Args:
        boards: N puzzles with their solutions.

    Returns:
        (N,).
    """
    return canonical_code(boards.puzzles) if boards.puzzles.shape[1] == 16 else invariant(boards)

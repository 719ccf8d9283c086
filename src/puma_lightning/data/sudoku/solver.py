"""A Sudoku solver for many boards at once: propagate singles everywhere, then branch everywhere.

Candidates are bit masks, bit d-1 for digit d, in arrays (cells, N): the boards come last so that every
step is one long vector operation over all of them.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from puma_lightning.data.sudoku.board import Geometry, Grid, geometry, order_of_cells

Candidates = NDArray[np.uint16]
Flags = NDArray[np.bool_]

# Boards worked on together: a few numpy calls each, and still small enough for the processor's cache.
CHUNK = 4096
_BAR_FROM = 20_000


def solve(puzzles: NDArray[np.integer], progress: bool = False) -> tuple[Grid, NDArray[np.int64]]:
    """Solve puzzles and tell whether the solution is the only one.

    Args:
        puzzles: (N, order * order), digits 0..order, 0 = empty.
        progress: Show a progress bar on stderr if there are many puzzles.

    Returns:
        One solution of each (N, order * order), zeros if there is none, and the number of solutions
        (N,): 0, 1, or 2 for "two or more".

    Raises:
        ValueError: If the shape is no board's, or a digit is out of range.
    """
    order = order_of_cells(puzzles.shape[1])
    if puzzles.size and not 0 <= puzzles.min() <= puzzles.max() <= order:
        raise ValueError(f"puzzles: expected digits 0..{order}, got {puzzles.min()}..{puzzles.max()}; correct them")
    return search(candidates(puzzles), limit=2, progress=progress)


def candidates(puzzles: NDArray[np.integer]) -> Candidates:
    """Turn clues into bit masks: puzzles (N, cells), result (cells, N)."""
    order = order_of_cells(puzzles.shape[1])
    masks = np.array([(1 << order) - 1] + [1 << digit for digit in range(order)], np.uint16)
    return masks[np.ascontiguousarray(puzzles.T)]


def digits(masks: Candidates) -> Grid:
    """Turn bit masks of decided cells back into digits: (cells, N), result (N, cells)."""
    return np.ascontiguousarray(_digit_of_mask()[masks].T)


def search(start: Candidates, limit: int, progress: bool = False) -> tuple[Grid, NDArray[np.int64]]:
    """Search for solutions depth first, over all boards together.

    The frontier is a stack of arrays. Each turn takes at most ``CHUNK`` boards off its top, so memory is
    bounded by a few chunks per level of depth, however many solutions there are.

    Args:
        start: Candidates (cells, N).
        limit: Stop looking at a board after this many solutions.
        progress: Show a progress bar on stderr if there are many boards.

    Returns:
        The first solution found (N, cells) and the number found (N,), at most ``limit``.
    """
    cells, n = start.shape
    shape = geometry(order_of_cells(cells))
    solutions = np.zeros((n, cells), np.uint8)
    found = np.zeros(n, np.int64)
    stack: list[tuple[Candidates, NDArray[np.int64]]] = []
    untouched = 0
    with tqdm(total=n, desc="Solving puzzles", unit="puzzle", disable=not progress or n < _BAR_FROM) as bar:
        while stack or untouched < n:
            picked, room = [], CHUNK
            while room > 0 and (stack or untouched < n):
                if not stack:
                    owners = np.arange(untouched, min(untouched + room, n))
                    stack.append((start[:, untouched : untouched + room], owners))
                    untouched += len(owners)
                    bar.update(len(owners))
                masks, owners = stack.pop()
                if len(owners) > room:
                    stack.append((masks[:, room:], owners[room:]))
                    masks, owners = masks[:, :room], owners[:room]
                open_owners = found[owners] < limit
                picked.append((masks[:, open_owners], owners[open_owners]))
                room -= len(picked[-1][1])
            masks = np.concatenate([masks for masks, _ in picked], axis=1)
            owners = np.concatenate([owners for _, owners in picked])

            masks, alive = propagate(masks, shape)
            width = np.bitwise_count(masks)
            solved = alive & (width.max(axis=0, initial=0) == 1)
            winners = owners[solved]
            solutions[winners] = digits(masks[:, solved])
            np.add.at(found, winners, 1)

            split = np.flatnonzero(alive & ~solved)
            if len(split):
                stack.append(branch(masks[:, split], owners[split], width[:, split]))
    return solutions, np.minimum(found, limit)


def branch(
    masks: Candidates, owners: NDArray[np.int64], width: NDArray[np.uint8]
) -> tuple[Candidates, NDArray[np.int64]]:
    """Split every board on its undecided cell with fewest candidates, one child per candidate.

    Args:
        masks: Candidates (cells, N); every board has an undecided cell.
        owners: Which puzzle each board came from, (N,).
        width: Number of candidates per cell (cells, N).

    Returns:
        The children's candidates (cells, M) and owners (M,).
    """
    cell = np.where(width > 1, width, 99).argmin(axis=0)
    choices = masks[cell, np.arange(len(owners))]
    children, parents, picks = [], np.arange(len(owners)), []
    while len(parents):
        pick = choices & (~choices + np.uint16(1))  # the lowest set bit
        children.append(parents)
        picks.append(pick)
        choices ^= pick
        parents, choices = parents[choices != 0], choices[choices != 0]
    child = np.concatenate(children)
    split = masks[:, child]
    split[cell[child], np.arange(len(child))] = np.concatenate(picks)
    return split, owners[child]


def propagate(masks: Candidates, shape: Geometry) -> tuple[Candidates, Flags]:
    """Remove candidates by naked and hidden singles until nothing changes.

    Args:
        masks: Candidates (cells, N); not modified.
        shape: The boards' geometry.

    Returns:
        What is left (cells, N) and whether each board may still have a solution (N,). A board that is
        alive with one candidate in every cell is solved.
    """
    n = masks.shape[1]
    result = np.empty_like(masks)
    alive = np.zeros(n, np.bool_)
    active = np.arange(n)
    while len(active):
        after, possible = _singles(masks, shape)
        going = (after != masks).any(axis=0) & possible
        done = np.flatnonzero(~going)
        result[:, active[done]] = after[:, done]
        alive[active[done]] = possible[done]
        going_on = np.flatnonzero(going)
        masks, active = np.take(after, going_on, axis=1), active[going_on]
    return result, alive


def _singles(masks: Candidates, shape: Geometry) -> tuple[Candidates, Flags]:
    """Return the candidates after a round of naked, then hidden singles, and which boards are possible."""
    n = masks.shape[1]
    split = (shape.bands, shape.box_rows, shape.stacks, shape.box_cols, n)
    possible = np.ones(n, np.bool_)

    decided = np.where(masks & (masks - np.uint16(1)), np.uint16(0), masks).reshape(split)
    taken: NDArray[np.uint16] = np.zeros(split, np.uint16)
    for axes in ((2, 3), (0, 1), (1, 3)):  # rows, columns, boxes
        seen = np.bitwise_or.reduce(decided, axis=axes, keepdims=True)
        # Distinct powers of two add up to their union; a digit decided twice does not.
        twice = np.add.reduce(decided, axis=axes, keepdims=True, dtype=np.uint16) != seen
        possible &= ~twice.any(axis=(0, 1, 2, 3))
        taken |= seen
    after = masks.reshape(split) & ~taken | decided

    every_digit = np.uint16((1 << shape.order) - 1)
    forced = np.zeros(split, np.uint16)
    for axes in ((2, 3), (0, 1), (1, 3)):
        members = np.moveaxis(after, axes, (0, 1))
        once, more = np.zeros((2, *members.shape[2:]), np.uint16)
        for i in range(members.shape[0]):
            for j in range(members.shape[1]):
                more |= once & members[i, j]
                once |= members[i, j]
        possible &= (once == every_digit).all(axis=(0, 1))
        forced |= after & np.expand_dims(once & ~more, axes)
    after = np.where(forced, forced, after)
    return after.reshape(shape.cells, n), possible


@cache
def _digit_of_mask() -> Grid:
    table = np.zeros(1 << 9, np.uint8)
    table[1 << np.arange(9)] = np.arange(1, 10)
    return table

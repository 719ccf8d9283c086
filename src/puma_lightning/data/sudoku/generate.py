"""Seeded Sudoku puzzles with one solution: fill a board at random, then dig clues out while it stays unique.

Attempt i depends on (order, clues, seed, i) only, so a longer set starts with a shorter one of the same seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from puma_lightning.data.sudoku.board import (
    Boards,
    Grid,
    canonical_code,
    equivalence_key,
    geometry,
    random_symmetry,
)
from puma_lightning.data.sudoku.hashing import UInt64, hash_keys, random_permutations
from puma_lightning.data.sudoku.solver import candidates, digits, propagate, search, solve

Clues = int | tuple[int, int]

DEFAULT_CLUES = {4: 6, 6: 13, 9: 32}
FEWEST_CLUES = {4: 4, 6: 8, 9: 17}  # no puzzle with fewer has one solution (McGuire et al. 2014 for 9)
# 288 solved 4x4 grids are symmetric to one of these two.
_GRIDS_OF_ORDER_4 = ("1234341221434321", "1234341223414123")
_ATTEMPTS = 512
_KEYS_AT_ONCE = 20_000
# Attempts without a new puzzle before we say that there are no more.
_PATIENCE = 20_000


def clue_range(order: int, clues: Clues | None) -> tuple[int, int]:
    """Return the (fewest, most) clues wanted; None means the default of the order.

    Raises:
        ValueError: If no puzzle with one solution has that number of clues, or the range is empty.
    """
    wanted = DEFAULT_CLUES[geometry(order).order] if clues is None else clues
    low, high = wanted if isinstance(wanted, tuple | list) and len(wanted) == 2 else (wanted, wanted)
    whole = all(isinstance(bound, int) and not isinstance(bound, bool) for bound in (low, high))
    if not whole or not FEWEST_CLUES[order] <= low <= high < order * order:
        raise ValueError(
            f"clues: expected a number or a (low, high) range within {FEWEST_CLUES[order]}..{order**2 - 1} "
            f"for order {order}, got {clues!r}; choose others"
        )
    return low, high


def random_grids(order: int, keys: UInt64) -> tuple[Grid, NDArray[np.bool_]]:
    """Fill empty boards: decide a random cell with fewest candidates, propagate, repeat.

    Args:
        order: 4, 6 or 9.
        keys: What each grid depends on, (N,).

    Returns:
        Grids (N, order * order) and which of them came out solved (N,); a dead end is not taken back.
    """
    shape = geometry(order)
    masks = candidates(np.zeros((len(keys), shape.cells), np.uint8))
    alive = np.ones(len(keys), np.bool_)
    bits = np.uint16(1) << np.arange(order, dtype=np.uint16)[:, None]
    for step in range(shape.cells):
        width = np.bitwise_count(masks).astype(np.uint64)
        undecided = np.flatnonzero(alive & (width.max(axis=0, initial=0) > 1))
        if not len(undecided):
            break
        here, width, key = masks[:, undecided], width[:, undecided], keys[undecided]
        tie_break = hash_keys(key, step, np.arange(shape.cells)[:, None]) >> np.uint64(8)
        # The count goes on top of 56 random bits; decided cells, with a count of 1, come last.
        rank = np.where(width > 1, width << np.uint64(56), np.uint64(1 << 63)) | tie_break
        cell = rank.argmin(axis=0)
        columns = np.arange(len(undecided))
        lots = hash_keys(key, step, -1 - np.arange(order)[:, None])
        here[cell, columns] = bits[np.where(here[cell, columns] & bits, lots, 0).argmax(axis=0), 0]
        masks[:, undecided], alive[undecided] = propagate(here, shape)
    return digits(masks), alive


def dig(solutions: Grid, keys: UInt64, targets: NDArray[np.int64]) -> tuple[Grid, NDArray[np.bool_]]:
    """Empty cells in random order, but keep those without which a board has a second solution.

    Args:
        solutions: Solved grids (N, cells).
        keys: What each board's order of cells depends on, (N,).
        targets: Number of clues at which to stop, (N,).

    Returns:
        Puzzles (N, cells) with one solution each and whether each came down to its target (N,).
    """
    n, cells = solutions.shape
    puzzles = solutions.copy()
    clues = np.full(n, cells)
    sequence = random_permutations(keys, cells)
    for step in range(cells):
        # A board that could not reach its target by digging out all that is left is given up.
        active = np.flatnonzero((clues > targets) & (clues - (cells - step) <= targets))
        cell = sequence[active, step]
        trial = puzzles[active]
        trial[np.arange(len(active)), cell] = 0
        masks = candidates(trial)
        # A second solution would differ from the first in this cell.
        masks[cell, np.arange(len(active))] ^= np.uint16(1) << (solutions[active, cell] - np.uint16(1))
        _, others = search(masks, limit=1)
        removable = others == 0
        puzzles[active[removable], cell[removable]] = 0
        clues[active[removable]] -= 1
    return puzzles, clues == targets


def attempt(order: int, clues: Clues | None, seed: int, index: NDArray[np.int64]) -> Boards:
    """Try to make one puzzle for each index; those that fail are left out.

    Args:
        order: 4, 6 or 9.
        clues: Number of clues, or (low, high), or None for the order's default.
        seed: Any integer.
        index: Which attempts to make, (N,); each depends on the arguments above and its own index only.

    Returns:
        At most N boards, in order of their index.
    """
    low, high = clue_range(order, clues)
    keys = hash_keys(seed, order, index)
    grids, filled = random_grids(order, keys)
    grids, keys = grids[filled], keys[filled]
    targets = low + (hash_keys(keys, -1) % np.uint64(high - low + 1)).astype(np.int64)
    puzzles, reached = dig(grids, hash_keys(keys, -2), targets)
    return Boards(puzzles[reached], grids[reached])


def generate(order: int, count: int, clues: Clues | None = None, seed: int = 0, progress: bool = False) -> Boards:
    """Make puzzles with exactly one solution, no two of them equivalent up to symmetry.

    Args:
        order: 4 (2x2 boxes), 6 (2 rows x 3 columns) or 9 (3x3).
        count: How many.
        clues: Number of clues, or (low, high), or None for the order's default.
        seed: Any integer; the same seed gives the same puzzles on every machine.
        progress: Show a progress bar on stderr.

    Returns:
        ``count`` boards.

    Raises:
        ValueError: If there are not that many.
    """
    if order == 4:
        return _sample_of_order_4(count, clues, seed)
    parts: list[Boards] = []
    seen: NDArray[np.uint64] = np.zeros(0, np.uint64)
    tried, last_success = 0, 0
    with tqdm(total=count, desc=f"Making {order}x{order} Sudokus", unit="", disable=not progress, delay=2) as bar:
        while len(seen) < count:
            if tried - last_success >= _PATIENCE:
                raise ValueError(
                    f"clues: expected {count} inequivalent puzzles of order {order} with "
                    f"{clue_range(order, clues)} clues (fewest, most), got {len(seen)}, none in the last "
                    f"{tried - last_success} attempts; ask for fewer puzzles or another number of clues"
                )
            # Attempts are independent, so how many are made together does not change the result.
            now = _ATTEMPTS if tried else min(_ATTEMPTS, count + count // 4)
            boards = attempt(order, clues, seed, np.arange(tried, tried + now))
            tried += now
            keys, first = np.unique(equivalence_key(boards), return_index=True)
            fresh = np.sort(first[~np.isin(keys, seen)])
            if len(fresh):
                last_success = tried
            seen = np.union1d(seen, keys)
            parts.append(boards.take(fresh))
            bar.update(min(len(fresh), count - int(bar.n)))
    empty = np.zeros((0, order * order), np.uint8)
    puzzles = np.concatenate([empty, *(part.puzzles for part in parts)])
    solutions = np.concatenate([empty, *(part.solutions for part in parts)])
    return Boards(puzzles[:count], solutions[:count])


def make_splits(
    order: int, sizes: Mapping[str, int], clues: Clues | None = None, seed: int = 0, progress: bool = False
) -> dict[str, Boards]:
    """Make sets of puzzles, no two of which, in the same set or not, are equivalent up to symmetry.

    Args:
        order: 4, 6 or 9.
        sizes: Number of puzzles by name of the set. Sets are filled in the order given, so growing the last
            leaves the others as they were.
        clues: Number of clues, or (low, high), or None for the order's default.
        seed: Any integer.
        progress: Show a progress bar on stderr.

    Returns:
        The boards by name of the set.

    Raises:
        ValueError: If there are not that many inequivalent puzzles; it says how many there are.
    """
    boards = generate(order, sum(sizes.values()), clues, seed, progress)
    ends = itertools.accumulate(sizes.values())
    return {name: boards.take(slice(end - sizes[name], end)) for name, end in zip(sizes, ends, strict=True)}


def hold_out(boards: Boards, size: int, seed: int, progress: bool = False) -> dict[str, Boards]:
    """Split boards into ``val``, ``size`` of them at random, and ``train``, those equivalent to none of ``val``.

    Args:
        boards: N boards.
        size: How many to hold out.
        seed: Any integer.
        progress: Show a progress bar on stderr.

    Returns:
        The boards ``train`` and ``val``, each in their old order.

    Raises:
        ValueError: If nothing is left to train on.
    """
    rows = np.sort(random_permutations(hash_keys(seed), len(boards.puzzles))[0, :size])
    starts = range(0, len(boards.puzzles), _KEYS_AT_ONCE)
    with tqdm(total=len(boards.puzzles), desc="Comparing Sudokus", unit="", disable=not progress, delay=2) as bar:
        parts = []
        for start in starts:
            parts.append(equivalence_key(boards.take(slice(start, start + _KEYS_AT_ONCE))))
            bar.update(len(parts[-1]))
    keys = np.concatenate(parts)
    rest = np.flatnonzero(~np.isin(keys, keys[rows]))
    if not len(rest):
        raise ValueError(
            f"num_val: expected fewer than the {len(boards.puzzles)} puzzles read from train_file, got {size}; "
            "lower it, or give val_file (what is equivalent to a held-out puzzle is not trained on either)"
        )
    return {"train": boards.take(rest), "val": boards.take(rows)}


def all_of_order_4(clues: Clues | None = None) -> Boards:
    """List every 4x4 puzzle with one solution, one of each class of equivalent ones.

    Args:
        clues: Number of clues, or (low, high), or None for the default.

    Returns:
        All boards, the same on every call; there are few enough to list (376 with 6 clues).
    """
    low, high = clue_range(4, clues)
    subsets = (np.arange(1 << 16)[:, None] >> np.arange(16)) & 1
    subsets = subsets[(low <= subsets.sum(axis=1)) & (subsets.sum(axis=1) <= high)].astype(np.uint8)
    grids = np.array([[int(digit) for digit in grid] for grid in _GRIDS_OF_ORDER_4], np.uint8)
    puzzles = (grids[:, None] * subsets).reshape(-1, 16)
    _, first = np.unique(canonical_code(puzzles), return_index=True)
    puzzles = puzzles[first]
    solutions, found = solve(puzzles)
    return Boards(puzzles, solutions).take(found == 1)


def _sample_of_order_4(count: int, clues: Clues | None, seed: int) -> Boards:
    every = all_of_order_4(clues)
    if count > len(every.puzzles):
        raise ValueError(
            f"clues: expected {count} inequivalent puzzles of order 4 with {clue_range(4, clues)} clues (fewest, "
            f"most), got {len(every.puzzles)}, which are all there are; ask for fewer, or for a wider range of clues"
        )
    rows = random_permutations(hash_keys(seed), len(every.puzzles))[0, :count]
    symmetry = random_symmetry(4, seed, rows)
    boards = every.take(rows)
    return Boards(symmetry(boards.puzzles), symmetry(boards.solutions))

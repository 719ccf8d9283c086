from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puma_lightning.data.sudoku.board import (
    ORDERS,
    Boards,
    canonical_code,
    geometry,
    invariant,
    is_solved,
    order_of_cells,
    random_symmetry,
)
from puma_lightning.data.sudoku.generate import all_of_order_4, generate
from puma_lightning.data.sudoku.solver import solve

orders = st.sampled_from(ORDERS)
seeds = st.integers(-(2**63), 2**63)
made = cache(generate)


def transposed(boards: Boards) -> Boards:
    order = order_of_cells(boards.puzzles.shape[1])
    return Boards(*(grid.reshape(-1, order, order).swapaxes(1, 2).reshape(len(grid), -1) for grid in boards))


@pytest.mark.parametrize("order", ORDERS)
def test_groups_are_rows_columns_and_boxes(order: int) -> None:
    shape = geometry(order)
    assert shape.groups.shape == (3 * order, order)
    assert (np.bincount(shape.groups.ravel()) == 3).all()
    assert all(len(set(group)) == order for group in shape.groups)
    first_box = set(shape.groups[2 * order])
    assert first_box == {r * order + c for r in range(shape.box_rows) for c in range(shape.box_cols)}


@settings(deadline=None, max_examples=30)
@given(orders, st.data())
def test_any_single_change_unsolves_a_grid(order: int, data: st.DataObject) -> None:
    grid = made(order, 20).solutions[:1]
    assert is_solved(grid).all()
    cell = data.draw(st.integers(0, order * order - 1))
    wrong = grid.astype(np.int64)
    wrong[0, cell] = data.draw(st.integers(-3, 300).filter(lambda digit: digit != grid[0, cell]))
    assert not is_solved(wrong).any()


@pytest.mark.parametrize("order", ORDERS)
def test_each_kind_of_group_is_needed(order: int) -> None:
    row, column = np.arange(order)[:, None], np.arange(order)
    latin = ((row + column) % order + 1).reshape(1, -1)  # rows and columns right, boxes wrong
    assert not is_solved(latin).any()
    grid = generate(order, 1).solutions.reshape(order, order)
    rows_wrong = np.sort(grid, axis=0)  # columns still hold every digit once
    assert not is_solved(rows_wrong.reshape(1, -1)).any()
    assert not is_solved(rows_wrong.T.reshape(1, -1)).any()


@settings(deadline=None, max_examples=30)
@given(orders, seeds)
def test_symmetries_keep_rules_clues_and_uniqueness(order: int, seed: int) -> None:
    boards = made(order, 20)
    symmetry = random_symmetry(order, seed, np.arange(20))
    puzzles, solutions = symmetry(boards.puzzles), symmetry(boards.solutions)
    assert is_solved(solutions).all()
    assert ((puzzles > 0).sum(axis=1) == (boards.puzzles > 0).sum(axis=1)).all()
    solved, found = solve(puzzles)
    assert (found == 1).all() and (solved == solutions).all()


@settings(deadline=None, max_examples=20)
@given(orders, seeds, st.lists(st.integers(0, 10**6), min_size=1, max_size=9))
def test_a_symmetry_depends_on_seed_and_index_only(order: int, seed: int, index: list[int]) -> None:
    together = random_symmetry(order, seed, np.array(index))
    alone = [random_symmetry(order, seed, np.array([i])) for i in index]
    assert (together.cells == np.concatenate([each.cells for each in alone])).all()
    assert (together.digits == np.concatenate([each.digits for each in alone])).all()


def test_every_symmetry_of_order_4_is_drawn() -> None:
    symmetry = random_symmetry(4, 0, np.arange(20_000))
    moves, counts = np.unique(symmetry.cells, axis=0, return_counts=True)
    assert len(moves) == 128
    assert counts.min() > 0.6 * 20_000 / 128
    assert len(np.unique(symmetry.digits, axis=0)) == 24


@pytest.mark.parametrize(("order", "number"), [(6, 48 * 72), (9, 2 * 6**8)])
def test_number_of_moves(order: int, number: int) -> None:
    draws = 30_000
    moves = len(np.unique(random_symmetry(order, 1, np.arange(draws)).cells, axis=0))
    expected = number * (1 - (1 - 1 / number) ** draws)
    assert moves == pytest.approx(expected, rel=0.01)


@settings(deadline=None, max_examples=10)
@given(seeds)
def test_canonical_code_is_the_same_for_equivalent_puzzles_only(seed: int) -> None:
    puzzles = all_of_order_4(5).puzzles
    codes = canonical_code(puzzles)
    assert len(np.unique(codes)) == len(puzzles)
    moved = random_symmetry(4, seed, np.arange(len(puzzles)))(puzzles)
    assert (canonical_code(moved) == codes).all()


@settings(deadline=None, max_examples=30)
@given(orders, seeds)
def test_invariant_survives_every_symmetry(order: int, seed: int) -> None:
    boards = made(order, 20)
    symmetry = random_symmetry(order, seed, np.arange(20))
    moved = Boards(symmetry(boards.puzzles), symmetry(boards.solutions))
    assert (invariant(moved) == invariant(boards)).all()
    if geometry(order).square:
        assert (invariant(transposed(moved)) == invariant(boards)).all()


def test_invariant_tells_inequivalent_puzzles_apart() -> None:
    boards = all_of_order_4((5, 7))
    assert len(np.unique(invariant(boards))) > 0.99 * len(boards.puzzles)
    # One clue less, or another cell emptied: as close as two different puzzles get.
    board = generate(9, 1).take([0] * 32)  # type: ignore[arg-type]
    clues = np.flatnonzero(board.puzzles[0])
    board.puzzles[np.arange(32), clues] = 0
    assert len(np.unique(invariant(board))) == 32


def test_unknown_boards_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"order: expected one of .*got 5"):
        geometry(5)
    with pytest.raises(ValueError, match="got 25"):
        is_solved(np.zeros((1, 25), np.int64))

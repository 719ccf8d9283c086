import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puma_lightning.data.sudoku import solver
from puma_lightning.data.sudoku.board import ORDERS, geometry, is_solved
from puma_lightning.data.sudoku.generate import generate


def count_by_hand(puzzle: list[int], order: int) -> int:
    """Plain backtracking, one board at a time: number of solutions, at most 2."""
    if 0 not in puzzle:
        return int(is_solved(np.array([puzzle]))[0])
    cell, found = puzzle.index(0), 0
    peers = {peer for group in geometry(order).groups if cell in group for peer in group}
    for digit in set(range(1, order + 1)) - {puzzle[peer] for peer in peers}:
        found += count_by_hand([*puzzle[:cell], digit, *puzzle[cell + 1 :]], order)
        if found >= 2:
            return 2
    return found


SOLVED = {order: generate(order, 20).solutions for order in (4, 6)}


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_agrees_with_backtracking_on_any_clues(data: st.DataObject) -> None:
    order = data.draw(st.sampled_from([4, 6]))
    digits = st.lists(st.integers(0, order), min_size=order**2, max_size=order**2)
    grid = data.draw(st.sampled_from(list(SOLVED[order])))
    kept = data.draw(st.lists(st.booleans(), min_size=order**2, max_size=order**2))
    changed = data.draw(st.lists(st.integers(0, 30), min_size=order**2, max_size=order**2))
    noise = np.array(data.draw(digits))
    puzzle = np.where(kept, grid, 0)
    puzzle[np.array(changed) == 7] = noise[np.array(changed) == 7]
    solution, found = solver.solve(puzzle[None])
    assert found[0] == count_by_hand(puzzle.tolist(), order)
    if found[0]:
        assert is_solved(solution).all()
        assert ((puzzle == 0) | (solution[0] == puzzle)).all()
    else:
        assert (solution == 0).all()


HARD = {
    "800000000003600000070090200050007000000045700000100030001000068008500010090000400": 1,
    "000000010400000000020000000000050407008000300001090000300400200050100000000806000": 1,
    "000000000000003085001020000000507000004000100090000000500000073002010000000040009": 1,
    "000000000000003085001020000000507000004000100090000000500000073002010000000040000": 2,
    "500000000000000000000000000000000000000000000000000000000000000000000000000000000": 2,
    "550000000000000000000000000000000000000000000000000000000000000000000000000000000": 0,
    # Every clue is legal, but the first row has no place for its 9.
    "123456780000000009000000000000000000000000000000000000000000000000000000000000000": 0,
}


def test_hard_impossible_and_ambiguous_boards() -> None:
    puzzles = np.array([[int(digit) for digit in puzzle] for puzzle in HARD])
    solutions, found = solver.solve(puzzles)
    assert found.tolist() == list(HARD.values())
    assert (is_solved(solutions) == (found > 0)).all()
    assert (((puzzles == 0) | (solutions == puzzles)).all(axis=1) == (found > 0)).all()


@pytest.mark.parametrize("order", ORDERS)
def test_empty_and_full_boards(order: int) -> None:
    full = generate(order, 3).solutions
    solutions, found = solver.solve(np.concatenate([full, np.zeros_like(full)]))
    assert found.tolist() == [1, 1, 1, 2, 2, 2]
    assert (solutions[:3] == full).all() and is_solved(solutions).all()


def test_all_288_solved_grids_of_order_4_are_found() -> None:
    _, found = solver.search(solver.candidates(np.zeros((2, 16), np.uint8)), limit=1000)
    assert found.tolist() == [288, 288]


def test_results_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    puzzles = np.concatenate([generate(9, 40, 26).puzzles, np.zeros((3, 81), np.uint8)])
    solutions, found = solver.solve(puzzles)
    monkeypatch.setattr(solver, "CHUNK", 7)
    small_solutions, small_found = solver.solve(puzzles)
    assert (small_found == found).all()
    assert (small_solutions[found == 1] == solutions[found == 1]).all()


def test_memory_stays_bounded_on_boards_with_many_solutions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "CHUNK", 64)
    largest = 0
    propagate = solver.propagate

    def watched(masks, shape):  # type: ignore[no-untyped-def]
        nonlocal largest
        largest = max(largest, masks.shape[1])
        return propagate(masks, shape)

    monkeypatch.setattr(solver, "propagate", watched)
    _, found = solver.solve(np.zeros((100, 36), np.uint8))
    assert (found == 2).all()
    assert largest <= 64


def test_no_puzzles_is_no_problem() -> None:
    solutions, found = solver.solve(np.zeros((0, 81), np.uint8))
    assert solutions.shape == (0, 81) and found.shape == (0,)


def test_foreign_boards_are_refused() -> None:
    with pytest.raises(ValueError, match=r"81.*got 80"):
        solver.solve(np.zeros((1, 80), np.int64))
    with pytest.raises(ValueError, match=r"0\.\.4, got 0\.\.5"):
        solver.solve(np.eye(1, 16, dtype=np.int64) * 5)

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puma_lightning.data.sudoku.board import ORDERS, canonical_code, equivalence_key, is_solved
from puma_lightning.data.sudoku.generate import (
    DEFAULT_CLUES,
    all_of_order_4,
    attempt,
    generate,
    hold_out,
    make_splits,
    random_grids,
)
from puma_lightning.data.sudoku.hashing import hash_keys
from puma_lightning.data.sudoku.solver import solve


@settings(deadline=None, max_examples=8)
@given(st.sampled_from(ORDERS), st.integers(0, 2**40), st.booleans())
def test_puzzles_have_one_solution_and_the_clues_asked_for(order: int, seed: int, in_range: bool) -> None:
    low, high = (DEFAULT_CLUES[order], DEFAULT_CLUES[order] + (3 if in_range else 0))
    boards = generate(order, 30, (low, high) if in_range else low, seed)
    solutions, found = solve(boards.puzzles)
    assert (found == 1).all() and (solutions == boards.solutions).all()
    assert is_solved(solutions).all()
    counts = (boards.puzzles > 0).sum(axis=1)
    assert counts.min() >= low and counts.max() <= high
    assert len(set(counts)) > 1 or not in_range
    assert len(np.unique(equivalence_key(boards))) == 30


# A change here makes every user's built-in data another data set.
FINGERPRINTS = {
    4: "52c659df8135",
    6: "46bc8c1db353",
    9: "27157ba5161b",
}


@pytest.mark.parametrize("order", ORDERS)
def test_same_seed_same_puzzles_on_every_machine(order: int) -> None:
    boards = generate(order, 30, seed=5)
    digest = hashlib.sha256(boards.puzzles.tobytes() + boards.solutions.tobytes()).hexdigest()[:12]
    assert digest == FINGERPRINTS[order]
    assert not np.array_equal(generate(order, 30, seed=6).puzzles, boards.puzzles)


@pytest.mark.parametrize("order", ORDERS)
def test_a_larger_set_starts_with_the_smaller_one(order: int) -> None:
    small, large = generate(order, 30), generate(order, 60)
    assert np.array_equal(large.puzzles[:30], small.puzzles)


def test_random_grids_are_solved_and_all_different() -> None:
    grids, filled = random_grids(9, hash_keys(0, np.arange(300)))
    assert (is_solved(grids) == filled).all()
    assert filled.mean() > 0.8
    assert len(np.unique(grids[filled], axis=0)) == filled.sum()
    # No digit prefers a cell.
    counts = np.stack([(grids[filled] == digit).sum(axis=0) for digit in range(1, 10)])
    assert counts.max() < 3 * filled.sum() / 9


def test_digging_also_works_for_order_4() -> None:
    boards = attempt(4, 5, 0, np.arange(100))
    assert len(boards.puzzles) > 20
    assert (solve(boards.puzzles)[1] == 1).all()
    known = canonical_code(all_of_order_4(5).puzzles)
    assert np.isin(canonical_code(boards.puzzles), known).all()


@pytest.mark.parametrize(("clues", "number"), [(4, 13), (6, 376)])
def test_number_of_puzzles_of_order_4(clues: int, number: int) -> None:
    boards = all_of_order_4(clues)
    assert len(boards.puzzles) == number
    assert len(np.unique(canonical_code(boards.puzzles))) == number


@pytest.mark.parametrize("order", ORDERS)
def test_no_puzzle_of_one_set_is_equivalent_to_one_of_another(order: int) -> None:
    sizes = {"test": 60, "val": 70, "train": 80}
    sets = make_splits(order, sizes, seed=3)
    assert {name: len(boards.puzzles) for name, boards in sets.items()} == sizes
    keys = np.concatenate([equivalence_key(boards) for boards in sets.values()])
    assert len(np.unique(keys)) == sum(sizes.values())


def test_says_how_many_there_are_if_there_are_too_few() -> None:
    with pytest.raises(ValueError, match=r"expected 500 inequivalent.*got 376, which are all"):
        make_splits(4, {"train": 400, "val": 100})
    with pytest.raises(ValueError, match=r"expected 5000 inequivalent puzzles of order 6.*got "):
        generate(6, 5000, 35)


@pytest.mark.parametrize("clues", [3, 16, (6, 5), (2, 8), (6, 17)])
def test_impossible_clues_are_refused_by_name(clues: int | tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"clues: expected .*4\.\.15"):
        generate(4, 1, clues)


_FORTY = generate(6, 40)


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 39), st.integers(0, 2**40))
def test_nothing_equivalent_to_a_held_out_puzzle_is_trained_on(size: int, seed: int) -> None:
    boards = _FORTY
    doubled = boards.take(np.r_[0:40, 0:40])
    sets = hold_out(doubled, size, seed)
    assert len(sets["val"].puzzles) == size
    assert not np.isin(equivalence_key(sets["train"]), equivalence_key(sets["val"])).any()
    known = len(sets["train"].puzzles) + 2 * len(np.unique(equivalence_key(sets["val"])))
    assert known == 80


def test_holding_out_everything_is_refused() -> None:
    with pytest.raises(ValueError, match="num_val: expected fewer than the 5"):
        hold_out(generate(6, 5), 5, 0)

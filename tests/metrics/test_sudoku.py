from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import default_collate

from puma_lightning.data.sudoku import SudokuDataset
from puma_lightning.data.sudoku.board import ORDERS, Boards, is_solved, random_symmetry
from puma_lightning.data.sudoku.generate import generate
from puma_lightning.metrics.sudoku import CellAccuracy, SudokuSolved, solved_grids

LAYOUTS = ("in_place", "prompt_answer")
boards_for = st.tuples(st.sampled_from(ORDERS), st.sampled_from(LAYOUTS))


@cache
def batch(order: int, layout: str) -> tuple[Tensor, Tensor]:
    """Twelve boards as (input_ids, prompt_mask)."""
    items = default_collate(SudokuDataset(generate(order, 12), layout).__getitems__(list(range(12))))
    return items["input_ids"], items["prompt_mask"]


@settings(deadline=None, max_examples=60)
@given(boards_for, st.data())
def test_one_wrong_cell_and_the_grid_is_not_solved(board: tuple[int, str], data: st.DataObject) -> None:
    order, layout = board
    input_ids, prompt_mask = batch(order, layout)
    assert solved_grids(input_ids, input_ids, prompt_mask).all()
    row = data.draw(st.integers(0, 11))
    cell = data.draw(st.integers(input_ids.shape[1] - order**2, input_ids.shape[1] - 1))
    tokens = input_ids.clone()
    tokens[row, cell] = data.draw(st.integers(0, order + 1).filter(lambda digit: digit != tokens[row, cell]))
    assert solved_grids(tokens, input_ids, prompt_mask).tolist() == [i != row for i in range(12)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", ORDERS)
def test_a_right_grid_with_other_clues_is_not_solved(order: int, layout: str) -> None:
    boards = generate(order, 12)
    symmetry = random_symmetry(order, 7, np.arange(12))
    other = Boards(symmetry(boards.puzzles), symmetry(boards.solutions))
    agree = ((other.solutions == boards.puzzles) & (boards.puzzles > 0)).sum(axis=1)
    clues = (boards.puzzles > 0).sum(axis=1)
    assert ((agree > 0) & (agree < clues)).any()  # some but not all clues kept
    input_ids, prompt_mask = batch(order, layout)
    tokens = input_ids.clone()
    tokens[:, -(order**2) :] = torch.from_numpy(other.solutions.astype(np.int64))
    assert solved_grids(tokens, input_ids, prompt_mask).tolist() == (agree == clues).tolist()


def test_another_solution_of_an_ambiguous_puzzle_counts() -> None:
    grids = torch.tensor([[1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1]])
    clues = torch.zeros_like(grids, dtype=torch.bool)
    clues[:, 0] = True
    swapped = torch.tensor([0, 1, 3, 2, 4])[grids]
    assert solved_grids(swapped, grids, clues).all()
    assert SudokuSolved()(swapped, grids, clues) == 1
    assert CellAccuracy()(swapped, grids, clues) == 7 / 15


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(ORDERS), st.integers(0, 2**31), st.floats(0, 0.05))
def test_agrees_with_the_numpy_rule(order: int, seed: int, noise: float) -> None:
    rng = np.random.default_rng(seed)
    grids = generate_cached(order).astype(np.int64)
    grids = np.where(rng.random(grids.shape) < noise, rng.integers(0, order + 2, grids.shape), grids)
    tokens = torch.from_numpy(grids)
    no_clues = torch.zeros_like(tokens, dtype=torch.bool)
    assert solved_grids(tokens, tokens, no_clues).tolist() == is_solved(grids).tolist()


@cache
def generate_cached(order: int) -> np.ndarray:
    return generate(order, 12).solutions


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shares_over_batches_of_different_size(layout: str) -> None:
    input_ids, prompt_mask = batch(6, layout)
    tokens = input_ids.clone()
    tokens[:3, -36:] = 7  # three boards left masked
    tokens = torch.where(prompt_mask, input_ids, tokens)
    solved, cells = SudokuSolved(), CellAccuracy()
    for part in (slice(0, 5), slice(5, 12)):
        for metric in (solved, cells):
            metric.update(tokens[part], input_ids[part], prompt_mask[part])
    open_cells = (~prompt_mask).sum(dim=1)
    assert solved.compute() == pytest.approx(9 / 12)
    assert cells.compute() == pytest.approx((open_cells[3:].sum() / open_cells.sum()).item())
    solved.reset()
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert torch.isnan(solved.compute())


def test_wrong_shapes_are_refused() -> None:
    tokens, mask = torch.zeros(2, 81, dtype=torch.long), torch.zeros(2, 81, dtype=torch.bool)
    for metric in (SudokuSolved(), CellAccuracy()):
        with pytest.raises(ValueError, match=r"expected .*one shape \(B, L\), got \(2, 81\), \(2, 81\) and \(1, 81\)"):
            metric.update(tokens, tokens, mask[:1])
        with pytest.raises(ValueError, match=r"expected .*one shape"):
            metric.update(tokens[0], tokens[0], mask[0])
        with pytest.raises(ValueError, match=r"expected sequences of .* tokens, .* got 80"):
            metric.update(tokens[:, 1:], tokens[:, 1:], mask[:, 1:])

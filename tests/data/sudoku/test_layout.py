"""Where a board lies in a sequence: one place writes it, reads it and draws it."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

from puma_lightning.data.sudoku.board import ORDERS
from puma_lightning.data.sudoku.generate import generate
from puma_lightning.data.sudoku.layout import (
    Layout,
    board_of,
    board_of_length,
    clues_of,
    lay_out,
    picture_of,
    sequence_length,
)

ROOT = Path(__file__).parents[3]
LAYOUTS: tuple[Layout, ...] = ("in_place", "prompt_answer")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", ORDERS)
def test_what_is_written_is_read_again(order: int, layout: Layout) -> None:
    boards = generate(order, 10)
    tokens, given = lay_out(boards, layout)
    assert tokens.shape == given.shape == (10, sequence_length(order, layout))
    assert np.array_equal(board_of(tokens, order), boards.solutions)
    assert np.array_equal(board_of(tokens[0], order), boards.solutions[0])
    clues, is_clue = clues_of(torch.from_numpy(tokens), torch.from_numpy(given))
    assert np.array_equal(np.where(is_clue, clues, 0), boards.puzzles)
    open_cells = ~board_of(given, order)
    assert (open_cells == (boards.puzzles == 0)).all() if layout == "in_place" else open_cells.all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", ORDERS)
def test_the_picture_shows_the_board_that_is_filled_in(order: int, layout: Layout) -> None:
    tokens, _ = lay_out(generate(order, 1), layout)
    picture = picture_of(order, layout)
    assert picture.positions.shape == (order, order)
    assert picture.box is not None and picture.box[0] * picture.box[1] == order
    assert np.array_equal(tokens[0][picture.positions], board_of(tokens, order).reshape(order, order))


def test_length_names_the_board() -> None:
    for order in ORDERS:
        for layout in LAYOUTS:
            assert board_of_length(sequence_length(order, layout)) == (order, layout)
    with pytest.raises(ValueError, match=r"16, 32, 36, 72, 81, 162.*got 80"):
        board_of_length(80)
    with pytest.raises(ValueError, match=r"layout: .*got 'aside'"):
        sequence_length(9, "aside")  # type: ignore[arg-type]


def cuts_out_a_board(node: ast.AST) -> bool:
    """Whether code slices something by a number of cells."""
    if not isinstance(node, ast.Subscript):
        return False
    slices = [part for part in ast.walk(node.slice) if isinstance(part, ast.Slice)]
    return any("cells" in ast.unparse(part) or "order" in ast.unparse(part) for part in slices)


def test_nothing_else_knows_where_the_board_lies() -> None:
    found = {
        str(path.relative_to(ROOT))
        for folder in ("src", "experiments", "benchmarks", "docs")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if cuts_out_a_board(node)
    }
    assert "src/puma_lightning/data/sudoku/layout.py" in found
    # Puzzle files: the digits that are allowed, not places.
    assert found <= {"src/puma_lightning/data/sudoku/layout.py", "src/puma_lightning/data/sudoku/files.py"}

"""Sudoku: the DataModule; and boards, a batched solver, a generator and file formats in plain numpy."""

from puma_lightning.data.sudoku.board import (
    Boards,
    equivalence_key,
    geometry,
    is_solved,
    random_symmetry,
)
from puma_lightning.data.sudoku.datamodule import SudokuDataModule, SudokuDataset
from puma_lightning.data.sudoku.files import read_boards, read_puzzles, write_csv
from puma_lightning.data.sudoku.generate import generate, make_splits
from puma_lightning.data.sudoku.layout import Layout, board_of, board_of_length, sequence_length
from puma_lightning.data.sudoku.solver import solve

__all__ = [
    "Boards",
    "Layout",
    "SudokuDataModule",
    "SudokuDataset",
    "board_of",
    "board_of_length",
    "equivalence_key",
    "generate",
    "geometry",
    "is_solved",
    "make_splits",
    "random_symmetry",
    "read_boards",
    "read_puzzles",
    "sequence_length",
    "solve",
    "write_csv",
]

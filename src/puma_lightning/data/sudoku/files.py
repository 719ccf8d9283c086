"""Sudoku files: CSV with solutions, text with one puzzle per line, and the published ``.npy`` rows.

Every reader raises ``ValueError`` naming the file and the line (or row), what was expected, what came and
what to do about it.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from puma_lightning.data.sudoku.board import Boards, Grid, geometry, is_solved
from puma_lightning.data.sudoku.solver import solve
from puma_lightning.files import replacing

SUFFIXES = (".csv", ".csv.gz", ".txt", ".txt.gz", ".npy")
_Line = tuple[int, tuple[str, ...]]
_NPY_COLUMNS = 1 + 81 * 4
_NPY_ROWS_AT_ONCE = 50_000


def read_boards(path: str | Path, order: int, limit: int | None = None, progress: bool = False) -> Boards:
    """Read puzzles with their solutions, and make sure that each has exactly that one.

    Args:
        path: ``.csv``, ``.txt`` (either may end in ``.gz``) or ``.npy``.
        order: The boards' order.
        limit: Read this many puzzles at most.
        progress: Show a progress bar on stderr while checking many puzzles.

    Returns:
        N boards, in the order of the file.

    Raises:
        ValueError: If the file can't be read, is in another format, or holds a board that is not a Sudoku
            with exactly one solution.
    """
    puzzles, given, lines = _read(Path(path), order, limit)
    if given is not None:
        _check_solutions(Path(path), puzzles, given, lines)
    _check_clues(Path(path), puzzles, lines)
    solutions, found = solve(puzzles, progress)
    _reject(Path(path), lines, found == 0, "a board with one solution", "one with no solution")
    _reject(Path(path), lines, found > 1, "a board with one solution", "one with two or more solutions")
    return Boards(puzzles, solutions)


def read_puzzles(path: str | Path, order: int, limit: int | None = None) -> Grid:
    """Read puzzles only: solutions are neither needed nor looked for.

    Args:
        path: As for ``read_boards``; a CSV file needs its ``puzzle`` column only.
        order: The boards' order.
        limit: Read this many puzzles at most.

    Returns:
        (N, order * order), 0 = empty.

    Raises:
        ValueError: If the file can't be read or is in another format, or two clues contradict each other.
    """
    puzzles, _, lines = _read(Path(path), order, limit, solution_optional=True)
    _check_clues(Path(path), puzzles, lines)
    return puzzles


def write_csv(path: str | Path, boards: Boards) -> None:
    """Write ``puzzle,solution`` lines, whole or not at all; compressed if the name ends in ``.gz``.

    Args:
        path: The file to write or replace.
        boards: N boards.
    """
    rows = zip(_to_lines(boards.puzzles), _to_lines(boards.solutions), strict=True)
    text = "".join(["puzzle,solution\n", *(f"{puzzle},{solution}\n" for puzzle, solution in rows)]).encode()
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(gzip.compress(text, mtime=0) if str(path).endswith(".gz") else text)


class _Lines:
    """What to call the boards of a file: ``line 7`` of a text, ``row 7`` of an array."""

    def __init__(self, kind: str, numbers: NDArray[np.int64]) -> None:
        self.kind, self.numbers = kind, numbers


def _read(
    path: Path, order: int, limit: int | None, solution_optional: bool = False
) -> tuple[Grid, Grid | None, _Lines]:
    """Read any format: puzzles, solutions where the format has them, and the boards' line numbers."""
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path}: expected a file name ending in one of {', '.join(SUFFIXES)}, got another; rename it")
    if not path.is_file():
        raise ValueError(f"{path}: expected a file, got none; check the path")
    if path.name.endswith(".npy"):
        return _read_npy(path, order, limit)
    reader = _read_csv if path.name.endswith((".csv", ".csv.gz")) else _read_text
    opener = gzip.open if path.name.endswith(".gz") else open
    line = 0
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as text:
            rows = []
            for line, fields in islice(reader(path, text, order, solution_optional), limit):
                rows.append((line, fields))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path}, after line {line}: expected a complete gzip file, got a truncated or damaged one "
            f"({error}); copy or download it again"
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"{path}, after line {line}: expected text, got other bytes ({error}); save the file as UTF-8"
        ) from error
    if not rows:
        raise ValueError(f"{path}, line {line + 1}: expected at least one puzzle, got an empty file; name another file")
    lines = _Lines("line", np.array([line for line, _ in rows]))
    columns = [_to_grids([fields[i] for _, fields in rows]) for i in range(len(rows[0][1]))]
    return columns[0], columns[1] if len(columns) > 1 else None, lines


def _read_csv(path: Path, text: TextIO, order: int, solution_optional: bool) -> Iterator[_Line]:
    """Yield (line number, (puzzle, solution)), or (line number, (puzzle,)) where no solution is needed."""
    reader = csv.reader(text)
    header = next(reader, None)
    if header is None:
        raise ValueError(f"{path}, line 1: expected the header puzzle,solution, got an empty file; name another file")
    names = ["puzzle"] if solution_optional else ["puzzle", "solution"]
    if [name.strip() for name in header[: len(names)]] != names:
        raise ValueError(
            f"{path}, line 1: expected a header that starts with {','.join(names)}, "
            f"got {_short(','.join(header))}; rename or reorder the columns (one puzzle per line and "
            "no header: call the file .txt)"
        )
    for row in reader:
        if not row:
            continue
        if len(row) < len(names):
            raise ValueError(
                f"{path}, line {reader.line_num}: expected columns {','.join(names)}, got {len(row)} column; correct "
                "the line"
            )
        puzzle = _board(path, reader.line_num, row[0], order, "puzzle")
        if solution_optional:
            yield reader.line_num, (puzzle,)
        else:
            solution = _board(path, reader.line_num, row[1], order, "solution")
            yield reader.line_num, (puzzle, solution)


def _read_text(path: Path, text: TextIO, order: int, solution_optional: bool) -> Iterator[_Line]:
    """Yield (line number, (puzzle,))."""
    for number, line in enumerate(text, start=1):
        if line.strip():
            yield number, (_board(path, number, line, order, "puzzle"),)


def _board(path: Path, line: int, field: str, order: int, what: str) -> str:
    """Return one board as digits, or raise ``ValueError`` with what is wrong with it."""
    digits = field.strip().replace(".", "0") if what == "puzzle" else field.strip()
    cells, fewest = order * order, 0 if what == "puzzle" else 1
    if len(digits) != cells:
        hint = {16: 4, 36: 6, 81: 9}.get(len(digits))
        advice = f"set order to {hint}" if hint else "check the file"
        raise ValueError(
            f"{path}, line {line}: expected a {what} of {cells} digits (order {order}), got {len(digits)} "
            f"characters {_short(field)}; {advice}"
        )
    if not set(digits) <= set("0123456789"[fewest : order + 1]):
        empty = ", 0 or . for an empty cell" if what == "puzzle" else ""
        raise ValueError(
            f"{path}, line {line}: expected a {what} with digits 1..{order}{empty}, got {_short(field)}; check the file"
        )
    return digits


def _read_npy(path: Path, order: int, limit: int | None) -> tuple[Grid, Grid, _Lines]:
    """Read rows of [k, 81 x (row, column, value, strategy)], the k givens first."""
    expected = f"rows of {_NPY_COLUMNS} integers (number of givens, 81 x (row, column, value, strategy))"
    if order != 9:
        raise ValueError(f"order: expected 9, which .npy files such as {path} hold, got {order}; set order to 9")
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"{path}: expected {expected}, got a truncated or foreign file ({error}); copy or download it again"
        ) from error
    if not isinstance(table, np.ndarray) or table.ndim != 2 or table.shape[1] != _NPY_COLUMNS:
        raise ValueError(
            f"{path}: expected {expected}, got {getattr(table, 'shape', 'several arrays')}; name another file"
        )
    if table.dtype.kind not in "iuf":
        raise ValueError(f"{path}: expected {expected}, got {table.dtype}; name another file")
    if not len(table):
        raise ValueError(f"{path}, row 1: expected at least one puzzle, got an empty file; name another file")

    # One row may not touch the border, so only the whole file tells whether counting starts at 0 or at 1.
    parts = range(0, len(table), _NPY_ROWS_AT_ONCE)
    lows, highs = [], []
    for start in tqdm(parts, desc=f"Reading {path.name}", unit=" parts", delay=2):
        places = table[start : start + _NPY_ROWS_AT_ONCE, 1:].reshape(-1, 81, 4)[:, :, :2]
        lows.append(places.min(axis=(1, 2)))
        highs.append(places.max(axis=(1, 2)))
    low, high = np.concatenate(lows), np.concatenate(highs)
    base = 0 if low.min() == 0 else 1
    lines = _Lines("row", np.arange(1, len(table) + 1))
    in_range = (low >= base) & (high <= base + 8)
    _reject(path, lines, ~in_range, f"rows and columns {base}..{base + 8} as elsewhere in the file", "others")

    n = len(table) if limit is None else min(limit, len(table))
    puzzles, solutions = np.zeros((2, n, 81), np.uint8)
    for start in tqdm(range(0, n, _NPY_ROWS_AT_ONCE), desc=f"Checking {path.name}", unit=" parts", delay=2):
        rows = np.arange(start, min(start + _NPY_ROWS_AT_ONCE, n))
        block = np.asarray(table[rows]).astype(np.int64)
        here = _Lines("row", rows + 1)
        _reject(path, here, (block != table[rows]).any(axis=1), "integers", "fractions")
        givens, quads = block[:, 0], block[:, 1:].reshape(-1, 81, 4)
        cells = (quads[:, :, 0] - base) * 9 + quads[:, :, 1] - base
        values = quads[:, :, 2]
        _reject(path, here, (givens < 0) | (givens > 81), "a number of givens within 0..81", "another")
        _reject(path, here, (values.min(axis=1) < 1) | (values.max(axis=1) > 9), "values 1..9", "others")
        missing = (np.sort(cells, axis=1) != np.arange(81)).any(axis=1)
        _reject(path, here, missing, "each of the 81 cells once", "a cell twice")
        solution = np.zeros_like(values)
        np.put_along_axis(solution, cells, values, axis=1)
        clue = np.zeros_like(values)
        np.put_along_axis(clue, cells, np.where(np.arange(81) < givens[:, None], values, 0), axis=1)
        solutions[rows], puzzles[rows] = solution, clue
    return puzzles, solutions, _Lines("row", np.arange(1, n + 1))


def _check_solutions(path: Path, puzzles: Grid, solutions: Grid, lines: _Lines) -> None:
    """Reject solutions that break the rules or do not continue their puzzle."""
    broken = ~is_solved(solutions)
    _reject(path, lines, broken, "a solution with every digit once per row, column and box", "another grid")
    contradicted = ((puzzles != 0) & (puzzles != solutions)).any(axis=1)
    _reject(path, lines, contradicted, "a solution that keeps its puzzle's clues", "one that changes a clue")


def _check_clues(path: Path, puzzles: Grid, lines: _Lines) -> None:
    """Reject puzzles that hold a digit twice in one group."""
    order = int(len(puzzles[0]) ** 0.5)
    twice = np.zeros(len(puzzles), np.bool_)
    for group in geometry(order).groups:
        clues = np.sort(puzzles[:, group], axis=1)
        twice |= ((clues[:, 1:] == clues[:, :-1]) & (clues[:, 1:] > 0)).any(axis=1)
    _reject(path, lines, twice, "different clues in each row, column and box", "one twice, so no solution")


def _reject(path: Path, lines: _Lines, wrong: NDArray[np.bool_], expected: str, got: str) -> None:
    """Raise ``ValueError`` about the first board that is wrong, if any."""
    if wrong.any():
        number, rest = lines.numbers[wrong.argmax()], int(wrong.sum()) - 1
        others = f" (and {rest} more like it)" if rest else ""
        raise ValueError(
            f"{path}, {lines.kind} {number}: expected {expected}, got {got}{others}; correct or remove the {lines.kind}"
        )


def _to_grids(boards: list[str]) -> Grid:
    digits = np.frombuffer("".join(boards).encode(), np.uint8) - np.uint8(ord("0"))
    return digits.reshape(len(boards), -1)


def _to_lines(grids: Grid) -> list[str]:
    return [row.tobytes().decode() for row in grids + np.uint8(ord("0"))]


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "...")

import gzip
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from puma_lightning.data.sudoku.board import ORDERS, Boards
from puma_lightning.data.sudoku.files import read_boards, read_puzzles, write_csv
from puma_lightning.data.sudoku.generate import generate

made = cache(generate)
REAL = Path(__file__).parents[3] / ".." / "shared" / "data" / "sudoku"


def text_of(grids: np.ndarray) -> list[str]:
    return ["".join(map(str, row)) for row in grids.tolist()]


def published(boards: Boards, base: int) -> np.ndarray:
    """Rows of [k, 81 x (row, column, value, strategy)], givens first, cells otherwise in random order."""
    rng = np.random.default_rng(0)
    rows = []
    for puzzle, solution in zip(*boards, strict=True):
        cells = rng.permutation(81)
        cells = cells[np.argsort(puzzle[cells] == 0, kind="stable")]
        strategy = np.where(puzzle[cells] == 0, rng.integers(1, 20, 81), 0)
        quads = np.stack([cells // 9 + base, cells % 9 + base, solution[cells], strategy], axis=1)
        rows.append([(puzzle > 0).sum(), *quads.ravel()])
    return np.array(rows)


def same(read: Boards, expected: Boards) -> bool:
    return all(np.array_equal(a, b) and a.dtype == np.uint8 for a, b in zip(read, expected, strict=True))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_csv_round_trip(tmp_path: Path, order: int, name: str) -> None:
    write_csv(tmp_path / name, made(order, 20))
    assert same(read_boards(tmp_path / name, order), made(order, 20))
    assert same(read_boards(tmp_path / name, order, limit=7), made(order, 20).take(slice(7)))
    assert np.array_equal(read_puzzles(tmp_path / name, order), made(order, 20).puzzles)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_csv_of_other_programs(tmp_path: Path) -> None:
    boards = made(6, 3)
    puzzles, solutions = text_of(boards.puzzles), text_of(boards.solutions)
    lines = [f"{p.replace('0', '.')},{s},1.5" for p, s in zip(puzzles, solutions, strict=True)]
    content = "\ufeffpuzzle,solution,rating\r\n" + "\r\n".join(lines) + "\r\n\r\n"
    (tmp_path / "a.csv").write_bytes(content.encode())
    assert same(read_boards(tmp_path / "a.csv", 6), boards)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
@pytest.mark.parametrize("empty", ["0", "."])
def test_one_puzzle_per_line(tmp_path: Path, name: str, empty: str) -> None:
    content = "\n".join(text_of(made(9, 5).puzzles)).replace("0", empty).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert same(read_boards(tmp_path / name, 9), made(9, 5))


@pytest.mark.parametrize("base", [0, 1])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
def test_published_rows(tmp_path: Path, base: int, dtype: type) -> None:
    np.save(tmp_path / "a.npy", published(made(9, 5), base).astype(dtype))
    assert same(read_boards(tmp_path / "a.npy", 9), made(9, 5))
    assert same(read_boards(tmp_path / "a.npy", 9, limit=2), made(9, 5).take(slice(2)))


def csv_with(order: int, puzzle: str | None = None, solution: str | None = None) -> str:
    """Two good lines, then one with these boards."""
    boards = made(order, 3)
    pairs = list(zip(text_of(boards.puzzles), text_of(boards.solutions), strict=True))
    pairs[2] = (puzzle or pairs[2][0], solution or pairs[2][1])
    return "\n".join(["puzzle,solution", *(f"{p},{s}" for p, s in pairs)]) + "\n"


GOOD = text_of(made(4, 3).solutions)[2]
CLUES = text_of(made(4, 3).puzzles)[2]
OTHER_CLUE = "".join(str(int(d) % 4 + 1) if d != "0" else "0" for d in CLUES)

BAD_TEXTS = {
    "empty": ("a.csv", "", "line 1: expected the header puzzle,solution, got an empty file"),
    "header only": ("a.csv", "puzzle,solution\n", "expected at least one puzzle, got an empty file"),
    "header": ("a.csv", "quizzes,solutions\n1,1\n", "line 1: .*starts with puzzle,solution, got 'quizzes,sol"),
    "no header": ("a.csv", f"{CLUES},{GOOD}\n", "line 1: .*call the file .txt"),
    "other file": ("a.csv", "\x00\x01\x02", "line 1: "),
    "columns": ("a.csv", f"puzzle,solution\n{CLUES}\n", "line 2: expected columns puzzle,solution, got 1"),
    "length": ("a.csv", csv_with(4, CLUES[1:]), "line 4: expected a puzzle of 16 digits .*got 15 characters"),
    "order": ("a.csv", csv_with(6), "line 2: .*16 digits .order 4.*got 36 .*set order to 6"),
    "letters": ("a.csv", csv_with(4, "x" * 16), "line 4: expected a puzzle with digits 1..4.*got 'xxx"),
    "digit": ("a.csv", csv_with(4, "5" + CLUES[1:]), "line 4: expected a puzzle with digits 1..4"),
    "gap": ("a.csv", csv_with(4, solution="0" + GOOD[1:]), "line 4: expected a solution with digits 1..4, "),
    "rules": ("a.csv", csv_with(4, solution="1" * 16), "line 4: expected a solution with every digit once"),
    "clue": ("a.csv", csv_with(4, OTHER_CLUE), "line 4: .*keeps its puzzle's clues, got .*changes a clue"),
    "two": ("a.csv", csv_with(4, "0" * 16), "line 4: .*one solution, got one with two or more solutions; correct"),
    "text empty": ("a.txt", "\n\n", "expected at least one puzzle"),
    "text two": ("a.txt", f"{CLUES}\n\n{'.' * 16}", "line 3: .*one solution, got one with two or more"),
    "text none": ("a.txt", f"{CLUES}\n1230000400000000\n", "line 2: .*one solution, got one with no solution"),
    "text twice": ("a.txt", "1100" + "0" * 12, "line 1: expected different clues .*no solution"),
    "text length": ("a.txt", CLUES + "\n12", "line 2: expected a puzzle of 16 digits"),
    "suffix": ("a.tsv", "", "name ending in one of .csv"),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_bad_text_is_refused_with_file_and_line(tmp_path: Path, case: str) -> None:
    name, content, message = BAD_TEXTS[case]
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / name)) + ".*" + message):
        read_boards(tmp_path / name, 4)


def test_the_first_of_several_bad_lines_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join([CLUES, "." * 16, CLUES, "." * 16, "." * 16]))
    with pytest.raises(ValueError, match=r"line 2: .*\(and 2 more like it\)"):
        read_boards(tmp_path / "a.txt", 4)


def test_broken_files_are_refused(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv.gz", made(9, 200))
    whole = (tmp_path / "a.csv.gz").read_bytes()
    (tmp_path / "a.csv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.csv\.gz, after line \d\d+: expected a complete gzip file"):
        read_boards(tmp_path / "a.csv.gz", 9)
    (tmp_path / "a.csv.gz").write_bytes(whole[:500] + b"\xff\x00\xff" + whole[503:])
    with pytest.raises(ValueError, match=r"a\.csv\.gz, "):
        read_boards(tmp_path / "a.csv.gz", 9)
    (tmp_path / "a.csv.gz").write_text("puzzle,solution\n")
    with pytest.raises(ValueError, match=r"a\.csv\.gz, after line 0: expected a complete gzip file"):
        read_boards(tmp_path / "a.csv.gz", 9)
    (tmp_path / "a.csv").write_bytes(b"puzzle,solution\n\xff\xfe")
    with pytest.raises(ValueError, match=r"a\.csv, after line 0: expected text"):
        read_boards(tmp_path / "a.csv", 9)
    with pytest.raises(ValueError, match=r"b\.csv: expected a file, got none"):
        read_boards(tmp_path / "b.csv", 9)


def change(rows: np.ndarray, row: int, column: int, value: float) -> np.ndarray:
    rows = rows.copy() if value == int(value) else rows.astype(np.float64)
    rows[row, column] = value
    return rows


ROWS = published(made(9, 3), 0)
CLUE_GROUP = 1 + 2  # the value of the first given
BAD_ROWS = {
    "columns": (ROWS[:, 1:], "expected rows of 325 integers .*got .3, 324"),
    "empty": (ROWS[:0], "row 1: expected at least one puzzle"),
    "kind": (ROWS.astype(str), "expected rows of 325 integers"),
    "fraction": (change(ROWS, 1, 0, 30.5), "row 2: expected integers"),
    "givens": (change(ROWS, 2, 0, 82), "row 3: expected a number of givens within 0..81"),
    "value": (change(ROWS, 1, 3, 10), "row 2: expected values 1..9"),
    "place": (change(ROWS, 1, 1, 9), r"row 2: expected rows and columns 0\.\.8 as elsewhere"),
    "base": (np.concatenate([ROWS, published(made(9, 1), 1)]), r"row 4: expected rows and columns 0\.\.8"),
    "cell twice": (change(ROWS, 1, slice(1, 3), 0) * 1, "row 2: expected each of the 81 cells once"),  # type: ignore[arg-type]
    "rules": (change(ROWS, 1, 3, ROWS[1, 3] % 9 + 1), "row 2: expected a solution with every digit once"),
    "two": (change(ROWS, 1, 0, 5), "row 2: expected a board with one solution, got one with two or more"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_refused_with_file_and_row(tmp_path: Path, case: str) -> None:
    rows, message = BAD_ROWS[case]
    np.save(tmp_path / "a.npy", rows)
    with pytest.raises(ValueError, match=r"a\.npy.*" + message):
        read_boards(tmp_path / "a.npy", 9)


def test_broken_npy_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", ROWS)
    whole = (tmp_path / "a.npy").read_bytes()
    for content in (b"", whole[:50], whole[:-9], b"puzzle,solution\n"):
        (tmp_path / "a.npy").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.npy: .*truncated or foreign file"):
            read_boards(tmp_path / "a.npy", 9)
    with pytest.raises(ValueError, match=r"^order: expected 9, which .*a\.npy hold, got 6; set order to 9$"):
        read_boards(tmp_path / "a.npy", 6)


def test_puzzles_alone_need_no_solution(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"puzzle\n{CLUES}\n{'.' * 16}\n")
    assert read_puzzles(tmp_path / "a.csv", 4).tolist() == [[int(d) for d in CLUES], [0] * 16]
    (tmp_path / "a.txt").write_text("1100" + "0" * 12)
    with pytest.raises(ValueError, match=r"a\.txt, line 1: expected different clues"):
        read_puzzles(tmp_path / "a.txt", 4)


@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize("name", ["train", "test_easy", "test_hard"])
def test_real_puzzles(name: str) -> None:
    boards = read_boards(REAL / f"{name}.csv.gz", 9, limit=400)
    assert boards.puzzles.shape == (400, 81)

"""Settings and files that can't be meant: each is refused, or warned of, by name and before work begins."""

import inspect
import json
import math
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from puma_lightning import SudokuDataModule, TextDataModule, TinyGSMDataModule, WordProblemsDataModule
from puma_lightning.cli import main
from puma_lightning.data.sudoku import datamodule as sudoku
from puma_lightning.data.sudoku import generate, write_csv
from puma_lightning.data.word_problems import generate as words

KINDS = (SudokuDataModule, TextDataModule, TinyGSMDataModule, WordProblemsDataModule)
TEXT = (TextDataModule, TinyGSMDataModule)
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
ROWS = [{"text": f"the cat sat on mat {i}"} for i in range(40)]


def quiet(kind: Any, folder: Path, **arguments: Any) -> Any:
    """Without what is on the hub."""
    none = {"train_file": None, "gsm8k_file": None} if kind is TinyGSMDataModule else {}
    return kind(**{**none, "cache_dir": str(folder), **arguments})


def cases() -> Iterator[tuple[Any, str, Any]]:
    """Every argument of every DataModule, with values of another type or out of range."""
    for kind in KINDS:
        for name, parameter in inspect.signature(kind).parameters.items():
            sort = str(parameter.annotation).replace("<class '", "").replace("'>", "")
            if sort.startswith("int"):
                for value in ("4", 2.5, math.nan, True, [1], -1, {}):
                    yield kind, name, value
                if "None" not in sort:
                    yield kind, name, None
            elif name.endswith("_file"):
                for value in ("", "  ", [], 5, [""], {}, [None], "/dev/null", "/no/such.csv", "~nobody-here/a.csv"):
                    yield kind, name, value
            elif name in ("layout", "padding", "text_unit", "packing", "streaming"):
                for value in ("other", 5, None, ["line"]):
                    yield kind, name, value
            elif name == "tokenizer":
                for value in ("", 5, "~nobody-here/tokenizer.json", "/dev/null"):
                    yield kind, name, value
            elif name in ("cache_dir", "mask_token", "eos_token", "text_column", "question_column", "code_column"):
                for value in ("", " ", 5):
                    yield kind, name, value
    for value in (5, None):
        yield TinyGSMDataModule, "separator", value
    for value in (99, 0, -1, 81, (40, 30), (30,), (30, 31, 32), "32", 32.0, True, {}):
        yield SudokuDataModule, "clues", value
    for value in (5, "six", 4.0, None, -4, True, [4]):
        yield SudokuDataModule, "order", value
    for kind in KINDS:
        for name, value in (("seed", 2**32), ("seed", 2**70), ("num_workers", 65 * CORES), ("num_workers", 10**9)):
            yield kind, name, value
    for value in (10**7, 10**12):
        yield SudokuDataModule, "augment", value
    for kind in KINDS[1:]:
        for name, value in (("sequence_length", 10**9), ("vocab_size", 257), ("vocab_size", 10**8)):
            yield kind, name, value
    for name in ("num_train", "num_val", "num_test"):
        yield WordProblemsDataModule, name, 10**9


def test_whatever_is_given_is_refused_by_name(tmp_path: Path) -> None:
    wrong = []
    for kind, name, value in cases():
        try:
            quiet(kind, tmp_path, **{name: value})
            wrong.append(f"{kind.__name__}({name}={value!r}) is accepted")
        except ValueError as error:
            if not re.match(rf"{name}\b.*: (expected .*, got .*; |found no file '\S+')", str(error)):
                wrong.append(f"{kind.__name__}({name}={value!r}): {error}")
    assert not wrong, "\n".join(wrong)
    assert len(list(cases())) > 300


@contextmanager
def said() -> Iterator[list[str]]:
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
        messages += [str(each.message) for each in caught if issubclass(each.category, UserWarning)]


def test_what_may_be_meant_is_warned_of_by_name(tmp_path: Path) -> None:
    puzzles, link = tmp_path / "a.csv", tmp_path / "link.csv"
    write_csv(puzzles, generate(4, 20))
    link.hardlink_to(puzzles)
    text = tmp_path / "a.txt"
    text.write_text("some words\n" * 30)
    Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    table: list[tuple[Any, dict[str, Any], str]] = [
        *((kind, {"num_workers": CORES + 1}, "num_workers: ") for kind in KINDS),
        (SudokuDataModule, {"train_file": str(puzzles), "val_file": str(puzzles)}, "val_file: .*also in train_file"),
        (SudokuDataModule, {"train_file": str(puzzles), "test_file": str(link)}, "test_file: .*also in train_file"),
        (TextDataModule, {"train_file": str(text), "val_file": [str(text)]}, "val_file: .*also in train_file"),
        (TextDataModule, {"train_file": "some/set:a", "test_file": "some/set:a:train"}, "test_file: .*in train_file"),
        (TextDataModule, {"train_file": [str(text)] * 2}, "train_file: .*more than once"),
        (TinyGSMDataModule, {"train_file": str(text), "gsm8k_file": str(text)}, "gsm8k_file: .*also in train_file"),
        *((kind, {"tokenizer": str(tmp_path), "vocab_size": 300}, "vocab_size: 300 is not used") for kind in KINDS[1:]),
    ]
    for kind, arguments, message in table:
        order = {"order": 4} if kind is SudokuDataModule else {}
        with pytest.warns(UserWarning, match=f"^{message}"):
            quiet(kind, tmp_path, **order, **arguments)
    with said() as nothing:
        for kind in KINDS:
            quiet(kind, tmp_path, num_workers=CORES)
        SudokuDataModule(4, train_file=puzzles, cache_dir=str(tmp_path))  # type: ignore[arg-type]  # a Path
        TextDataModule(text, tokenizer=tmp_path, cache_dir=str(tmp_path))  # type: ignore[arg-type]
        TextDataModule(tokenizer=str(tmp_path), vocab_size=4)
        TextDataModule("some/set:a", val_file="some/set:a:validation")
    assert nothing == []


def text_module(folder: Path, rows: Any, **arguments: Any) -> TextDataModule:
    file = folder / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TextDataModule(
        str(file), **{"vocab_size": 280, "sequence_length": 8, "cache_dir": str(folder / "cache"), **arguments}
    )


@pytest.mark.parametrize(
    "value", [{"a": 1}, ["words"], 5, 2.5, True], ids=["dictionary", "list", "number", "fraction", "boolean"]
)
@pytest.mark.parametrize("at", [0, 30])
def test_what_is_no_text_is_refused_with_its_row(tmp_path: Path, value: Any, at: int) -> None:
    """Not trained on as Python prints it."""
    whole, mixed = [{"text": value}] * 40, [*ROWS[:at], {"text": value}, *ROWS[at:]]
    for rows, first in ((whole, r"\d+"), (mixed, at + 1)):
        data = text_module(tmp_path, rows, val_file=str(write_rows(tmp_path)))
        with pytest.raises(ValueError, match=rf"(column 'text', got .* in row {first}; turn it|Column\(.*\) changed)"):
            data.prepare_data()


def write_rows(folder: Path) -> Path:
    (folder / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder / "val.jsonl"


def test_what_is_no_text_is_refused_in_programs_and_formats_of_your_own(tmp_path: Path) -> None:
    rows = [{"question": "q", "code": {"a": 1}, "text": [i]} for i in range(20)]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"train_file: expected texts in the column 'code', got .* in row \d+;"):
        quiet(TinyGSMDataModule, tmp_path / "cache", train_file=str(file), vocab_size=280).prepare_data()

    class Mine(TextDataModule):
        def encode(self, rows: Any, tokenize: Any) -> Any:
            return [(ids, 0) for ids in tokenize(rows["text"])]

    with pytest.raises(ValueError, match=r"tokenize: expected texts, got \[\d+\] \(list\) as number 1 of"):
        Mine(str(file), vocab_size=280, cache_dir=str(tmp_path / "cache")).prepare_data()


def test_tokenizers_that_no_model_can_bear_are_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"a": 0})).save(str(file))
    with pytest.raises(ValueError, match="tokenizer: expected one that can encode any text, got: "):
        TextDataModule(tokenizer=str(file))
    Tokenizer(models.WordLevel({"a": 0, "[UNK]": 7_654}, unk_token="[UNK]")).save(str(file))
    file.write_text(file.read_text().replace("7654", "900000000"))
    with pytest.raises(ValueError, match=r"tokenizer \(its greatest id\): expected at most 4,194,304, got 900,000,000"):
        TextDataModule(tokenizer=str(file))
    known = Tokenizer(models.WordLevel({"<|mask|>": 0, "a": 1}))
    known.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    known.save(str(file))
    with pytest.raises(ValueError, match=r"mask_token: |tokenizer: "):
        TextDataModule(tokenizer=str(file))


def test_an_epoch_that_takes_for_ever_to_draw_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what is in a file too, which is known only once it is read."""
    monkeypatch.setattr(sudoku, "_SEQUENCES_OF_AN_EPOCH", 1000)
    write_csv(tmp_path / "a.csv", generate(4, 60))
    data = SudokuDataModule(4, train_file=str(tmp_path / "a.csv"), num_val=10, augment=21, cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"augment \(copies of 50 puzzles\): expected at most 20, got 21; lower it"):
        data.setup("fit")
    data.augment = 20
    data.setup("fit")
    assert len(data._sets["train"][0]) == 1000


def test_more_word_problems_than_there_are_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_PATIENCE", 10)
    same = words.attempt(0, "train", 0)
    monkeypatch.setattr(words, "attempt", lambda *_: same)
    with pytest.raises(ValueError, match="num_val: expected 2 different word problems, got 1 and no other in 10"):
        words.make_problems(2, 0, "val")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--seed_everything=-1", "seed_everything: expected 0..4294967295, got -1"),
        ("--seed_everything=1099511627776", "seed_everything: expected 0..4294967295"),
        ("--model.init_args.mask_id=3", "model.init_args.mask_id: expected 5, which is what the data has, got 3"),
        (
            "--model.init_args.backbone.init_args.vocab_size=99",
            "vocab_size: expected 6, which is what the data has, got 99",
        ),
    ],
)
def test_the_command_line_ignores_nothing(
    argument: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    parts = ("model=MaskedDiffusion", "model.backbone=TransformerBackbone", "model.forward_process=RandomMasking")
    with pytest.raises(SystemExit):
        data = (
            "--data=SudokuDataModule",
            "--data.order=4",
            f"--data.cache_dir={tmp_path}",
            "--trainer.fast_dev_run=true",
        )
        main(["fit", *(f"--{part}" for part in parts), *data, "--trainer.fast_dev_run=true", argument])
    assert message in capsys.readouterr().err

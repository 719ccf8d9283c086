"""Caches: a damaged one is named and made again, never used; what a living process writes is never swept away."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tqdm import tqdm

from puma_lightning import SudokuDataModule, TextDataModule
from puma_lightning.data import cache
from puma_lightning.data.cache import cache_folder, contents_of, from_cache
from puma_lightning.data.sudoku import generate
from puma_lightning.data.sudoku.cache import cached as cached_boards
from puma_lightning.data.text.sources import Source
from puma_lightning.data.text.token_cache import TokenWriter
from puma_lightning.data.text.token_cache import cached as cached_tokens
from puma_lightning.data.text.tokenizer import cached_tokenizer

TEXTS = ["the cat sat on the mat 123", "def f(x):\n    return x + 12345", "the dog and the cat"] * 20
BOARDS = {"train": generate(4, 20), "val": generate(4, 9)}
Made = tuple[Any, int]


def tokens(folder: Path) -> Made:
    """What a token cache holds, and how often it was made for that."""
    calls: list[int] = []

    def build(writer: TokenWriter) -> None:
        calls.append(1)
        rows = np.arange(600).reshape(20, 30) % 50
        writer.write(rows, np.full(20, 3), np.arange(20), [f"answer {i}" for i in range(20)])
        writer.counts["empty"], writer.rows = 5, 25

    made = cached_tokens(folder, {"rows": "some"}, 30, 50, build)
    batch = {name: [*map(str, values)] for name, values in made.__getitems__(range(20)).items()}
    return (batch, made.rows, dict(made.counts)), len(calls)


def boards(folder: Path) -> Made:
    """What a puzzle cache holds, and how often it was made for that."""
    calls: list[int] = []
    made = cached_boards(folder, {"seed": 0}, lambda: calls.append(1) or BOARDS)  # type: ignore[func-returns-value]
    return {name: [grid.tolist() for grid in each] for name, each in made.items()}, len(calls)


def tokenizer(folder: Path) -> Made:
    """What a tokenizer does, and how often it was trained for that."""
    calls: list[int] = []
    texts = lambda: calls.append(1) or [TEXTS]  # type: ignore[func-returns-value]  # noqa: E731
    made = cached_tokenizer(folder, {"rows": "some"}, texts, 280, None, "<|mask|>")
    return (made.fingerprint, made.encode(TEXTS[:3]), made.tokenizer.to_str()), len(calls)


def rows(folder: Path) -> Made:
    """What is kept of the rows of a file."""
    file = folder.parent / "rows.csv"
    if not file.exists():
        file.write_text("text,number\n" + "".join(f"row {i},{i}\n" for i in range(50)))
    with watching() as caught:
        made = Source("train_file", (file,), "csv").load(folder)
    return made.to_list(), bool(caught)


KINDS: dict[str, Callable[[Path], Made]] = {"tokens": tokens, "boards": boards, "tokenizer": tokenizer, "rows": rows}


@contextmanager
def watching() -> Iterator[list[str]]:
    """What is said inside of damaged caches."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
        messages += [str(each.message) for each in caught if "damaged cache" in str(each.message)]


def damage(content: bytes, lots: random.Random) -> bytes:
    """Cut it off, flip a bit, change a byte, or put zeros in place of some: at random."""
    at = lots.randrange(len(content))
    other = {
        "cut": content[:at],
        "bit": content[:at] + bytes([content[at] ^ 1 << lots.randrange(8)]) + content[at + 1 :],
        "byte": content[:at] + bytes([content[at] ^ lots.randrange(1, 256)]) + content[at + 1 :],
        "zeros": content[:at] + bytes(len(content[at : at + 512])) + content[at + 512 :],
        "longer": content + lots.randbytes(9),
    }
    return other[lots.choice(list(other))]


def damaged_and_opened(kind: str, folder: Path, number: int) -> None:
    """Damage a cache in many ways, and see each time that it is as it was: made again, or nothing was changed by it."""
    lots = random.Random(f"{kind} {number}")
    good, _ = KINDS[kind](folder)
    (path,) = (path for path in folder.iterdir() if path.is_dir())
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    sizes = [file.stat().st_size + 500 for file in files]
    original = {file: file.read_bytes() for file in files}
    for _ in range(number):
        (file,) = lots.choices(files, sizes)
        file.write_bytes(damage(original[file], lots))
        with watching() as said:
            found, made = KINDS[kind](folder)
        assert found == good
        if made:
            assert kind == "rows" or (all(f"{path}: damaged cache (" in each for each in said) and len(said) == 1)
        else:  # white space of meta.json, or zeros that were zeros
            assert file.name == "meta.json" or file.read_bytes() == original[file]
            assert not said
        assert [each for each in folder.iterdir() if each.is_dir()] == [path]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_cache_is_named_and_made_again_never_used(tmp_path: Path, kind: str) -> None:
    damaged_and_opened(kind, tmp_path / "cache", 12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_damaged_caches(tmp_path: Path, kind: str) -> None:
    damaged_and_opened(kind, tmp_path / "cache", 100)


@pytest.mark.parametrize("kind", ["tokens", "boards", "tokenizer"])
@pytest.mark.parametrize("loss", ["meta.json", "first", "added", "folder is a file", "empty"])
def test_a_cache_that_lacks_a_part_or_has_one_too_many_is_made_again(tmp_path: Path, kind: str, loss: str) -> None:
    good, _ = KINDS[kind](tmp_path)
    (path,) = tmp_path.iterdir()
    if loss == "added":
        (path / "answers.json.old").write_text("[]")
    elif loss in ("folder is a file", "empty"):
        shutil.rmtree(path)
        path.touch() if loss != "empty" else path.mkdir()
    else:
        (path / loss if loss == "meta.json" else min(path.iterdir())).unlink()
    with pytest.warns(UserWarning, match=rf"{path.name}: damaged cache \("):
        assert KINDS[kind](tmp_path) == (good, 1)
    assert KINDS[kind](tmp_path) == (good, 0) and list(tmp_path.iterdir()) == [path]


def keep(folder: Path, recipe: Any, content: str = "", **_: Any) -> str:
    def build(path: Path) -> dict[str, Any]:
        (path / "file").write_text(content or str(recipe))
        return {}

    return from_cache(folder, "some", recipe, build, lambda path, _: (path / "file").read_text())


def test_a_cache_knows_its_recipe(tmp_path: Path) -> None:
    """Names that were swapped give nobody another's contents, and neither does a copy under a new name."""
    recipes = [{"order": 4}, {"order": 6}]
    made = []
    for recipe in recipes:
        keep(tmp_path, recipe)
        made += [path for path in tmp_path.iterdir() if path not in made]
    made[0].rename(tmp_path / "x")
    made[1].rename(made[0])
    (tmp_path / "x").rename(made[1])
    for recipe in recipes:
        with pytest.warns(UserWarning, match="made by another recipe"):
            assert keep(tmp_path, recipe) == str(recipe)
    assert keep(tmp_path, recipes[0]) == str(recipes[0])


def test_what_is_known_of_a_cache_is_checked_too(tmp_path: Path) -> None:
    good, _ = tokens(tmp_path)
    (path,) = tmp_path.iterdir()
    meta = (path / "meta.json").read_text()
    (path / "meta.json").write_text(meta.replace('"rows": 25', '"rows": 35'))
    with pytest.warns(UserWarning, match=r"damaged cache \(the checksum of meta.json differs"):
        assert tokens(tmp_path) == (good, 1)


def test_of_a_large_file_a_sample_is_checked_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(cache, "rank_zero_info", said.append)
    monkeypatch.setattr(cache, "BLOCK", 10)
    monkeypatch.setattr(cache, "CHECKED", 80)
    content = "".join(map(str, range(100)))  # 19 blocks
    for _ in range(2):
        assert keep(tmp_path, "large", content) == content
    (path,) = tmp_path.iterdir()
    assert len(said) == 2 and f"{path}: checking a sample, 8 of 19 parts of file" in said[0]
    assert (
        cache._choose(19)[0] == 0 and cache._choose(19)[-1] == 18 and len({*map(str, map(cache._choose, [19] * 9))}) > 1
    )
    for at in (3, 189):  # a head or an end that is damaged is always seen
        (path / "file").write_text(content[:at] + "x" + content[at + 1 :])
        with pytest.warns(UserWarning, match=r"the checksum of file differs, (0|180) bytes"):
            assert keep(tmp_path, "large", content) == content
    (path / "file").write_text(content[:90] + "x" + content[91:])
    monkeypatch.setattr(cache, "CHECKED", 2**30)
    with pytest.warns(UserWarning, match="the checksum of file differs, 90 bytes"):
        assert keep(tmp_path, "large", content) == content


@pytest.mark.parametrize("how", ["moved", "written over", "copied back"])
def test_a_file_replaced_by_one_of_equal_size_and_time_is_noticed(tmp_path: Path, how: str) -> None:
    file, other = tmp_path / "a.txt", tmp_path / "b.txt"
    for path, content in ((file, "one"), (other, "two")):
        path.write_text(content)
        os.utime(path, ns=(10**9, 10**9))
    ((ending, first),) = contents_of([file], tmp_path / "cache")
    if how == "moved":
        os.replace(other, file)
    elif how == "copied back":
        shutil.copy2(other, file)
    else:
        file.write_text("two")
        os.utime(file, ns=(10**9, 10**9))
    assert file.stat().st_mtime_ns == 10**9 and ending == ".txt"
    assert contents_of([file], tmp_path / "cache") != [[ending, first]]
    file.write_text("one")
    assert contents_of([file], tmp_path / "cache") == [[ending, first]]


def test_a_file_is_read_once_unless_it_was_changed_just_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file in files:
        file.write_text(file.name)
    read: list[str] = []
    blocks = cache._blocks
    monkeypatch.setattr(cache, "_blocks", lambda file, *rest: read.append(file.name) or blocks(file, *rest))  # type: ignore[func-returns-value]
    first = contents_of(files, tmp_path / "cache")
    assert contents_of(files, tmp_path / "cache") == first and read == ["a.txt", "b.txt"] * 2
    monkeypatch.setattr(cache, "_SECONDS_OF_A_CLOCK_TICK", -60)
    for _ in range(3):
        assert contents_of(files, tmp_path / "cache") == first
    assert read == ["a.txt", "b.txt"] * 3
    files[1].write_text("other")
    assert contents_of(files, tmp_path / "cache") != first and read[6:] == ["b.txt"]
    (memory,) = (tmp_path / "cache").iterdir()
    for content in ("", "[1, 2]", '{"x": 1}', json.dumps({str(files[1]): [None, None]})):
        memory.write_text(content)
        assert contents_of(files[:1] + files[1:], tmp_path / "cache")[0] == first[0]


def wait_and_die(folder: str, started: Any, how: str) -> None:
    """Fill a folder of the cache until told to go on, or for ever."""

    def build(path: Path) -> dict[str, Any]:
        (path / "file").write_text("slow")
        started.send(str(path))
        if how == "killed":
            signal.pause()
        started.recv()
        return {}

    from_cache(Path(folder), "some", {"slow": 1}, build, lambda path, _: (path / "file").read_text())


@pytest.mark.parametrize("how", ["killed", "lives"])
def test_what_another_is_writing_is_swept_away_only_if_it_is_dead(tmp_path: Path, how: str, monkeypatch: Any) -> None:
    """Whatever its process id is here: in a container of its own it means somebody else, or nobody."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=wait_and_die, args=(str(tmp_path), there, how))
    process.start()
    path = Path(here.recv())
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("asked for a process by its id"))
    assert keep(tmp_path, "mine") == "mine"
    assert path.is_dir()
    monkeypatch.undo()
    if how == "killed":
        process.kill()
    else:
        here.send("go on")
    process.join()
    assert path.is_dir() == (how == "killed")
    assert keep(tmp_path, "other") == "other" and not path.exists()
    assert len(list(tmp_path.iterdir())) == (2 if how == "killed" else 3)


def all_at_once(folder: str, barrier: Any, damage_first: bool) -> None:
    def build(path: Path) -> dict[str, Any]:
        (path / "file").write_text("content")
        barrier.wait()
        return {}

    with watching() as said:
        content = from_cache(Path(folder), "some", {"a": 1}, build, lambda path, _: (path / "file").read_text())
    os._exit(0 if content == "content" and len(said) == damage_first else 1)


@pytest.mark.parametrize("damage_first", [False, True])
def test_processes_that_make_one_cache_at_once_keep_one(tmp_path: Path, damage_first: bool) -> None:
    if damage_first:
        from_cache(tmp_path, "some", {"a": 1}, lambda path: {}, lambda path, _: None)
        ((tmp_path / next(tmp_path.iterdir())) / "meta.json").write_text("{}")
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    processes = [context.Process(target=all_at_once, args=(str(tmp_path), barrier, damage_first)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(list(tmp_path.iterdir())) == 1


def test_a_cache_that_was_made_in_the_meantime_is_kept(tmp_path: Path) -> None:
    """Somebody may be reading it."""
    first: list[int] = []

    def build(path: Path) -> dict[str, Any]:
        keep(tmp_path, "same")
        first.extend(each.stat().st_ino for each in tmp_path.glob("some-*"))
        (path / "file").write_text("same")
        return {}

    assert from_cache(tmp_path, "some", "same", build, lambda path, _: (path / "file").read_text()) == "same"  # type: ignore[arg-type]
    assert [path.stat().st_ino for path in tmp_path.iterdir()] == first


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Files can't grow above a size, which fails as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("kind", [*KINDS])
@pytest.mark.parametrize("size", [0, 100, 1200])
def test_a_full_disk_is_named_and_costs_the_new_cache_alone(tmp_path: Path, kind: str, size: int) -> None:
    folder = tmp_path / "cache"
    keep(folder, "older")
    before = {path: path.stat() for path in folder.rglob("*")}
    (tmp_path / "rows.csv").write_text("text\n" + "some words\n" * 500)
    with (
        full_disk(size),
        pytest.raises(ValueError, match=r"cache_dir: expected to write .*-\w+, which failed \(no room on the disk\)"),
    ):
        KINDS[kind](folder)
    assert {path: path.stat() for path in folder.rglob("*")} == before
    assert keep(folder, "older") == "older" and len(list(folder.iterdir())) == 1
    assert KINDS[kind](folder)[1] == (kind != "rows")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cache_dir: expected to write /proc/x/.*, which failed"):
        keep(Path("/proc/x"), "new")


@pytest.mark.parametrize("kind", [SudokuDataModule, TextDataModule])
@pytest.mark.parametrize(
    ("name", "message"),
    [("", "got ''"), ("{}/file", "is a file"), ("{}/file/below", "is a file"), ("~nobody-here/x", "home")],
)
def test_a_folder_that_cannot_be_one_is_refused_at_once(tmp_path: Path, kind: Any, name: str, message: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"cache_dir: expected a folder, .*{message}.*; name "):
        kind(cache_dir=name.format(tmp_path))
    assert cache_folder(str(tmp_path / "to" / "be" / "made")) == tmp_path / "to" / "be" / "made"


def test_long_checks_show_how_far_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            bars.append(self)

    monkeypatch.setattr(cache, "tqdm", Bar)
    content = "x" * 1000
    for _ in range(2):
        keep(tmp_path, "new", content)
    contents_of([tmp_path / "a"][:0], tmp_path)
    assert [(bar.desc.split()[0], bar.n, bar.delay) for bar in bars][:2] == [("Checksums", 1000, 2)] * 2

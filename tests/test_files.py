"""What is replaced is whole before and after, and whoever dies in between costs nothing."""

import os
from pathlib import Path

import pytest

from puma_lightning import files
from puma_lightning.files import clear_unfinished, replacing, replacing_folder


class Killed(BaseException):
    """As a process that is gone: nothing is tidied up after it."""


def fill(folder: Path, text: str) -> None:
    with replacing_folder(folder) as temporary:
        (temporary / "a").write_text(text)
        (temporary / "deep").mkdir()
        (temporary / "deep" / "b").write_text(text)


def content(folder: Path) -> list[str]:
    return [(folder / "a").read_text(), (folder / "deep" / "b").read_text()]


def test_a_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "last.ckpt"
    for text in ("one", "two"):
        fill(target, text)
        assert content(target) == [text, text]
        assert os.listdir(tmp_path) == ["last.ckpt"]


def test_a_file_gives_way_to_a_folder(tmp_path):
    (tmp_path / "last.ckpt").write_text("a file")
    fill(tmp_path / "last.ckpt", "one")
    assert content(tmp_path / "last.ckpt") == ["one", "one"]
    assert os.listdir(tmp_path) == ["last.ckpt"]


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_a_kill_while_a_folder_is_replaced_leaves_the_old_or_the_new_one(tmp_path, monkeypatch, calls):
    """Between any two of the steps that take it out of the way and put the new one in its place."""
    target = tmp_path / "last.ckpt"
    fill(target, "old")
    done = []

    def rename(source, destination, real=os.rename):
        if len(done) == calls:
            raise Killed
        done.append(real(source, destination))

    monkeypatch.setattr(files.os, "rename", rename)
    monkeypatch.setattr(files, "_delete", lambda path: None)
    if calls < 2:
        with pytest.raises(Killed):
            fill(target, "new")
    else:
        fill(target, "new")
    monkeypatch.undo()
    clear_unfinished(tmp_path)
    assert content(target) == (["new"] * 2 if calls == 2 else ["old"] * 2)
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_hidden_files_of_others_are_left_alone(tmp_path):
    """However much their names look like ours."""
    names = [".bashrc.old", ".download.part", ".x.0123456789ab.part2", ".a.b.old", ".0123456789ab.old"]
    for name in names:
        (tmp_path / name).write_text(name)
    clear_unfinished(tmp_path)
    fill(tmp_path / "last.ckpt", "one")
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "last.ckpt"])


def test_a_folder_that_somebody_else_made_is_kept_if_it_is_good(tmp_path):
    fill(tmp_path / "cache", "theirs")
    with replacing_folder(tmp_path / "cache", lambda _: True) as temporary:
        (temporary / "a").write_text("mine")
    assert content(tmp_path / "cache") == ["theirs", "theirs"]


def test_what_cannot_be_written_leaves_what_was_there(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(OSError, match="full"), replacing(tmp_path / "x") as temporary:
        temporary.write_text("half")
        raise OSError("full")
    assert (tmp_path / "x").read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_what_is_being_written_is_not_cleared_away(tmp_path):
    with replacing(tmp_path / "x") as temporary:
        temporary.write_text("new")
        clear_unfinished(tmp_path)
        assert temporary.exists()
    assert (tmp_path / "x").read_text() == "new"

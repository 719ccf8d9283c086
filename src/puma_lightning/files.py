"""Files and folders that are written whole or not at all."""

import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: what a dead process left there stays
    fcntl = None  # type: ignore[assignment]

UNFINISHED, REPLACED = ".part", ".old"
_NAME = re.compile(rf"\.(?P<of>.+)\.[0-9a-f]{{12}}({re.escape(UNFINISHED)}|{re.escape(REPLACED)})")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a file beside ``path`` to write, which replaces ``path`` in one step once it is whole and on the disk.

    Whatever happens in between, a kill or a full disk too, ``path`` is as it was before. What a killed process leaves
    behind is cleared away by the next one that writes into the folder.
    """
    with _unfinished(path, _create_file) as temporary:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
    _flush_folder(path.parent)


@contextmanager
def replacing_folder(path: Path, is_good: Callable[[Path], bool] = lambda path: False) -> Iterator[Path]:
    """Give a folder beside ``path`` to fill, which takes the place of ``path`` once it is whole and on the disk.

    As with ``replacing``, ``path`` is as it was before until then.

    Args:
        path: The folder.
        is_good: Tells whether what stands at ``path`` in the end, which another process may have made in the meantime,
            is as good as this one; it is kept then. By default nothing is.
    """
    with _unfinished(path, Path.mkdir) as temporary:
        yield temporary
        for part in (temporary, *temporary.rglob("*")):
            _flush_folder(part) if part.is_dir() else _flush(part)
        with ExitStack() as stack:
            _lock(path.parent, stack)
            if path.exists() and is_good(path):
                return
            # A full folder can't be replaced in one step: whoever comes after a kill puts the old one back.
            old = _name_beside(path, REPLACED)
            with suppress(FileNotFoundError):
                os.rename(path, old)
            os.rename(temporary, path)
            _delete(old)
    _flush_folder(path.parent)


def clear_unfinished(folder: Path) -> None:
    """Delete what dead processes left of what they were writing into a folder; the living hold theirs locked.

    What one had moved away for something that it then could not put in its place is put back.
    """
    if fcntl is None:
        return
    for path, target in _left(folder, REPLACED):
        with suppress(OSError), _opened(folder) as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)  # held for a moment only, by one that is in the middle of it
            if target.exists():
                _delete(path)
            else:
                os.rename(path, target)
    for path, _ in _left(folder, UNFINISHED):
        # Somebody else may clear it away at the same time, and a folder may be for reading only.
        with suppress(OSError), _opened(path) as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _delete(path)


def _left(folder: Path, ending: str) -> list[tuple[Path, Path]]:
    """Return what there is of ours with an ending, and what it was to be or has been; nobody else's hidden files."""
    names = [(path, _NAME.fullmatch(path.name)) for path in folder.glob(f".*{ending}")]
    return [(path, path.with_name(name["of"])) for path, name in names if name]


@contextmanager
def _unfinished(path: Path, create: Callable[[Path], None]) -> Iterator[Path]:
    """Give what is created beside ``path``, which nobody else clears away; in the end it is gone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_unfinished(path.parent)
    with ExitStack() as stack:
        while True:
            temporary = _name_beside(path, UNFINISHED)
            create(temporary)
            _lock(temporary, stack)
            if temporary.exists():  # else it looked abandoned between the last two lines
                break
        try:
            yield temporary
        finally:
            _delete(temporary)


def _name_beside(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{ending}")


def _create_file(path: Path) -> None:
    path.open("xb").close()


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


def _lock(path: Path, stack: ExitStack) -> None:
    """Lock a file or a folder until the stack is closed, where there are locks."""
    # Where a file system has none nothing is cleared away either. What is gone is noticed by the caller.
    with suppress(OSError):
        if fcntl is not None:
            fcntl.flock(stack.enter_context(_opened(path)), fcntl.LOCK_EX)


def _flush(file: Path) -> None:
    with file.open("r+b") as opened:
        os.fsync(opened.fileno())


def _flush_folder(folder: Path) -> None:
    """Have the names in a folder survive a loss of power, where the system can do so."""
    with suppress(OSError), _opened(folder) as handle:
        os.fsync(handle)

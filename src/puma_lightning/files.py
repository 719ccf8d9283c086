"""Files that are written whole or not at all."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows: what a dead process left there stays
    fcntl = None  # type: ignore[assignment]

UNFINISHED = ".part"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a file beside ``path`` to write, which replaces ``path`` in one step once it is whole and on the disk.

    Whatever happens in between, a kill or a full disk too, ``path`` is as it was before. What a killed process leaves
    behind is cleared away by the next one that writes into the folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_unfinished(path.parent)
    temporary, file = _create_locked(path)
    try:
        with file:
            yield temporary
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def clear_unfinished(folder: Path) -> None:
    """Delete what dead processes left of files that they were writing into a folder; the living hold theirs locked."""
    if fcntl is None:
        return
    for path in folder.glob(f".*{UNFINISHED}"):
        # Somebody else may clear it away at the same time, and a folder may be for reading only.
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _create_locked(path: Path) -> tuple[Path, IO[Any]]:
    """Create a file beside ``path`` that nobody clears away while this process lives and has it open."""
    while True:
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{UNFINISHED}")
        file = temporary.open("xb")
        if fcntl is None:
            return temporary, file
        with suppress(OSError):  # a file system without locks, which has nothing cleared away either
            fcntl.flock(file, fcntl.LOCK_EX)
        if temporary.exists():  # between the last two lines it looked abandoned
            return temporary, file
        file.close()


def _flush_folder(folder: Path) -> None:
    """Have the names in a folder survive a loss of power, where the system can do so."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

"""Where DataModules keep what they made: folders that know their recipe, and whose checksums are compared."""

import errno
import hashlib
import json
import os
import random
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from lightning.fabric.utilities import rank_zero_info
from tqdm import tqdm

from puma_lightning.files import replacing, replacing_folder

DEFAULT_CACHE = "~/.cache/puma_lightning"
BLOCK = 2**24  # bytes that share a checksum
CHECKED = 2**30  # bytes of a file that are checked when a cache is opened; a larger one is sampled
_META = "meta.json"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# A file that was changed later than this before it was read may change again without a sign.
_SECONDS_OF_A_CLOCK_TICK = 2
Out = TypeVar("Out")


def cache_folder(cache_dir: str) -> Path:
    """Return the folder in which a DataModule keeps what it made; the default follows ``$XDG_CACHE_HOME`` if set.

    Raises:
        ValueError: If there can't be such a folder.
    """
    if cache_dir == DEFAULT_CACHE and os.environ.get("XDG_CACHE_HOME"):
        cache_dir = os.path.join(os.environ["XDG_CACHE_HOME"], "puma_lightning")
    expected = "cache_dir: expected a folder, or the name of one to be made,"
    if not isinstance(cache_dir, str | os.PathLike) or not str(cache_dir).strip():
        raise ValueError(f"{expected} got {cache_dir!r}; name one")
    try:
        folder = Path(cache_dir).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{expected} got {cache_dir!r} ({error}); name another one") from None
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"{expected} got {cache_dir}, where {nearest} is a file; name another one")
    return folder


def from_cache(
    folder: Path,
    kind: str,
    recipe: Mapping[str, object],
    build: Callable[[Path], Mapping[str, Any]],
    read: Callable[[Path, dict[str, Any]], Out],
) -> Out:
    """Return what a recipe makes, from disk if it was made before and nothing has happened to it since.

    What was made is a folder, named by a hash of its recipe, which is also kept in it. It is made again, with a
    warning, if it was made by another recipe, if a checksum of a file differs, or if reading it fails in any way. Of a
    file above ``CHECKED`` bytes a sample is checked, another one each time.

    Processes may do this at the same time, on several machines too: each fills a folder of its own, and the first to
    finish is kept.

    Args:
        folder: Where the cache is; made if absent.
        kind: How the name starts.
        recipe: All that the contents depend on, in JSON's types.
        build: Fills a folder, and returns what else is to be known of it, in JSON's types.
        read: Makes of the folder, and of what is known of it, what is returned.

    Raises:
        ValueError: If it can't be written; there is then nothing half-written, and other caches are as they were.
    """
    text = json.dumps(recipe, sort_keys=True)
    recipe = json.loads(text)
    path = folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:20]}"

    def opened(path: Path) -> Out:
        return read(path, _checked(path, recipe))

    def is_good(path: Path) -> bool:
        with suppress(Exception):
            opened(path)
            return True
        return False

    if path.exists():
        try:
            return opened(path)
        except Exception as error:  # whatever the libraries that read the parts make of the damage
            reason = str(error) if isinstance(error, _Damaged) else f"{type(error).__name__}: {error}"
            warnings.warn(f"{path}: damaged cache ({reason}); building it again", stacklevel=3)
    try:
        with replacing_folder(path, is_good) as temporary:
            _seal(temporary, recipe, build(temporary))
    except Exception as error:
        if (problem := _why_not_written(error, folder)) is None:
            raise
        raise ValueError(
            f"cache_dir: expected to write {path}, which failed ({problem}); nothing half-written is left, and what "
            "was there before is as it was. Make room, or give another cache_dir"
        ) from error
    return opened(path)


def facts_of(path: Path) -> dict[str, Any]:
    """Return what is known of a folder that ``from_cache`` made."""
    facts: dict[str, Any] = json.loads((path / _META).read_text())["facts"]
    return facts


def contents_of(files: Sequence[Path], folder: Path) -> list[list[str]]:
    """Return of each file its ending and a hash of its content: what changes when the content does, and only then.

    A file is read again only if its size, its inode, or the time of a change to either content or status differs:
    the last can't be set, so that a file replaced by one of equal size and time is noticed.

    Args:
        files: The files, which exist.
        folder: The cache in which the hashes are remembered.
    """
    names = [str(file.absolute()) for file in files]
    memory = folder / f"sources-{hashlib.sha256(json.dumps(names).encode()).hexdigest()[:20]}.json"
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError, TypeError):
        known = dict(json.loads(memory.read_text()))
    now: dict[str, Any] = {}
    unread = []
    for name, file in zip(names, files, strict=True):
        now[name] = [status_of(file), None]
        match known.get(name):
            case [list(before), str(content)] if before == now[name][0]:
                now[name][1] = content
            case _:
                unread.append(name)
    total = sum(now[name][0][1] for name in unread)
    start = time.time()
    with tqdm(total=total, desc="Reading source files", unit="B", unit_scale=True, delay=2) as bar:
        for name in unread:
            digest = hashlib.sha256()
            for block in _blocks(Path(name), None, bar):
                digest.update(block)
            now[name][1] = digest.hexdigest()
    settled = {name: each for name, each in now.items() if each[0][3] < (start - _SECONDS_OF_A_CLOCK_TICK) * 1e9}
    if unread and settled:
        with suppress(OSError), replacing(memory) as temporary:  # the cache may be for reading only
            temporary.write_text(json.dumps(settled))
    return [["".join(Path(name).suffixes[-2:]), now[name][1]] for name in names]


def status_of(file: Path) -> list[int]:
    """Return what changes when a file is written to or replaced: inode, size, and the times of both kinds of change."""
    status = file.stat()
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


class _Damaged(Exception):
    """A cache that is not as it was made."""


def _checked(path: Path, recipe: Mapping[str, object]) -> dict[str, Any]:
    """Compare a folder with its recipe and its checksums, and return what is known of it.

    Raises:
        Exception: Of any kind, if it is damaged.
    """
    meta: dict[str, Any] = json.loads((path / _META).read_text())
    if meta.pop("sum") != _sum(meta):
        raise _Damaged(f"the checksum of {_META} differs")
    if meta["recipe"] != recipe:
        raise _Damaged("made by another recipe, for example another tokenizer")
    if (held := {*_files(path)} - {_META}) != meta["files"].keys():
        raise _Damaged(f"it holds {', '.join(sorted(held)) or 'nothing'} instead of {', '.join(sorted(meta['files']))}")
    for name, file in meta["files"].items():
        if (found := (path / name).stat().st_size) != file["size"]:
            raise _Damaged(f"{name} has {found:,} bytes instead of {file['size']:,}")
    chosen = {name: _choose(len(file["sums"])) for name, file in meta["files"].items()}
    parts = {name: len(file["sums"]) for name, file in meta["files"].items()}
    sampled = [f"{len(chosen[name])} of {n} parts of {name}" for name, n in parts.items() if len(chosen[name]) < n]
    if sampled:
        rank_zero_info(f"{path}: checking a sample, {', '.join(sampled)}; all of the other files")
    with _bar(path, sum(map(len, chosen.values())) * BLOCK) as bar:
        for name, indices in chosen.items():
            sums = meta["files"][name]["sums"]
            for index, block in zip(indices, _blocks(path / name, indices, bar), strict=True):
                if zlib.crc32(block) != sums[index]:
                    raise _Damaged(f"the checksum of {name} differs, {index * BLOCK:,} bytes or more from its start")
    facts: dict[str, Any] = meta["facts"]
    return facts


def _seal(path: Path, recipe: Mapping[str, object], facts: Mapping[str, Any]) -> None:
    """Write what was made from what, and the checksums of all files."""
    sizes = {name: (path / name).stat().st_size for name in _files(path)}
    with _bar(path, sum(sizes.values())) as bar:
        sums = {name: [zlib.crc32(block) for block in _blocks(path / name, None, bar)] for name in sizes}
    meta = {
        "recipe": recipe,
        "facts": facts,
        "files": {name: {"size": size, "sums": sums[name]} for name, size in sizes.items()},
    }
    (path / _META).write_text(json.dumps({**meta, "sum": _sum(json.loads(json.dumps(meta)))}, indent=1))


def _files(path: Path) -> list[str]:
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())


def _sum(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _choose(blocks: int) -> list[int]:
    """Choose the blocks of a file to check: all, or the first, the last and some between them."""
    most = max(3, CHECKED // BLOCK)
    if blocks <= most:
        return list(range(blocks))
    # Another sample each time, and no draw from the numbers that a run depends on.
    return [0, *sorted(random.SystemRandom().sample(range(1, blocks - 1), most - 2)), blocks - 1]


def _blocks(file: Path, indices: Iterable[int] | None, bar: "tqdm[Any]") -> Iterator[bytes]:
    """Read the blocks of a file with these numbers; None for all."""
    with file.open("rb") as opened:
        for index in range(-(-file.stat().st_size // BLOCK)) if indices is None else indices:
            opened.seek(index * BLOCK)
            block = opened.read(BLOCK)
            bar.update(len(block))
            yield block


def _bar(path: Path, size: int) -> "tqdm[Any]":
    return tqdm(total=size, desc=f"Checksums of {path.name}", unit="B", unit_scale=True, delay=2)


def _why_not_written(error: BaseException | None, folder: Path) -> str | None:
    """Return why the cache could not be written; None if something else went wrong."""
    while error is not None:
        # The libraries that write some of the files keep of a full disk nothing but its text.
        if getattr(error, "errno", None) in _NO_ROOM or any(os.strerror(code) in str(error) for code in _NO_ROOM):
            return "no room on the disk"
        named = getattr(error, "filename", None)
        if isinstance(error, OSError) and named and Path(os.fsdecode(named)).is_relative_to(folder):
            return error.strerror
        error = error.__cause__ or error.__context__
    return None

"""Rows of text from files or from the Hugging Face hub, through the ``datasets`` library."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from puma_lightning.data.base import paths_of
from puma_lightning.data.cache import contents_of, from_cache, status_of
from puma_lightning.hub import from_hub

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

KINDS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_SMALL = 64 * 2**20  # bytes read too fast for a progress bar
# Opening a file touches a page of each of its blocks, so that memory grows with their number.
_ROWS_IN_A_BLOCK = 20_000
# Raise it when the same files give other rows than before.
_VERSION = 1


@dataclass(frozen=True)
class Source:
    """Where the rows of one set are.

    Args:
        argument: Name of the argument that names them, for messages.
        files: Absolute paths; empty for a data set on the hub.
        kind: What ``datasets`` calls the files' format.
        hub: Name, configuration and split on the hub.
    """

    argument: str
    files: tuple[Path, ...] = ()
    kind: str = ""
    hub: tuple[str, str | None, str] = ("", None, "")

    def identity(self, cache_dir: Path, streamed: bool = False) -> dict[str, object]:
        """Return what changes when the rows do, in JSON's types.

        Args:
            cache_dir: Where the hashes of files are remembered.
            streamed: Whether the files may be too large to be read for it: what tells of a change is enough then.
        """
        if not self.files:
            return {"hub": list(self.hub)}
        if streamed:
            return {"streamed": [[str(file), *status_of(file)] for file in self.files]}
        return {"files": contents_of(self.files, cache_dir)}

    def load(self, cache_dir: Path, text_unit: str = "line") -> Dataset:
        """Read the rows, and keep them in ``cache_dir`` in the format of the ``datasets`` library.

        Raises:
            ValueError: If the files can't be read or hold nothing, or the hub has no such data set or is out of reach.
        """
        import datasets

        if not self.files:
            name, config, split = self.hub
            with from_hub(self.argument, name, f"local files ({', '.join(KINDS)})"):
                return datasets.load_dataset(
                    name, config, split=split, cache_dir=str(cache_dir / "datasets"), writer_batch_size=_ROWS_IN_A_BLOCK
                )

        def write(path: Path) -> dict[str, Any]:
            with TemporaryDirectory(dir=path) as rest:
                for number, part in enumerate(self._read(Path(rest), text_unit).cache_files):
                    os.replace(part["filename"], path / f"{number:05}.arrow")
            return {}

        def read(path: Path, _: dict[str, Any]) -> Dataset:
            return datasets.concatenate_datasets([datasets.Dataset.from_file(str(part)) for part in _parts(path)])

        recipe = {"version": _VERSION, "text_unit": text_unit, **self.identity(cache_dir)}
        return from_cache(cache_dir, "rows", recipe, write, read)

    def _read(self, cache_dir: Path, text_unit: str) -> Dataset:
        import datasets

        size = self._size()
        options: dict[str, Any] = {
            **self._options(text_unit),
            "writer_batch_size": _ROWS_IN_A_BLOCK,
            "keep_in_memory": False,
        }
        with _quiet(size < _SMALL):
            try:
                rows = datasets.load_dataset(
                    self.kind, data_files=list(map(str, self.files)), split="train", cache_dir=str(cache_dir), **options
                )
            except Exception as error:  # whatever the readers of the formats raise
                reason = error.__cause__ or error
                raise ValueError(
                    f"{self.argument}: expected rows in {self.kind} format in {', '.join(map(str, self.files))}, got: "
                    f"{str(reason) or 'no rows'}; correct the files"
                ) from error
        return rows

    def stream(self, text_unit: str = "line") -> IterableDataset:
        """Return the rows as they come, one by one; nothing is kept on disk.

        Raises:
            ValueError: If the files hold nothing, or the hub has no such data set or is out of reach.
        """
        import datasets

        if not self.files:
            name, config, split = self.hub
            with from_hub(self.argument, name, f"local files ({', '.join(KINDS)})"):
                return datasets.load_dataset(name, config, split=split, streaming=True)
        self._size()
        files = list(map(str, self.files))
        return datasets.load_dataset(
            self.kind, data_files=files, split="train", streaming=True, **self._options(text_unit)
        )

    def _size(self) -> int:
        """Return the bytes of the files.

        Raises:
            ValueError: If there are none.
        """
        size = sum(file.stat().st_size for file in self.files)
        if not size:
            raise ValueError(f"{self.argument}: expected rows, got the empty file {self.files[0]}; name another one")
        return size

    def _options(self, text_unit: str) -> dict[str, Any]:
        """Return what the reader of the files' format has to know."""
        options: dict[str, Any] = {"sample_by": text_unit} if self.kind == "text" else {}
        return {**options, "sep": "\t"} if _ending(self.files[0]) == ".tsv" else options


def find_source(argument: str, given: str | list[str], split: str) -> Source:
    """Find where an argument's rows are; nothing is read yet.

    Args:
        argument: The argument's name.
        given: A file, a glob, a list of these, or ``NAME[:CONFIG[:SPLIT]]`` on the hub.
        split: The split of a data set on the hub that names none.

    Raises:
        ValueError: If no file is named, there is none of that name, or its format is unknown.
    """
    names = paths_of(argument, given)
    if isinstance(given, str) and not _looks_local(given):
        name, config, own_split, *_ = [*given.split(":", 2), "", ""]
        return Source(argument, hub=(name, config or None, own_split or split))
    files: list[Path] = []
    for name in names:
        path = os.path.abspath(os.path.expanduser(name))
        found = [path] if os.path.isfile(path) else sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
        if not found:
            hint = (
                f"give its files, for example {name.rstrip('/')}/*.jsonl" if os.path.isdir(path) else "check the path"
            )
            raise ValueError(f"{argument}: expected a file, got none at {path}; {hint}")
        files += map(Path, found)
    kinds, endings = {_kind(file) for file in files}, {_ending(file) for file in files}
    if len(kinds) > 1 or None in kinds or (".tsv" in endings and len(endings) > 1):
        raise ValueError(
            f"{argument}: expected files of one format ({', '.join(KINDS)}, also compressed as .gz), got "
            f"{sorted(endings)}; give files of one format"
        )
    return Source(argument, tuple(files), str(kinds.pop()))


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.arrow"))


def _looks_local(name: str) -> bool:
    path = Path(os.path.expanduser(name))
    rooted = path.is_absolute() or name.startswith((".", "~"))
    return rooted or path.exists() or _kind(path) is not None or any(sign in name.split(":")[0] for sign in "*?")


def _kind(file: Path) -> str | None:
    return KINDS.get(_ending(file))


def _ending(file: Path) -> str:
    return Path(file.stem).suffix if file.suffix in _COMPRESSED else file.suffix


@contextmanager
def _quiet(small: bool) -> Iterator[None]:
    """Hide the progress bars of what takes no time."""
    import datasets

    bars = not datasets.are_progress_bars_disabled()
    if small:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if small and bars:
            datasets.enable_progress_bars()

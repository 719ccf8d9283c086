"""Fixed-length sequences on disk: memory-mapped tokens, see ``puma_lightning.data.cache``."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch.utils.data import Dataset, default_collate

from puma_lightning.data.cache import facts_of, from_cache
from puma_lightning.data.text.layout import batch_of

# Raise it when the same recipe gives other sequences than before.
_VERSION = 2
_ANSWERS = "answers.json"


class TokenDataset(Dataset[dict[str, Any]]):
    """Sequences of a cache folder. Processes share the memory; only the arguments are sent to a DataLoader's workers.

    Args:
        folder: What ``cached`` made.
        hidden: Whether what follows the answers is padding rather than given. The files are the same.

    Attributes:
        counts: How many rows or sequences were skipped, cut or left over, by reason.
        rows: Number of rows that the sequences were made from.
        one_length: True: all sequences have one length.
    """

    one_length = True

    def __init__(self, folder: Path, hidden: bool = False) -> None:
        self.folder = folder
        self.hidden = hidden
        facts = facts_of(folder)
        self.counts: dict[str, int] = facts["counts"]
        self.rows: int = facts["rows"]
        self._tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        self._prompt = np.load(folder / "prompt.npy", mmap_mode="r")
        self._end = np.load(folder / "end.npy", mmap_mode="r")
        answers = folder / _ANSWERS
        self._answers: list[str] | None = json.loads(answers.read_text()) if answers.exists() else None

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one item, tensors (L,)."""
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """Return a whole batch, tensors (B, L) and maybe a list of B answers; ``collate`` passes it on."""
        rows = np.asarray(indices)
        tokens = self._tokens[rows].astype(np.int64)
        batch: dict[str, Any] = {**batch_of(tokens, self._prompt[rows], self._end[rows], self.hidden)}
        if self._answers is not None:
            batch["answer"] = [self._answers[row] for row in rows]
        return batch

    def __getstate__(self) -> tuple[Path, bool]:
        return self.folder, self.hidden

    def __setstate__(self, arguments: tuple[Path, bool]) -> None:
        self.__init__(*arguments)  # type: ignore[misc]


def collate(items: Any) -> Any:
    """Pass on what a ``TokenDataset`` gives to a DataLoader, which is a batch already."""
    return default_collate(items) if isinstance(items, list) else items


class TokenWriter:
    """A cache folder that is being made, to which sequences are appended.

    Args:
        folder: The folder, which is empty.
        length: L.
        vocab_size: V; decides between 16 and 32 bits for each token.

    Attributes:
        counts: How many rows or sequences were skipped, cut or left over, by reason; the caller counts them.
        rows: Number of rows read; the caller counts them.
    """

    def __init__(self, folder: Path, length: int, vocab_size: int) -> None:
        self.folder = folder
        self.counts: Counter[str] = Counter()
        self.rows = 0
        position = np.min_scalar_type(length)
        self._types = {
            "tokens": (np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32), (length,)),
            "prompt": (position, ()),
            "end": (position, ()),
        }
        self._length = 0
        self._answers: list[str] | None = None
        self._stack = ExitStack()
        self._files: dict[str, BinaryIO] = {
            name: self._stack.enter_context((folder / f"{name}.npy").open("wb")) for name in self._types
        }
        self._write_headers()

    def __len__(self) -> int:
        return self._length

    def write(
        self,
        tokens: NDArray[Any],
        prompt: NDArray[Any],
        end: NDArray[Any],
        answers: Sequence[str] | None = None,
    ) -> None:
        """Append n sequences.

        Args:
            tokens: Token ids (n, L).
            prompt: Number of given positions at the start (n,).
            end: Where the answers end (n,); L if nowhere.
            answers: n gold answers.
        """
        for name, values in (("tokens", tokens), ("prompt", prompt), ("end", end)):
            # Written, not mapped: mapped pages would count as this process's memory.
            self._files[name].write(np.ascontiguousarray(values, self._types[name][0]).data)
        self._length += len(tokens)
        if answers is not None:
            self._answers = [*(self._answers or ()), *answers]

    def close(self) -> None:
        """Complete the files."""
        self._write_headers()
        self._stack.close()
        if self._answers is not None:
            (self.folder / _ANSWERS).write_text(json.dumps(self._answers))

    def abort(self) -> None:
        """Close the files."""
        self._stack.close()

    def _write_headers(self) -> None:
        # numpy leaves room for any length, so the header keeps its size.
        for name, (dtype, shape) in self._types.items():
            self._files[name].seek(0)
            header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": (self._length, *shape)}
            npy.write_array_header_1_0(self._files[name], header)


def cached(
    folder: Path,
    recipe: Mapping[str, object],
    length: int,
    vocab_size: int,
    build: Callable[[TokenWriter], None],
    hidden: bool = False,
) -> TokenDataset:
    """Return the sequences of a recipe, from disk if they were made before, see ``puma_lightning.data.cache``.

    Args:
        folder: Where the cache is; made if absent.
        recipe: All that the sequences depend on, in JSON's types.
        length: L.
        vocab_size: V.
        build: Writes the sequences; called if there are none yet, or damaged ones.
        hidden: See ``TokenDataset``.
    """

    def write(path: Path) -> dict[str, Any]:
        writer = TokenWriter(path, length, vocab_size)
        try:
            build(writer)
            writer.close()
        finally:
            writer.abort()
        return {"rows": writer.rows, "counts": dict(writer.counts)}

    recipe = {"version": _VERSION, "length": length, **recipe}
    return from_cache(folder, "tokens", recipe, write, lambda path, _: TokenDataset(path, hidden))

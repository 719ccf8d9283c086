"""Sets of boards kept on disk, named by a hash of all that determines them."""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from puma_lightning.data.cache import replacing
from puma_lightning.data.sudoku.board import Boards

# Raise it when the same recipe gives other boards than before.
_VERSION = 1
_DIGEST_SIZE = hashlib.sha256().digest_size


def cached(folder: Path, recipe: Mapping[str, object], build: Callable[[], dict[str, Boards]]) -> dict[str, Boards]:
    """Return what ``build`` returns, from disk if it was built before.

    Processes may do this at the same time: each writes a file of its own and the last one to finish is kept.

    Args:
        folder: Where the cache is; made if absent.
        recipe: All that the boards depend on, in JSON's types.
        build: Makes the boards by name; called if there is no file yet, or a damaged one.

    Returns:
        The boards by name.
    """
    text = json.dumps({"version": _VERSION, **recipe}, sort_keys=True)
    path = folder / f"sudoku-{hashlib.sha256(text.encode()).hexdigest()[:20]}.npz"
    if path.exists():
        if (sets := _load(path)) is not None:
            return sets
        warnings.warn(f"{path}: damaged cache; building it again", stacklevel=2)
    sets = build()
    _save(path, sets)
    return sets


def _save(path: Path, sets: Mapping[str, Boards]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{name: np.stack(boards) for name, boards in sets.items()})
    content = buffer.getvalue()
    with replacing(path) as temporary, temporary.open("wb") as file:
        # Zip has checksums of its own, but not for the names and sizes; it does not mind bytes after its end.
        file.write(content)
        file.write(hashlib.sha256(content).digest())


def _load(path: Path) -> dict[str, Boards] | None:
    content = path.read_bytes()
    content, digest = content[:-_DIGEST_SIZE], content[-_DIGEST_SIZE:]
    if hashlib.sha256(content).digest() != digest:
        return None
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return {name: Boards(*arrays[name]) for name in arrays.files}

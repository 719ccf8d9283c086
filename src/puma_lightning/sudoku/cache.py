"""Sets of boards kept on disk, named by a hash of all that determines them."""

from __future__ import annotations

import hashlib
import json
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from puma_lightning.sudoku.board import Boards
from puma_lightning.sudoku.files import replacing

# Raise it when the same recipe gives other boards than before.
_VERSION = 1


def cached(folder: Path, recipe: Mapping[str, object], build: Callable[[], dict[str, Boards]]) -> dict[str, Boards]:
    """Returns what ``build`` returns, from disk if it was built before.

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
        try:
            return _load(path)
        except Exception as error:  # whatever is wrong with it, it can be built again
            warnings.warn(f"{path}: damaged cache ({error}); building it again", stacklevel=2)
    sets = build()
    with replacing(path) as temporary, temporary.open("wb") as file:
        arrays = {name: np.stack(boards) for name, boards in sets.items()}
        np.savez(file, allow_pickle=False, **arrays)
    return sets


def _load(path: Path) -> dict[str, Boards]:
    with zipfile.ZipFile(path) as archive:
        # np.load checks the checksum of an array only if its header makes it read all of it.
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
    with np.load(path, allow_pickle=False) as arrays:
        return {name: Boards(*arrays[name]) for name in arrays.files}

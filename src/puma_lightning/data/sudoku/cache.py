"""Sets of boards kept on disk, see ``puma_lightning.data.cache``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from puma_lightning.data.cache import from_cache
from puma_lightning.data.sudoku.board import Boards

# Raise it when the same recipe gives other boards than before.
_VERSION = 2


def cached(folder: Path, recipe: Mapping[str, object], build: Callable[[], dict[str, Boards]]) -> dict[str, Boards]:
    """Return what ``build`` returns, from disk if it was built before.

    Args:
        folder: Where the cache is; made if absent.
        recipe: All that the boards depend on, in JSON's types.
        build: Makes the boards by name; called if there are none yet, or damaged ones.

    Returns:
        The boards by name.
    """

    def write(path: Path) -> dict[str, Any]:
        np.savez(path / "boards.npz", allow_pickle=False, **{name: np.stack(each) for name, each in build().items()})
        return {}

    def read(path: Path, _: Mapping[str, Any]) -> dict[str, Boards]:
        with np.load(path / "boards.npz", allow_pickle=False) as arrays:
            return {name: Boards(*arrays[name]) for name in arrays.files}

    return from_cache(folder, "sudoku", {"version": _VERSION, **recipe}, write, read)

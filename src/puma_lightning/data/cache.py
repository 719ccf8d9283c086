"""Where DataModules keep what they made, and how a file is written whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DEFAULT_CACHE = "~/.cache/puma_lightning"


def cache_folder(cache_dir: str) -> Path:
    """Return the folder in which a DataModule keeps what it made; the default follows ``$XDG_CACHE_HOME`` if set."""
    if cache_dir == DEFAULT_CACHE and os.environ.get("XDG_CACHE_HOME"):
        cache_dir = os.path.join(os.environ["XDG_CACHE_HOME"], "puma_lightning")
    return Path(cache_dir).expanduser()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file in the folder of ``path``, which replaces ``path`` on success and vanishes on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

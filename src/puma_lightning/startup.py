"""What is imported when this package is: torchmetrics without the packages that few of its metrics need."""

import importlib
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def import_torchmetrics() -> None:
    """Import torchmetrics, which Lightning needs, without transformers, which takes seconds and pulls in what it finds.

    Metrics of texts and pictures that need transformers import it when they are used.
    """
    if "torchmetrics" in sys.modules or "transformers" in sys.modules or (spec := find_spec("transformers")) is None:
        return
    sys.modules["transformers"] = _Later("transformers")
    sys.modules["transformers"].__spec__ = spec
    try:
        importlib.import_module("torchmetrics")
    except Exception:  # a version that does more with it; it is imported as usual then
        for name in [name for name in sys.modules if name.split(".")[0] == "torchmetrics"]:
            del sys.modules[name]
    finally:
        del sys.modules["transformers"]


class _Later(ModuleType):
    """Stands for a module while others import names from it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _NameOf(self.__name__, name)


class _NameOf:
    """Stands for a class or function of a module that is not imported yet."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name

    def _real(self) -> Any:
        return getattr(importlib.import_module(self._module), self._name)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._real(), attribute)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._real()(*args, **kwargs)


import_torchmetrics()

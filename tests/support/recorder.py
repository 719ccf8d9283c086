"""Recording and replaying on a CPU what a CUDA graph records and replays: operators and their memory, no Python."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from puma_lightning import graphs


def use_recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have everything that is recorded on CUDA be recorded on the CPU too."""
    monkeypatch.setattr(graphs, "can_record", lambda device: True)
    monkeypatch.setattr(graphs, "record", record)


def record(
    function: Callable[[], Any], device: torch.device, generators: Sequence[torch.Generator] = (), pool: Any = None
) -> tuple[Callable[[], None], Any]:
    """Stand in for ``graphs.record``. As there, a look at a value is an error, and nothing is done by recording."""
    followed = [torch.default_generator, *generators]
    before = [(generator.get_state(), generator.initial_seed()) for generator in followed]
    recorder = Recorder()
    try:
        with recorder:
            result = function()
    finally:
        recorder.undo()
    # After a failure on CUDA nobody says where the generators are.
    seeds = [generator.initial_seed() for generator in followed]
    for generator, (state, _) in zip(followed, before, strict=True):
        generator.set_state(state)
    if seeds != [seed for _, seed in before]:
        raise RuntimeError("Cannot seed a generator while a graph is recorded")
    return recorder.replay, result


class Recorder(TorchDispatchMode):
    """Records operators with the tensors that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self._made: set[int] = set()
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        graphs.refuse_look(func, args)
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for tensor in _tensors((args, kwargs)):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self._made and storage.data_ptr() not in self._before:
                    self._before[storage.data_ptr()] = storage, storage.clone()
        out = func(*args, **kwargs)
        known = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        self._made |= {tensor.untyped_storage().data_ptr() for tensor in _tensors(out)} - known
        self.calls.append((func, args, kwargs, out))  # which also keeps their memory from being used again
        return out

    def undo(self) -> None:
        """Make all memory that was there before hold what it held."""
        for storage, before in self._before.values():
            storage.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        """Do it all again, with the same memory."""
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(_tensors(out), _tensors(again), strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


def _tensors(nested: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]

"""CUDA graphs: work that the host hands to a device once, and has done again and again at the cost of one launch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")

# Operators whose result the host must look at, or whose shape depends on values.
LOOKS = {
    "_local_scalar_dense", "equal", "is_nonzero", "item", "masked_select", "nonzero", "nonzero_numpy", "_unique",
    "_unique2", "unique_consecutive", "unique_dim", "repeat_interleave.Tensor", "bincount", "histc",
}  # fmt: skip


class Graph(Generic[T]):
    """A function of tensors that stay where they are, which is recorded on the way and then replayed.

    Its first calls run it as it is, on the stream that it will be recorded on: libraries set themselves up and code is
    compiled in them. The next call records it. From then on it is replayed: the device does the same to the same
    memory, and nothing of the function's Python is run. So it must take what varies from tensors that are changed in
    place, hand on what it finds in the same way or by what it returns, and must not look at a value.

    Args:
        function: The work; takes no arguments.
        device: Where the work is done.
        generators: What it draws from, besides the device's own generator. Their seeds may be set between calls.
        warmup: Calls before the one that records it.
        pool: Memory that is shared with other graphs, see ``memory_pool``; its own by default.

    Attributes:
        recorded: Whether calls replay it by now.
    """

    def __init__(
        self,
        function: Callable[[], T],
        device: torch.device,
        generators: Sequence[torch.Generator] = (),
        warmup: int = 3,
        pool: Any = None,
    ) -> None:
        self._function = function
        self._device = device
        self._generators = generators
        self._left = warmup
        self._pool = pool
        self._replay: Callable[[], None] | None = None
        self._result: T

    @property
    def recorded(self) -> bool:
        """Whether calls replay it by now."""
        return self._replay is not None

    def __call__(self) -> T:
        """Do the work.

        Returns:
            What the function returned; tensors of a replayed graph are overwritten by its next call.

        Raises:
            CannotRecord: If the function cannot be recorded; then nothing has been done.
        """
        if self._replay is None and self._left > 0:
            self._left -= 1
            with aside(self._device):
                return self._function()
        if self._replay is None:
            try:
                self._replay, self._result = record(self._function, self._device, self._generators, self._pool)
            except Exception as error:  # what the function raises, or CUDA, which says less of it
                first = error.__context__ or error
                raise CannotRecord(f"{type(first).__name__}: {first}") from error
        self._replay()
        return self._result


def can_record(device: torch.device) -> bool:
    """Tell whether work on a device can be recorded."""
    return device.type == "cuda"


def memory_pool(device: torch.device) -> Any:
    """Return memory for several graphs of which one runs after the other; what one returned is lost in the next."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


def record(
    function: Callable[[], T], device: torch.device, generators: Sequence[torch.Generator] = (), pool: Any = None
) -> tuple[Callable[[], None], T]:
    """Record a function as a CUDA graph; nothing is done yet.

    Returns:
        What does it, and what the function returned, which is filled then.
    """
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    # Other threads, such as one that pins memory for a loader, do not disturb it.
    recording = torch.cuda.graph(graph, pool=pool, stream=_stream(device), capture_error_mode="thread_local")
    current = torch.cuda.current_stream(device)
    try:
        with torch.cuda.device(device), recording:
            result = function()
    finally:
        torch.cuda.set_stream(current)  # where it stays on the other if a recording fails
    return graph.replay, result


def recover(device: torch.device, generators: Sequence[torch.Generator]) -> None:
    """Have generators draw again after a recording that failed, from a state of their own that is still to be set.

    On CUDA they would wait for its end, and refuse.
    """
    if device.type == "cuda":
        for generator in generators:
            generator.graphsafe_set_state(torch.Generator(device).graphsafe_get_state())


def default_generator(device: torch.device) -> torch.Generator:
    """Return the generator of a device that draws are from which name none."""
    if device.type != "cuda":
        return torch.default_generator
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]


@contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """Do work on the stream on which graphs are recorded, after what was queued before and before what comes next."""
    if device.type != "cuda":
        yield
        return
    stream, current = _stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _streams[device]


class CannotRecord(RuntimeError):
    """Work cannot be recorded, as it looks at a value or does what a device cannot repeat."""


class Look(RuntimeError):
    """The host would have to wait for a device to learn a value, or the shape of a result."""


class NoLooks(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes every look at a value an error, on any device, as recording a graph does on CUDA.

    Example:
        >>> with NoLooks():
        ...     torch.zeros(3).sum().item()
        Traceback (most recent call last):
        ...
        puma_lightning.graphs.Look: aten._local_scalar_dense
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        refuse_look(func, args)
        return func(*args, **(kwargs or {}))


def refuse_look(operator: Any, arguments: Sequence[Any]) -> None:
    """Raise if an operator needs a value on the host.

    Raises:
        Look: Then.
    """
    name, overload = operator._schema.name.removeprefix("aten::"), operator._overloadname
    if (
        name in LOOKS
        or f"{name}.{overload}" in LOOKS
        or (name in ("index", "index_put", "index_put_") and _by_mask(arguments))
    ):
        raise Look(f"aten.{name}")


def _by_mask(arguments: Sequence[Any]) -> bool:
    """Tell whether an index is one of truth values."""
    indices = arguments[1] if len(arguments) > 1 else ()
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices or ())

"""What the host does in a step stays out of its graph; what it has to know of the device is copied to it."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def on_host(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate what the host does in a step, such as seeds, moving chains, and logs.

    ``torch.compile`` of a module, as Lightning has it, compiles the rest of ``training_step`` and ``validation_step``.
    """
    disabled: Callable[P, R] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


def copy_to_host(tensor: Tensor) -> Callable[[], Tensor]:
    """Start copying a tensor to the CPU.

    Args:
        tensor: On any device.

    Returns:
        What returns the copy. On a GPU it waits for the copy, and so for what the GPU had been given before it, but not
        for anything it was given since.
    """
    copy = tensor.to("cpu", non_blocking=tensor.is_cuda)  # pinned where it does not block
    if not tensor.is_cuda:
        return lambda: copy
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record(torch.cuda.current_stream(tensor.device))

    def wait() -> Tensor:
        copied.synchronize()
        return copy

    return wait

"""What the host does in a step stays out of its graph."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def on_host(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate what the host does in a step, such as seeds, moving chains, and logs.

    ``torch.compile`` of a module, as Lightning has it, compiles the rest of ``training_step`` and ``validation_step``.
    """
    disabled: Callable[P, R] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled

"""Calling a backbone, whoever wrote it: what it is given, and what its answer means."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


def logits_of(backbone: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
    """Return the logits of a backbone as they are, before any shift.

    Args:
        backbone: Any module from token ids to logits; to a tuple whose first tensor with three dimensions they are; or
            to an output object or dictionary with ``logits``, as Hugging Face's models return.
        input_ids: (B, L) int64.
        attention_mask: False where a position is padding, (B, L) bool. It is given to the backbone only if it is not
            None, in Hugging Face's convention: int64, 0 for padding.
        **options: What else the backbone is given.

    Returns:
        Logits, (B, L, V).

    Raises:
        ValueError: If there is padding and the backbone takes no ``attention_mask``, or it returns something else.
    """
    if attention_mask is not None:
        check_takes_padding(backbone.forward)
        options["attention_mask"] = attention_mask.long()
    outputs = backbone(input_ids, **options)
    if isinstance(outputs, Tensor):
        return outputs
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if logits is None and isinstance(outputs, tuple):
        logits = next((part for part in outputs if isinstance(part, Tensor) and part.dim() == 3), None)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"backbone: expected logits (B, L, V), or an output with logits, got {type(outputs).__name__} from "
            f"{type(backbone).__name__}; return the logits"
        )
    return logits


def check_takes_padding(function: Callable[..., Any]) -> None:
    """Check that a backbone's ``forward`` (or, for block diffusion, ``hidden_states``) can leave padding out.

    Raises:
        ValueError: If it takes no ``attention_mask``.
    """
    arguments = inspect.signature(function).parameters
    if "attention_mask" not in arguments and all(a.kind is not a.VAR_KEYWORD for a in arguments.values()):
        raise ValueError(
            "backbone: expected one that takes an attention_mask, as sequences are padded, got "
            f"{function.__qualname__}({', '.join(arguments)}); add the argument, 0 where a position is padding, which "
            "no position may see, or bring sequences of one length"
        )

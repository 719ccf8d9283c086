"""Downloads from the Hugging Face hub: tokenizers, data sets, weights."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from huggingface_hub import constants, get_session

_SECONDS_TO_REACH_THE_HUB = 5


@contextmanager
def from_hub(argument: str, name: str, instead: str) -> Iterator[None]:
    """Let downloads inside fail quickly without a network, take what was downloaded before, and say what to do.

    Args:
        argument: Name of the argument that asks for it, for the message.
        name: What is downloaded.
        instead: What else the argument can be.

    Raises:
        ValueError: If a download fails, with the argument and what to give instead.
    """
    offline = constants.HF_HUB_OFFLINE or not _hub_answers()
    try:
        with ExitStack() as patches:
            # Left to themselves the libraries try again for half a minute, and only then look into their caches.
            # datasets has a setting of its own; it takes long to import, and not every download needs it.
            for settings in (constants, sys.modules.get("datasets.config")):
                if settings is not None:
                    patches.enter_context(patch.object(settings, "HF_HUB_OFFLINE", offline))
            yield
    except Exception as error:
        state = "the Hugging Face hub can't be reached" if offline else "loading it from the Hugging Face hub failed"
        if constants.HF_HUB_OFFLINE:
            state = "HF_HUB_OFFLINE is set"
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{argument}: found no file {name!r}, and {state} ({type(error).__name__}: {reason}); "
            f"give {instead} instead"
        ) from None


def _hub_answers() -> bool:
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS_TO_REACH_THE_HUB)
    except Exception:
        return False
    return True

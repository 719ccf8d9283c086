"""Errors that this package raises on purpose: what is wrong with what it was given, in a sentence."""

import dis
import os
import re
from pathlib import Path
from types import TracebackType

_PACKAGE = os.path.join(Path(__file__).parent, "")
_RAISE = dis.opmap["RAISE_VARARGS"]
# Not said to users: a broken invariant of ours, and a method that a subclass lacks.
_BUGS = (AssertionError, NotImplementedError)
_FRAME = re.compile(r'^ *File "(?P<file>.*)", line \d+, in .*\n *(?P<source>.*)$', re.MULTILINE)
_LAST = re.compile(r"^(?P<type>[A-Za-z_][\w.]*): (?P<said>.*)\Z", re.MULTILINE | re.DOTALL)


def sentence_of(error: BaseException, package: str = _PACKAGE) -> str | None:
    """Return what an error says if a ``raise`` of this package is where it comes from; None if anything else is.

    Of one from another process, such as a worker of a DataLoader, the message holds the traceback there.

    Args:
        error: The error, raised.
        package: The folder of another package.
    """
    if isinstance(error, _BUGS):
        return None
    if error.__traceback__ is not None and _is_raised_in(package, error.__traceback__):
        return str(error)
    frames = list(_FRAME.finditer(str(error)))
    if not frames or not frames[-1]["file"].startswith(package) or not frames[-1]["source"].startswith("raise "):
        return None
    return last_words(error)


def last_words(error: BaseException) -> str:
    """Return what an error says, without the traceback that one from another process holds."""
    frames = list(_FRAME.finditer(str(error)))
    last = _LAST.search(str(error), frames[-1].end()) if frames else None
    return str(error) if last is None else last["said"].strip()


def _is_raised_in(package: str, traceback: TracebackType) -> bool:
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    code = traceback.tb_frame.f_code
    # By the statement: a wrong argument of int() is a bug here, though it is a ValueError from a frame of ours.
    return code.co_filename.startswith(package) and code.co_code[traceback.tb_lasti] == _RAISE

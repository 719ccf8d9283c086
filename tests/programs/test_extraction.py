import time

import pytest

from puma_lightning.programs import extract_program
from puma_lightning.programs.extraction import MAX_CHARS

F = "def simple_math_problem():\n    return 42\n"


@pytest.mark.parametrize(
    "text",
    [
        F,
        F.rstrip() + "<|endoftext|>",
        F.rstrip() + "<|im_end|><|endoftext|>",
        F + "<|endoftext|>def simple_math_problem():\n    return 1\n",
        f"Sure!\n```python\n{F}```\nThe answer is 42.",
        f"```\nx = 1\n```\nor\n```py\n{F}```",
        f"```python\n{F}",  # not closed
        f"Let us see.\n\n{F}\nThe answer is 42.\nDone!",
        F + "\nThis isn't code.",
        F + "x = (1,\n",
        F + "    '''never closed\n",
        F.replace("\n", "\r\n"),
    ],
)
def test_finds_the_function(text: str) -> None:
    assert extract_program(text) == F


def test_keeps_imports_helpers_and_decorators_directly_above() -> None:
    source = "import math\n\nfrom fractions import Fraction\n\ndef helper():\n    return 1\n\n" + F
    assert extract_program("I import from memory\n" + source) == source


@pytest.mark.parametrize(
    "text",
    ["", "no code", "def other():\n    return 42\n", "def simple_math_problem(:\n    return 42\n", F + "x" * MAX_CHARS,
     "def simple_math_problem():\n    return '\0'\n", "def simple_math_problem():\n    return '\ud800'\n",
     "async def simple_math_problem():\n    return 42\n", F.replace("42", "(" * 3000 + ")" * 3000)],
)  # fmt: skip
def test_none_where_there_is_no_function(text: str) -> None:
    assert extract_program(text) is None


def test_cost_is_bounded() -> None:
    for text in (F + "x" * 10**7, "``" * 10**6, F + "1 2\n" * 15000, "import a\n" * 7000, "```python\n" * 6000):
        start = time.perf_counter()
        extract_program(text)
        assert time.perf_counter() - start < 2

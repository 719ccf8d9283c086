import time

import pytest

from puma_lightning.programs import extract_program, run_programs
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
        f"```text\nx = 1\n```\nor\n```py\n{F}```",
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


@pytest.mark.parametrize(
    "above",
    [
        "import math\n\nfrom fractions import Fraction\n\ndef helper():\n    return 1\n\n",
        "import math\n# Prices are in dollars.\n",
        "import math\n\nRATE = 0.5  # a constant\nDAYS: int = 7\n",
        "PRICES = [\n1,\n2,\n]\n",
        "NOTE = '''\nfree words, and (\n'''\n",
        "from math import *\nHALF = floor(2.5)\n",
        "try:\n    import numpy as np\nexcept ImportError:\n    np = None\n",
        "from __future__ import annotations\ndef helper(s: Shop) -> Shop:\n    return s\n\nclass Shop:\n    pass\n\n",
        "def setup():\n    global rate\n    rate = 21\n\nsetup()\nprice = rate * 2\n",
        "globals()['rate'] = 2\nprice = rate * 2\n",
        "exceptions = 42\nelse_cost = 3\nfinal = 2\n",
        "if True:\n    a = 1\nelse:\n    a = 2\n# and\nb = a + 1\n",
        "import functools\n\n@functools.lru_cache(None)\ndef helper(n: int = 3) -> int:\n    return n\n\n",
        "class Shop:\n    price = 2\n\n    def cost(self, n):\n        return self.price * n\n\n",
        "square = lambda n: later(n)\ndef later(n):\n    return n * n\n",
        "pairs = [(i, j) for i in range(3) for j in range(i)]\nprint(len(pairs))\n",
        "match 3:\n    case int(n):\n        size = n\n",
    ],
)
def test_keeps_all_that_parses_and_may_run(above: str) -> None:
    source = above + F
    assert extract_program(source) == source
    assert extract_program("I import from memory:\n" + source + "Done (at last") == source
    assert extract_program(f"First:\n```python\n{above}```\nthen\n```python\n{F}```\nand\n```\nx\n```") is not None
    assert run_programs([f"```python\n{above}```\nthen:\n```python\n{F}```"])[0].result == 42


@pytest.mark.parametrize(
    "prose",
    ["Solution", "Answer", "Total = price * quantity", "It's easy (really", "Step 1: multiply\nStep 2: add",
     "price * quantity", "We return 42.", "def", "x = 5 apples", "* a list\n* of two", "return to sender"],
)  # fmt: skip
def test_prose_is_no_code(prose: str) -> None:
    assert extract_program(f"{prose}\n{F}") == F
    assert extract_program(f"{F}{prose}\n") == F
    assert extract_program(f"import math\n{prose}\n{F}") == "import math\n" + F


@pytest.mark.parametrize(
    ("text", "source"),
    [
        (F + "assert simple_math_problem() == 41\n", F),
        (F + "answer = simple_math_problem(5)\n", F),
        (F + "input('press')\nimport pytest\nimport unittest\n\nclass Test(unittest.TestCase):\n    pass\n", F),
        (F + "print(f'The answer is {simple_math_problem()}')\n", F),
        (F + "if __name__ == '__main__':\n    print(simple_math_problem())\n", F),
        (F + "RATE = 2\n\ndef helper():\n    return RATE\n", F + "RATE = 2\n\ndef helper():\n    return RATE\n"),
        ("import numpy as np\nimport math\n" + F, "import math\n" + F),
        ("del x\nraise\n" + F, F),
        ("```python\ndef simple_math_problem_v1():\n    pass\n```\n```python\n" + F + "```", None),
        ("Define def simple_math_problem and return\n```\n" + F + "```", F),
        ("```\n# def simple_math_problem goes below\n```\n```\n" + F + "```", F),
        ("\ufeff" + F, F),
        (" " + F, None),
        ("".join(f"    {line}\n" for line in F.splitlines()), F),
        ("1. Do:\n   ```python\n" + "".join(f"   {line}\n" for line in F.splitlines()) + "   ```\n", F),
        (F.replace("def simple", "def  simple"), F.replace("def simple", "def  simple")),
        ("import math\n```\nfrom __future__ import annotations\nimport math\n" + F + "```",
         "from __future__ import annotations\nimport math\n" + F),
        ("```\nimport math\n```\n```\nfrom __future__ import annotations\n" + F + "```",
         "from __future__ import annotations\nimport math\n\n" + F),
    ],
)  # fmt: skip
def test_texts_as_models_write_them(text: str, source: str | None) -> None:
    assert source is None or extract_program(text) == source
    assert run_programs([text])[0].result == 42


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

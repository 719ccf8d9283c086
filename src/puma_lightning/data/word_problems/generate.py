"""Seeded word problems: a template, numbers that suit it, people and nouns, and phrases, all drawn at random.

Attempt i depends on (seed, split, i) only, so a longer set starts with a shorter one of the same seed. Which split a
problem belongs to depends on its template and its numbers, not on the seed: nobody who has learned the training
problems by heart, of whatever seed, knows the answer to a held-out one.
"""

from __future__ import annotations

import itertools
import random
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import CodeType
from typing import Literal, TypeVar, get_args

from tqdm import tqdm

from puma_lightning.data.word_problems.templates import NOUNS, PEOPLE, TEMPLATES, Template

Split = Literal["train", "val", "test"]

# A template's numbers are dealt into so many shares: one is for val, one for test and the others for train.
_SHARES = 16
# Attempts without a new problem before we say that there are no more.
_PATIENCE = 20_000
_Any = TypeVar("_Any")


@dataclass(frozen=True)
class Problem:
    """A word problem, and what it was made from.

    Args:
        template: Name of its template.
        numbers: The numbers of the template, by name.
        question: A few sentences.
        code: A Python function without arguments that returns the answer.
        answer: A whole number.
    """

    template: str
    numbers: dict[str, int]
    question: str
    code: str
    answer: str


def make_problems(number: int, seed: int, split: Split, progress: bool = False) -> list[dict[str, str]]:
    """Make word problems with the programs that solve them, in the format of TinyGSM (arXiv:2312.09241).

    Args:
        number: How many.
        seed: Any integer; the same seed gives the same problems on every machine.
        split: No problem of one split shares its template and numbers with one of another, whatever the seeds.
        progress: Show a progress bar on stderr.

    Returns:
        Different problems, as ``question``, ``code`` and ``answer``. A shorter list is the start of a longer one.

    Raises:
        ValueError: If there is no such split, ``number`` is negative, or there are not that many.
    """
    if split not in get_args(Split):
        raise ValueError(f"split: expected one of {', '.join(get_args(Split))}, got {split!r}; choose one of these")
    if number < 0:
        raise ValueError(f"number: expected 0 or more problems, got {number}; give how many you want")
    problems: dict[str, Problem] = {}
    last_success = 0
    with tqdm(total=number, desc="Making word problems", unit="", disable=not progress, delay=2) as bar:
        for index in itertools.count():
            if len(problems) == number:
                break
            problem = attempt(seed, split, index)
            if problem.question not in problems:
                problems[problem.question] = problem
                last_success = index
                bar.update()
            elif index - last_success > _PATIENCE:
                raise ValueError(
                    f"num_{split}: expected {number:,} different word problems, got {len(problems):,} and no other in "
                    f"{_PATIENCE:,} attempts; ask for fewer"
                )
    return [{"question": p.question, "code": p.code, "answer": p.answer} for p in problems.values()]


def attempt(seed: int, split: Split, index: int) -> Problem:
    """Make one problem; two indices may give the same one.

    Args:
        seed: Any integer.
        split: The split that the numbers must belong to, see ``split_of``.
        index: Any integer.

    Returns:
        The problem.
    """
    lots = random.Random(f"{seed} {split} {index}")
    template = _choose(lots, TEMPLATES)
    numbers = _draw_numbers(lots, template, split)
    slots = {**numbers, **draw_words(lots)}
    question = "".join(_choose(lots, options) for options in phrases(template.question))
    code = "".join(f"    {line}\n" for line in (*_lines(template.program), "return result"))
    return Problem(
        template.name,
        numbers,
        question.format(**slots),
        "def simple_math_problem() -> int:\n" + code.format(**slots),
        str(int(run(template, numbers)[-1])),
    )


def split_of(template: Template, numbers: Mapping[str, int]) -> Split:
    """Return the split that all problems of a template with these numbers belong to.

    Args:
        template: Only its name counts.
        numbers: By name.

    Returns:
        ``train`` for most of them.
    """
    key = " ".join([template.name, *(str(numbers[name]) for name in template.numbers)])
    share = zlib.crc32(key.encode()) % _SHARES
    return "val" if share == 0 else "test" if share == 1 else "train"


def run(template: Template, numbers: Mapping[str, int]) -> list[float]:
    """Run a template's program.

    Args:
        template: What to run.
        numbers: By name.

    Returns:
        The value of every line, the result last.
    """
    scope: dict[str, float] = {f"_{name}": number for name, number in numbers.items()}
    exec(_compiled(template.program), {"__builtins__": {}}, scope)
    return list(scope.values())[len(numbers) :]


def suits(template: Template, numbers: Mapping[str, int]) -> bool:
    """Tell whether every line of a template's program gives a whole number of at least 2, as plurals need.

    Args:
        template: What to run.
        numbers: By name.

    Returns:
        Whether these numbers may be used.
    """
    try:
        return all(value >= 2 and value % 1 == 0 for value in run(template, numbers))
    except ZeroDivisionError:
        return False


def draw_words(lots: random.Random) -> dict[str, str]:
    """Draw people and nouns.

    Args:
        lots: The source of randomness.

    Returns:
        A word for every slot of a template that is not a number.
    """
    name, friend = _choose_two(lots, tuple(PEOPLE))
    he = PEOPLE[name]
    his = "his" if he == "he" else "her"
    words = {"name": name, "friend": friend, "he": he, "He": he.capitalize(), "his": his, "His": his.capitalize()}
    for (one, many), nouns in NOUNS.items():
        noun, other = _choose_two(lots, tuple(nouns))
        words |= {one: noun, many: nouns[noun], f"other_{many}": nouns[other]}
    return words


@cache
def phrases(question: str) -> tuple[tuple[str, ...], ...]:
    """Split the question of a template into its parts.

    Args:
        question: In the notation of the templates.

    Returns:
        The phrases to choose from in each part; a part that is always the same has one.
    """
    parts = re.split(r"\[(.*?)\]", " ".join(question.split()))
    return tuple(tuple(part.split("|")) for part in parts)


def _draw_numbers(lots: random.Random, template: Template, split: Split) -> dict[str, int]:
    while True:
        numbers = {name: _choose(lots, choices) for name, choices in template.numbers.items()}
        if split_of(template, numbers) == split and suits(template, numbers):
            return numbers


def _choose(lots: random.Random, options: Sequence[_Any]) -> _Any:
    # random() alone, among all methods of Random, gives the same on every version of Python.
    return options[int(lots.random() * len(options))]


def _choose_two(lots: random.Random, options: Sequence[_Any]) -> tuple[_Any, _Any]:
    first = int(lots.random() * len(options))
    step = 1 + int(lots.random() * (len(options) - 1))
    return options[first], options[(first + step) % len(options)]


@cache
def _lines(program: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in program.strip().splitlines())


@cache
def _compiled(program: str) -> CodeType:
    # {boxes} = {count} becomes _boxes = _count.
    return compile(re.sub(r"{(\w+)}", r"_\1", "\n".join(_lines(program))), "<template>", "exec")

import hashlib
import itertools
import math
import random
import re
from collections import Counter

import pytest

from puma_lightning.data.word_problems import TEMPLATES, Problem, Split, Template, attempt, make_problems, split_of
from puma_lightning.data.word_problems.generate import suits
from puma_lightning.data.word_problems.templates import CONSTANTS

SPLITS: tuple[Split, ...] = ("train", "val", "test")
SOME = {split: [attempt(7, split, index) for index in range(2000)] for split in SPLITS}
ALL = [problem for split in SPLITS for problem in SOME[split]]


def body(problem: Problem) -> list[str]:
    first, *lines, last = problem.code.splitlines()
    assert first == "def simple_math_problem() -> int:" and last == "    return result"
    return [line.removeprefix("    ") for line in lines]


def operations(problem: Problem) -> int:
    return sum(bool(re.search(r" [-+*/] ", line)) for line in body(problem))


def numbers_in(text: str) -> set[int]:
    return {int(digits) for digits in re.findall(r"\d+", text)}


# A change here makes every user's built-in data another data set.
@pytest.mark.parametrize(
    ("split", "fingerprint"), [("train", "3de51cb6666a"), ("val", "04b012f76c81"), ("test", "d9155a5c02b1")]
)
def test_same_seed_same_problems_on_every_machine(split: Split, fingerprint: str) -> None:
    problems = make_problems(200, 5, split)
    assert hashlib.sha256(repr(problems).encode()).hexdigest()[:12] == fingerprint
    assert make_problems(200, 6, split) != problems


@pytest.mark.parametrize("split", SPLITS)
def test_a_larger_set_starts_with_the_smaller_one(split: Split) -> None:
    assert make_problems(400, 3, split)[:150] == make_problems(150, 3, split)


def test_no_problem_comes_twice_although_attempts_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    def repeating(seed: int, split: Split, index: int) -> Problem:
        return attempt(seed, split, index // 3)

    monkeypatch.setattr("puma_lightning.data.word_problems.generate.attempt", repeating)
    questions = [problem["question"] for problem in make_problems(300, 0, "train")]
    assert len(set(questions)) == 300


def test_no_template_has_the_same_numbers_in_two_splits_whatever_the_seeds() -> None:
    seen: dict[tuple[str, tuple[int, ...]], Split] = {}
    for split, seed, index in itertools.product(SPLITS, (0, 1), range(2000)):
        problem = attempt(seed, split, index)
        assert seen.setdefault((problem.template, tuple(problem.numbers.values())), split) == split
    questions = [{problem.question for problem in SOME[split]} for split in SPLITS]
    assert len(set.union(*questions)) == sum(map(len, questions))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("start", [0, 500, 1000])
def test_every_template_is_among_any_thousand_problems(split: Split, start: int) -> None:
    found = {problem.template for problem in SOME[split][start : start + 1000]}
    assert found == {template.name for template in TEMPLATES}


def test_programs_of_one_to_four_steps_are_about_as_frequent() -> None:
    counts = Counter(operations(problem) for problem in ALL)
    assert sorted(counts) == [1, 2, 3, 4]
    assert min(counts.values()) > 0.2 * len(ALL)


def test_programs_give_the_answer_by_way_of_whole_numbers_that_suit_plurals() -> None:
    for problem in ALL:
        scope: dict[str, float] = {}
        exec("\n".join(body(problem)), {}, scope)
        assert len(scope) == len(body(problem)), f"a variable is assigned twice in {problem.code}"
        assert all(value >= 2 and value == int(value) for value in scope.values()), problem.code
        functions: dict[str, object] = {}
        exec(problem.code, functions)
        function = functions["simple_math_problem"]
        assert callable(function) and function() == int(problem.answer)
        assert problem.answer == str(int(problem.answer))


def test_programs_copy_the_numbers_of_the_question() -> None:
    for problem in ALL:
        asked, used = numbers_in(problem.question), numbers_in(problem.code)
        assert asked <= used, problem
        words = set(re.findall(r"[a-z]+", problem.question))
        assert all(words & set(CONSTANTS[constant]) for constant in used - asked), problem


def test_programs_do_one_operation_a_line_and_use_every_value() -> None:
    for problem in ALL:
        lines = body(problem)
        assert all(re.fullmatch(r"[a-z_]+ = \w+( [-+*/] \w+)?", line) for line in lines), problem.code
        for position, line in enumerate(lines):
            name = line.split(" = ")[0]
            rest = "\n".join([*lines[position + 1 :], "return result"])
            assert re.search(rf"\b{name}\b", rest), f"{name} is not used in {problem.code}"


def test_problems_are_short() -> None:
    assert max(len(problem.question.split()) for problem in ALL) <= 45
    assert max(len(problem.code.splitlines()) for problem in ALL) <= 8


def test_a_person_is_he_or_she_throughout() -> None:
    for problem in ALL:
        words = set(re.findall(r"[a-z]+", problem.question.lower()))
        assert not (words & {"he", "his", "him"} and words & {"she", "her"}), problem.question


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_few_of_many_numbers_are_held_out(template: Template) -> None:
    lots = random.Random(0)
    drawn = [{name: lots.choice(choices) for name, choices in template.numbers.items()} for _ in range(20_000)]
    good = [numbers for numbers in drawn if suits(template, numbers)]
    all_numbers = math.prod(len(choices) for choices in template.numbers.values())
    assert all_numbers * len(good) / len(drawn) > 3000
    held_out = [split_of(template, numbers) for numbers in good if split_of(template, numbers) != "train"]
    assert 0.08 < len(held_out) / len(good) < 0.17
    assert 0.25 < held_out.count("val") / len(held_out) < 0.75


def test_impossible_arguments_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="split: expected one of train, val, test, got 'dev'"):
        make_problems(1, 0, "dev")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="number: expected 0 or more problems, got -1"):
        make_problems(-1, 0, "train")
    assert make_problems(0, 0, "train") == []

import itertools
import random
import re
from string import Formatter

import pytest

from puma_lightning.data.word_problems.generate import draw_words, phrases
from puma_lightning.data.word_problems.templates import NOUNS, PEOPLE, TEMPLATES, Template

each_template = pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)


def slots(text: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(text) if name}


def test_names_are_unique() -> None:
    assert len({template.name for template in TEMPLATES}) == len(TEMPLATES) >= 30


@each_template
def test_numbers_are_all_asked_and_all_used(template: Template) -> None:
    assert set(template.numbers) <= slots(template.program)
    for phrasing in itertools.product(*phrases(template.question)):
        assert set(template.numbers) <= slots("".join(phrasing))
    assert min(min(choices) for choices in template.numbers.values()) >= 2
    assert not set(template.numbers) & set(draw_words(random.Random(0)))


@each_template
def test_every_phrasing_is_clean_english(template: Template) -> None:
    phrasings = ["".join(choice) for choice in itertools.product(*phrases(template.question))]
    assert len(set(phrasings)) == len(phrasings) >= 12
    for seed, phrasing in enumerate(phrasings):
        text = phrasing.format(**draw_words(random.Random(seed)), **dict.fromkeys(template.numbers, 23))
        assert not re.search(r"[{}\[\]|\n]|  | [.,?]|\$ ", text), text
        # Sentences start with a capital or a number and end with one sign.
        assert re.fullmatch(r"([A-Z2][^.?]*[.] )*[A-Z2][^.?]*[?]", text), text
        assert not re.search(r"\b[Aa] [aeio]|\b[Aa]n [^aeioh]|\b(\w+) \1\b", text), text
        singular = "|".join(noun for nouns in NOUNS.values() for noun in nouns)
        assert not re.search(rf"23 (times as )?(many )?({singular})\b", text), text
        plural = "|".join(many for nouns in NOUNS.values() for many in nouns.values())
        assert not re.search(rf"\b([Aa]n?|[Ee]ach|[Ee]very|[Oo]ne) ({plural})\b", text), text


def test_nouns_are_plain_words_and_make_variable_names() -> None:
    for nouns in NOUNS.values():
        assert len(nouns) >= 2
        for noun, plural in nouns.items():
            assert plural.isidentifier() and plural == plural.lower() and plural != noun
    assert set(PEOPLE.values()) == {"he", "she"}
    assert not any(name.endswith("s") for name in PEOPLE)  # for the sake of "{name}'s"

"""Grade-school word problems and the programs that solve them, made from templates; nothing is downloaded."""

from puma_lightning.data.word_problems.generate import Problem, Split, attempt, make_problems, run, split_of
from puma_lightning.data.word_problems.templates import TEMPLATES, Template

__all__ = [
    "TEMPLATES",
    "Problem",
    "Split",
    "Template",
    "attempt",
    "make_problems",
    "run",
    "split_of",
]

"""Word problems and the programs that solve them: TinyGSM, and problems made from templates without a download."""

from puma_lightning.data.word_problems.datamodule import WordProblemsDataModule
from puma_lightning.data.word_problems.generate import Problem, Split, attempt, make_problems, run, split_of
from puma_lightning.data.word_problems.templates import TEMPLATES, Template
from puma_lightning.data.word_problems.tinygsm import TinyGSMDataModule

__all__ = [
    "TEMPLATES",
    "Problem",
    "Split",
    "Template",
    "TinyGSMDataModule",
    "WordProblemsDataModule",
    "attempt",
    "make_problems",
    "run",
    "split_of",
]

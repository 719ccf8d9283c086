"""Programs that a model writes: finding them in its text, running them in isolation, comparing their numbers."""

from puma_lightning.programs.answers import parse_number, same_number
from puma_lightning.programs.extraction import extract_program
from puma_lightning.programs.runner import Outcome, ProgramRun, run_programs

__all__ = ["Outcome", "ProgramRun", "extract_program", "parse_number", "run_programs", "same_number"]

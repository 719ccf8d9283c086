"""Progressive unmasking (PUMA) for masked diffusion models, in PyTorch Lightning."""

from puma_lightning import startup  # noqa: F401  # isort: skip  # before all that imports torchmetrics
from puma_lightning.callbacks import (
    ChainDiagnostics,
    GenerationEvaluation,
    PredictionWriter,
    StepProgressBar,
    UnmaskingTrajectory,
)
from puma_lightning.chain.policies import Confidence, Entropy, LeftToRight, Margin, Policy, RandomOrder
from puma_lightning.chain.reveal import reveal
from puma_lightning.chain.student import BlockSampler, LeftToRightSampler, Sample, Sampler
from puma_lightning.chain.teacher import (
    ComplementaryMasking,
    ForwardProcess,
    MixedMasking,
    ProgressiveUnmasking,
    RandomMasking,
    SelfAlignedMasking,
    ShortStays,
)
from puma_lightning.data.batch import pad_collate
from puma_lightning.data.sudoku.datamodule import SudokuDataModule
from puma_lightning.data.text.datamodule import TextDataModule
from puma_lightning.data.word_problems import TinyGSMDataModule, WordProblemsDataModule
from puma_lightning.metrics.programs import ProgramAccuracy
from puma_lightning.metrics.sudoku import CellAccuracy, SudokuSolved
from puma_lightning.models import TransformerBackbone
from puma_lightning.modules import AutoregressiveLM, BlockDiffusion, MaskedDiffusion
from puma_lightning.training.optim import WarmupCosine

__version__ = "0.2.0"

__all__ = [
    "AutoregressiveLM",
    "BlockDiffusion",
    "BlockSampler",
    "CellAccuracy",
    "ChainDiagnostics",
    "ComplementaryMasking",
    "Confidence",
    "Entropy",
    "ForwardProcess",
    "GenerationEvaluation",
    "LeftToRight",
    "LeftToRightSampler",
    "Margin",
    "MaskedDiffusion",
    "MixedMasking",
    "Policy",
    "PredictionWriter",
    "ProgramAccuracy",
    "ProgressiveUnmasking",
    "RandomMasking",
    "RandomOrder",
    "Sample",
    "Sampler",
    "SelfAlignedMasking",
    "ShortStays",
    "StepProgressBar",
    "SudokuDataModule",
    "SudokuSolved",
    "TextDataModule",
    "TinyGSMDataModule",
    "TransformerBackbone",
    "UnmaskingTrajectory",
    "WarmupCosine",
    "WordProblemsDataModule",
    "pad_collate",
    "reveal",
]

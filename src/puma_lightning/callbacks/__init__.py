"""Callbacks: evaluation by generation, chain diagnostics, unmasking orders, predictions as JSONL, step progress."""

from puma_lightning.callbacks.diagnostics import ChainDiagnostics
from puma_lightning.callbacks.generation import GenerationEvaluation
from puma_lightning.callbacks.predictions import PredictionWriter
from puma_lightning.callbacks.progress import StepProgressBar
from puma_lightning.callbacks.trajectory import UnmaskingTrajectory

__all__ = ["ChainDiagnostics", "GenerationEvaluation", "PredictionWriter", "StepProgressBar", "UnmaskingTrajectory"]

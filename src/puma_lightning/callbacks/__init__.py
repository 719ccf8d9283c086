"""Callbacks: evaluation by generation, pictures of the unmasking order, predictions as JSONL, step progress."""

from puma_lightning.callbacks.generation import GenerationEvaluation
from puma_lightning.callbacks.predictions import PredictionWriter
from puma_lightning.callbacks.progress import StepProgressBar
from puma_lightning.callbacks.trajectory import UnmaskingTrajectory

__all__ = ["GenerationEvaluation", "PredictionWriter", "StepProgressBar", "UnmaskingTrajectory"]

"""Forward processes: chains whose revealed tokens are those of the data, for training."""

from puma_lightning.chain.teacher.base import ForwardProcess, NoMasking
from puma_lightning.chain.teacher.mixed_masking import MixedMasking
from puma_lightning.chain.teacher.puma import ProgressiveUnmasking
from puma_lightning.chain.teacher.random_masking import RandomMasking
from puma_lightning.chain.teacher.self_aligned import SelfAlignedMasking

__all__ = [
    "ForwardProcess",
    "MixedMasking",
    "NoMasking",
    "ProgressiveUnmasking",
    "RandomMasking",
    "SelfAlignedMasking",
]

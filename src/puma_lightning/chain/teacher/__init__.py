"""Forward processes: chains whose revealed tokens are those of the data, for training."""

from puma_lightning.chain.teacher.base import ForwardProcess, NoMasking
from puma_lightning.chain.teacher.complementary import ComplementaryMasking
from puma_lightning.chain.teacher.mixed_masking import MixedMasking
from puma_lightning.chain.teacher.puma import ProgressiveUnmasking
from puma_lightning.chain.teacher.random_masking import RandomMasking
from puma_lightning.chain.teacher.self_aligned import SelfAlignedMasking
from puma_lightning.chain.teacher.short_stays import ShortStays

__all__ = [
    "ComplementaryMasking",
    "ForwardProcess",
    "MixedMasking",
    "NoMasking",
    "ProgressiveUnmasking",
    "RandomMasking",
    "SelfAlignedMasking",
    "ShortStays",
]

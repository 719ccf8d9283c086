"""Samplers: chains whose revealed tokens are the model's own."""

from puma_lightning.chain.student.any_order import Sampler
from puma_lightning.chain.student.blockwise import BlockSampler
from puma_lightning.chain.student.left_to_right import LeftToRightSampler
from puma_lightning.chain.student.sample import Sample

AnySampler = Sampler | LeftToRightSampler | BlockSampler

__all__ = ["AnySampler", "BlockSampler", "LeftToRightSampler", "Sample", "Sampler"]

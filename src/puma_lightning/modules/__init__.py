"""The LightningModules."""

from puma_lightning.modules.autoregressive import AutoregressiveLM
from puma_lightning.modules.block_diffusion import BlockDiffusion
from puma_lightning.modules.masked_diffusion import MaskedDiffusion

__all__ = ["AutoregressiveLM", "BlockDiffusion", "MaskedDiffusion"]

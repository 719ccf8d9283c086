"""The LightningModules."""

from puma_lightning.modules.autoregressive import AutoregressiveLM
from puma_lightning.modules.masked_diffusion import MaskedDiffusion

__all__ = ["AutoregressiveLM", "MaskedDiffusion"]

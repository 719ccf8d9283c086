"""The LightningModules."""

from puma_lightning.modules.masked_diffusion import MaskedDiffusion

__all__ = ["MaskedDiffusion"]

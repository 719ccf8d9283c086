"""Backbones. Any module from token ids (B, L) to logits (B, L, V) can take their place."""

from puma_lightning.models.transformer import TransformerBackbone

__all__ = ["TransformerBackbone"]

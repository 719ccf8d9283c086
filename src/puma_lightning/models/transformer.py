"""A Qwen2-style transformer, bidirectional, causal or block-causal.

Parameters are named as in Hugging Face's Qwen2: its state dict loads once the prefix ``model.`` is stripped.

Shapes: B batch, L length, D hidden size, V vocabulary, H query heads, G key/value heads, E head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from puma_lightning.models.block_attention import attend, can_flex, without_padding
from puma_lightning.models.block_attention import attention_mask as block_mask_of
from puma_lightning.models.cache import KeyValueCache

if TYPE_CHECKING:
    from puma_lightning.models.block_attention import AttentionMask


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn ``(x[i], x[i + E/2])`` by the i-th angle of its position: rotary embedding (arXiv 2104.09864).

    Args:
        x: Queries or keys, (B, heads, L, E).
        cos: Cosines of the angles, (L, E/2) float32.
        sin: Sines of the angles, (L, E/2) float32.

    Returns:
        The rotated queries or keys, (B, heads, L, E), in x's dtype; the rotation is done in float32 or better.
    """
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


class RotaryTable(nn.Module):
    """Cosines and sines of all rotary angles, (max_length, E/2) each, never part of the state dict."""

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, max_length: int, theta: float) -> None:
        super().__init__()
        self.head_dim, self.max_length, self.theta = head_dim, max_length, theta
        cos, sin = self._table(None)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _table(self, device: torch.device | None) -> tuple[Tensor, Tensor]:
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device) / self.head_dim
        positions = torch.arange(self.max_length, dtype=torch.float32, device=device)
        angles = torch.outer(positions, 1.0 / self.theta**exponents)
        return angles.cos(), angles.sin()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryTable:
        # Module.to(bfloat16) would round the angles and to_empty() would leave them unset: compute them again.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.cos, self.sin = self._table(self.cos.device)
        return self

    def forward(self, end: int, start: int = 0) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, (end - start, E/2), of the positions start..end-1."""
        return self.cos[start:end], self.sin[start:end]


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions; every H/G query heads share a key/value head."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        qkv_bias: bool,
        dropout: float,
        causal: bool,
    ) -> None:
        super().__init__()
        self.head_dim = hidden_size // num_heads
        self.grouped, self.dropout, self.causal = num_kv_heads != num_heads, dropout, causal
        self.q_proj = nn.Linear(hidden_size, num_heads * self.head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: AttentionMask | None = None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Attend within each row, and to what the cache holds of it: (B, L, D) to (B, L, D)."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H or G, L, E)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
            if mask is None and self.causal and 1 < q.shape[2] < k.shape[2]:
                # is_causal would line up the first query with the first key.
                mask = q.new_ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(cache.length)
        dropout = self.dropout if self.training else 0.0
        causal = self.causal and mask is None and q.shape[2] == k.shape[2]
        attended = attend(q, k, v, mask, dropout, causal, self.grouped)
        out: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """SwiGLU feed-forward layer (arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Each position on its own: (B, L, D) to (B, L, D)."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """Pre-norm block: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_heads: int,
        num_kv_heads: int,
        norm_eps: float,
        qkv_bias: bool,
        dropout: float,
        causal: bool,
    ) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.self_attn = Attention(hidden_size, num_heads, num_kv_heads, qkv_bias, dropout, causal)
        self.post_attention_layernorm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.mlp = MLP(hidden_size, intermediate_size)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: AttentionMask | None = None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Apply the layer: (B, L, D) to (B, L, D)."""
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, layer))
        x = x + self.dropout(self.mlp(self.post_attention_layernorm(x)))
        return x


class TransformerBackbone(nn.Module):
    """Qwen2-style transformer from token ids (B, L) to logits (B, L, V).

    Any module with such a ``forward`` and an attribute ``vocab_size`` can replace it.

    Args:
        vocab_size: Number of tokens V, with the mask token.
        hidden_size: Width D of the residual stream.
        intermediate_size: Width of the SwiGLU feed-forward layers.
        num_layers: Number of transformer blocks.
        num_heads: Number of query heads; each has hidden_size / num_heads channels.
        num_kv_heads: Number of key/value heads, a divisor of num_heads. None means num_heads.
        max_length: Longest sequence the model accepts.
        rope_theta: Base of the rotary wavelengths.
        learned_positions: Whether to add a learned embedding of the absolute position. Rotary embedding tells
            positions apart by distance only; where a position's place has a meaning, as on a board, this is much
            easier to learn from.
        norm_eps: Added to the mean square in every RMSNorm.
        qkv_bias: Whether the query, key and value projections have biases. Qwen2's published weights do.
        tie_embeddings: Whether the output layer shares the token embedding's weight.
        dropout: Probability of dropping attention weights and residual-branch outputs in training. Block diffusion on a
            GPU is slower with it: FlexAttention has none.
        causal: Whether a position sees earlier positions and itself only. False lets it see all of them.
        activation_checkpointing: Whether to recompute the blocks in the backward pass, for less memory.
        compile: Whether to run the blocks through torch.compile. State-dict keys stay the same.

    Raises:
        ValueError: If a size or the dropout is out of range, or the head counts don't divide what they must.
    """

    weights_per_token = ("embed_tokens.weight", "lm_head.weight")

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int = 256,
        intermediate_size: int = 768,
        num_layers: int = 8,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        max_length: int = 1024,
        rope_theta: float = 10000.0,
        learned_positions: bool = False,
        norm_eps: float = 1e-6,
        qkv_bias: bool = False,
        tie_embeddings: bool = False,
        dropout: float = 0.0,
        causal: bool = False,
        activation_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        sizes = {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "max_length": max_length,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}; set it to a positive integer")
        if hidden_size % (2 * num_heads):
            raise ValueError(
                f"hidden_size: expected a multiple of 2 * num_heads = {2 * num_heads} (rotary embedding pairs the "
                f"channels of a head), got {hidden_size}; choose such a multiple"
            )
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_kv_heads: expected a divisor of num_heads = {num_heads}, got {num_kv_heads}; choose one"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}; 0 turns dropout off")
        if not (rope_theta > 0.0 and norm_eps > 0.0):
            raise ValueError(
                f"rope_theta, norm_eps: expected positive numbers, got {rope_theta} and {norm_eps}; the usual values "
                "are 10000.0 and 1e-6"
            )
        self.vocab_size, self.max_length, self.causal, self.dropout = vocab_size, max_length, causal, dropout
        self.activation_checkpointing = activation_checkpointing
        self._settings = {
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "rope_theta": rope_theta,
            "norm_eps": norm_eps,
        }

        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        self.embed_positions = nn.Embedding(max_length, hidden_size) if learned_positions else None
        self.rotary = RotaryTable(hidden_size // num_heads, max_length, rope_theta)
        self.layers = nn.ModuleList(
            Layer(
                hidden_size=hidden_size,
                intermediate_size=intermediate_size,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                norm_eps=norm_eps,
                qkv_bias=qkv_bias,
                dropout=dropout,
                causal=causal,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)
        if tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.reset_parameters()
        if compile:
            # Block by block and in place: the blocks share one compiled graph, and no key gets a prefix.
            for layer in self.layers:
                layer.compile()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights with std 0.02, the last of a residual branch with 0.02 / sqrt(2 * num_layers)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * len(self.layers)))
            else:
                nn.init.normal_(parameter, std=0.02)

    @property
    def settings(self) -> dict[str, float]:
        """The settings that change the function that the weights compute, but none of their shapes."""
        return dict(self._settings)

    def hidden_states(
        self,
        input_ids: Tensor,
        cache: KeyValueCache | None = None,
        block_size: int | None = None,
        clean: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Return what ``lm_head`` turns into logits, after the final norm: (B, L) int64 to (B, L, D).

        Args:
            input_ids: The tokens; with a cache, those that follow on the positions it holds.
            cache: Keys and values of earlier positions, to which those of ``input_ids`` are added. In a causal model
                this gives what reading all positions at once gives. In a bidirectional model it does not: the earlier
                positions do not see the later ones.
            block_size: If given, a position sees its own block and the blocks before it; see ``sees``.
            clean: With a block size, clean tokens that stand at the same positions as ``input_ids``, (B, L') with
                L' <= L: each block of ``input_ids`` then sees these in place of the earlier blocks of ``input_ids``. No
                position sees the last block of x0, so it can be left out.
            attention_mask: 0 where a position is padding, which no other position sees, (B, L); with a cache, of the
                positions that it holds as well. None if nothing is. Positions are counted with the padding, so padding
                belongs at the end. What comes out at padding means nothing.

        Returns:
            The hidden states, (B, L, D); with ``clean``, those of both one after the other, (B, L + L', D).

        Raises:
            ValueError: If the sequences are longer than ``max_length``, or the attention mask has another shape.
        """
        start = cache.length if cache is not None else 0
        end = start + input_ids.shape[1]
        if end > self.max_length:
            raise ValueError(
                f"max_length: expected at most {self.max_length} positions, got {end}; shorten the sequences, or build "
                "the model with a larger max_length"
            )
        keys = None if attention_mask is None else attention_mask.bool()
        if keys is not None and keys.shape != (len(input_ids), end):
            raise ValueError(
                f"attention_mask: expected one entry for each position, {(len(input_ids), end)}, got "
                f"{tuple(keys.shape)}; with a cache, give those of the positions that it holds as well"
            )
        noisy = 0
        cos, sin = self.rotary(end, start)
        places = None if self.embed_positions is None else self.embed_positions.weight[start:end]
        if clean is not None:
            noisy, again = input_ids.shape[1], slice(0, clean.shape[1])
            input_ids = torch.cat([input_ids, clean], dim=1)
            cos, sin = torch.cat([cos, cos[again]]), torch.cat([sin, sin[again]])
            places = None if places is None else torch.cat([places, places[again]])
            keys = None if keys is None else torch.cat([keys, keys[:, again]], dim=1)
        x: Tensor = self.embed_tokens(input_ids)
        if places is not None:
            x = x + places
        mask = None
        if block_size is not None and input_ids.shape[1] > block_size:
            flex = can_flex(x, 2 * cos.shape[1], self.dropout if self.training else 0.0)
            mask = block_mask_of(start, start + input_ids.shape[1], noisy, block_size, x.device, flex, keys)
        elif keys is not None:
            seen = torch.ones(input_ids.shape[1], end, dtype=torch.bool, device=x.device).tril(start)
            mask = without_padding(keys, seen if self.causal else None)
        recompute = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        for index, layer in enumerate(self.layers):
            if cache is not None:
                # Not through __call__, which may be compiled: it would be compiled again for every length.
                x = layer.forward(x, cos, sin, mask, cache, index)
            elif recompute:
                x = checkpoint(layer, x, cos, sin, mask, use_reentrant=False)
            else:
                x = layer(x, cos, sin, mask)
        if cache is not None:
            cache.length = end
        out: Tensor = self.norm(x)
        return out

    def forward(
        self, input_ids: Tensor, cache: KeyValueCache | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Return logits of the token at every position: (B, L) int64 to (B, L, V); see ``hidden_states``."""
        logits: Tensor = self.lm_head(self.hidden_states(input_ids, cache, attention_mask=attention_mask))
        return logits

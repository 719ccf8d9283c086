"""The mask of block diffusion: which position sees which, for SDPA, for FlexAttention, or block by block."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# From these sizes on, one call of SDPA for each block is faster on a CPU than one call with a mask.
FEWEST_POSITIONS, MOST_BLOCKS = 32, 16


class BlockByBlock(NamedTuple):
    """The mask as one call of SDPA for each block, on the keys that it sees: nothing is computed to be masked.

    Attributes:
        noisy: Length of xt in ``[xt ; x0]``.
        block_size: Length of a block.
    """

    noisy: int
    block_size: int


if TYPE_CHECKING:
    AttentionMask = Tensor | BlockMask | BlockByBlock


def sees(query: Tensor, key: Tensor, noisy: int, block_size: int) -> Tensor:
    """Tell which position sees which in block diffusion, for rows ``[xt ; x0]`` (section 3 of arXiv 2503.09573).

    A block of xt sees itself and the blocks of x0 before it; a block of x0 sees itself and the blocks of x0 before it.
    No clean position sees a noisy one, so what the clean positions compute can be kept.

    Args:
        query: Indices into ``[xt ; x0]``, int64 of any shape.
        key: Indices of the positions that the queries look at, broadcast with ``query``.
        noisy: Length of xt; 0 for rows that are x0 alone.
        block_size: Length of a block.

    Returns:
        True where the query sees the key, bool.
    """
    clean_query, clean_key = query >= noisy, key >= noisy
    query_block = torch.where(clean_query, query - noisy, query) // block_size
    key_block = torch.where(clean_key, key - noisy, key) // block_size
    before = clean_key & (key_block < query_block)
    return before | ((clean_query == clean_key) & (key_block == query_block))


def attention_mask(
    start: int, end: int, noisy: int, block_size: int, device: torch.device, flex: bool, keys: Tensor | None = None
) -> AttentionMask:
    """Return the mask in the form that is fastest, for the queries start..end-1 and the keys 0..end-1.

    Args:
        start: Index of the first query: how many positions a cache holds.
        end: Number of keys.
        noisy: Length of xt in ``[xt ; x0]``.
        block_size: Length of a block.
        device: Where the mask is needed.
        flex: Whether FlexAttention can be used.
        keys: False where a key is padding, (B, end) bool; None where none is.

    Returns:
        What ``attend`` takes as its mask.
    """
    if keys is not None and flex:
        return _block_mask(start, end, noisy, block_size, device, flex, keys)
    if keys is not None:
        by_blocks = block_mask(start, end, noisy, block_size, device, flex)
        assert isinstance(by_blocks, Tensor)
        return without_padding(keys, by_blocks)
    whole = not any(index % block_size for index in (start, end, noisy))
    blocks = (noisy or end - start) // block_size
    if device.type == "cpu" and not flex and whole and block_size >= FEWEST_POSITIONS and blocks <= MOST_BLOCKS:
        return BlockByBlock(noisy, block_size)
    return block_mask(start, end, noisy, block_size, device, flex)


@lru_cache(maxsize=4)
def block_mask(start: int, end: int, noisy: int, block_size: int, device: torch.device, flex: bool) -> AttentionMask:
    """Return the mask as a tensor or a ``BlockMask``, for the queries start..end-1 and the keys 0..end-1.

    Args:
        start: Index of the first query: how many positions a cache holds.
        end: Number of keys.
        noisy: Length of xt in ``[xt ; x0]``.
        block_size: Length of a block.
        device: Where the mask is needed.
        flex: Whether for FlexAttention, which skips blocks of the matrix that are all masked.

    Returns:
        (end - start, end), bool for SDPA; or a ``BlockMask``.
    """
    # Made in evaluation, a mask is kept for training, which cannot save inference tensors for its backward pass.
    with torch.inference_mode(False):
        return _block_mask(start, end, noisy, block_size, device, flex)


def without_padding(keys: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return a mask in which no position sees padding.

    Args:
        keys: False where a key is padding, (B, K) bool.
        mask: Which of the last Q positions sees which key otherwise, (Q, K) bool; None if they see all.

    Returns:
        (B, 1, Q or 1, K) bool. With a mask a position always sees itself: softmax over nothing would be NaN where
        padding sees nothing but padding.
    """
    seen = keys[:, None, None]
    return seen if mask is None else (mask & seen) | _itself(mask)


def _itself(mask: Tensor) -> Tensor:
    queries, keys = mask.shape
    return torch.ones_like(mask).tril(keys - queries).triu(keys - queries)


def _block_mask(
    start: int,
    end: int,
    noisy: int,
    block_size: int,
    device: torch.device,
    flex: bool,
    keys: Tensor | None = None,
) -> AttentionMask:
    if not flex:
        index = torch.arange(end, device=device)
        return sees(index[start:, None], index, noisy, block_size)
    from torch.nn.attention.flex_attention import create_block_mask

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = sees(query + start, key, noisy, block_size)
        return seen if keys is None else (seen & keys[batch, key]) | (query + start == key)

    rows = None if keys is None else len(keys)
    return create_block_mask(mask_mod, rows, None, end - start, end, device=str(device))


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, dropout: float, causal: bool, grouped: bool
) -> Tensor:
    """Attend by FlexAttention where the mask is a ``BlockMask``, else by SDPA, in one call or block by block.

    Args:
        q: Queries, (B, H, n, E).
        k: Keys, (B, G, m, E).
        v: Values, (B, G, m, E).
        mask: From ``attention_mask``; None to see everything.
        dropout: Probability of dropping an attention weight; not with FlexAttention.
        causal: Whether each of n = m positions sees those up to itself only.
        grouped: Whether G divides H instead of being equal to it.

    Returns:
        The attended values, (B, H, n, E).
    """
    if isinstance(mask, BlockByBlock):
        by_block: Tensor = _attend_block_by_block(q, k, v, mask, dropout, grouped)
        return by_block
    if mask is None or isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, enable_gqa=grouped
        )
    out: Tensor = _flex_attention()(q, k, v, block_mask=mask, enable_gqa=grouped)
    return out


@torch.compiler.disable  # type: ignore[untyped-decorator]  # unrolled, it takes minutes to compile
def _attend_block_by_block(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockByBlock, dropout: float, grouped: bool
) -> Tensor:
    noisy, size = mask
    cached = k.shape[2] - q.shape[2]
    attended = []
    for index, queries in enumerate(torch.split(q, size, dim=2)):
        start, end = index * size, (index + 1) * size
        if start < noisy:
            keys, values = (torch.cat([x[:, :, noisy : noisy + start], x[:, :, start:end]], dim=2) for x in (k, v))
        else:
            keys, values = (x[:, :, noisy : cached + end] for x in (k, v))
        attended.append(attend(queries, keys, values, None, dropout, causal=False, grouped=grouped))
    return torch.cat(attended, dim=2)


def can_flex(x: Tensor, head_dim: int, dropout: float) -> bool:
    """Tell whether FlexAttention can be used on tensors of the dtype and device of ``x``.

    Its kernels are for CUDA, heads of 16 channels or more, at most float32, and know no dropout.
    """
    return x.is_cuda and head_dim >= 16 and x.dtype != torch.float64 and not dropout


def _flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # Inside a compiled layer it becomes part of that layer's graph.
    return flex_attention if torch.compiler.is_compiling() else _compiled(flex_attention)


@lru_cache(maxsize=1)
def _compiled(function: Any) -> Any:
    """Compile into a fused kernel; uncompiled it would make the whole matrix of scores."""
    return torch.compile(function)

"""One rule in three forms: block by block gives what the mask gives."""

import pytest
import torch
from torch import Tensor

from puma_lightning.models import TransformerBackbone, block_attention
from puma_lightning.models.block_attention import BlockByBlock, attend, attention_mask, block_mask
from puma_lightning.models.transformer import KeyValueCache

CPU = torch.device("cpu")


@pytest.mark.parametrize("seen", [64, 128], ids=["x0 without its last block", "all of x0"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_block_by_block_equals_the_mask(seen: int, kv_heads: int):
    length, size = 128, 64
    end = length + seen
    assert attention_mask(0, end, length, size, CPU, False) == BlockByBlock(length, size)
    assert _difference(0, end, length, size, kv_heads) < 1e-5


def test_block_by_block_equals_the_mask_after_a_cache():
    assert attention_mask(64, 192, 0, 32, CPU, False) == BlockByBlock(0, 32)
    assert _difference(64, 192, 0, 32, 4) < 1e-5


def _difference(start: int, end: int, noisy: int, size: int, kv_heads: int) -> float:
    """Between outputs and gradients of the two forms, the largest."""
    generator = torch.Generator().manual_seed(0)
    q, out = (torch.randn(2, 4, end - start, 8, generator=generator) for _ in range(2))
    k, v = (torch.randn(2, kv_heads, end, 8, generator=generator) for _ in range(2))

    def run(mask: object) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        attended = attend(*leaves, mask, 0.0, False, kv_heads != 4)  # type: ignore[arg-type]
        return [attended.detach(), *torch.autograd.grad(attended, leaves, out)]

    blocks, masked = run(BlockByBlock(noisy, size)), run(block_mask(start, end, noisy, size, CPU, False))
    return max(float((one - other).abs().max()) for one, other in zip(blocks, masked, strict=True))


@pytest.mark.parametrize(
    "start, end, noisy, size",
    [(0, 124, 64, 4), (0, 2 * 1024, 1024, 32), (0, 100, 64, 32), (32, 192, 0, 64)],
    ids=["short blocks", "many blocks", "half a block", "half a block in the cache"],
)
def test_many_short_or_cut_blocks_take_the_mask(start: int, end: int, noisy: int, size: int):
    assert isinstance(attention_mask(start, end, noisy, size, CPU, False), Tensor)


def test_backbone_gives_the_same_in_both_forms(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    backbone = TransformerBackbone(11, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2)
    xt, x0 = torch.randint(11, (2, 2, 128)).unbind()

    def states() -> list[Tensor]:
        with torch.no_grad():
            cache = KeyValueCache(128)
            read = [backbone.hidden_states(part, cache, 32) for part in x0.split([32, 96], dim=1)]
            return [backbone.hidden_states(xt, block_size=32, clean=x0[:, :96]), *read]

    blocks = states()
    monkeypatch.setattr(block_attention, "MOST_BLOCKS", 0)
    assert isinstance(attention_mask(0, 224, 128, 32, CPU, False), Tensor)
    for one, other in zip(blocks, states(), strict=True):
        assert (one - other).abs().max() < 1e-5

"""The mask of block diffusion: who sees whom, and that all forms of it give the same numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from puma_lightning.models import TransformerBackbone, block_attention
from puma_lightning.models.block_attention import BlockByBlock, attend, attention_mask, block_mask, sees
from puma_lightning.models.cache import KeyValueCache

CPU = torch.device("cpu")


@settings(max_examples=30, deadline=None)
@given(blocks=st.integers(1, 5), size=st.integers(1, 4), left_out=st.booleans())
def test_the_rule_is_the_one_in_words(blocks, size, left_out):
    length = blocks * size
    clean = length - size * left_out
    mask = block_mask(0, length + clean, length, size, CPU, False)
    for i in range(length + clean):
        for j in range(length + clean):
            query, key = i % length // size, j % length // size
            noisy_query, noisy_key = i < length, j < length
            same, before = query == key, key < query
            expected = (same if noisy_key else before) if noisy_query else not noisy_key and (same or before)
            assert bool(mask[i, j]) == expected


def test_everybody_sees_something():
    """A row of the mask without a key would give NaN."""
    for left_out in (0, 2):
        assert block_mask(0, 16 - left_out, 8, 2, CPU, False).any(1).all()


def test_positions_in_a_cache_come_before_the_queries():
    whole = sees(torch.arange(8)[:, None], torch.arange(8), 0, 2)
    assert torch.equal(block_mask(4, 8, 0, 2, CPU, False), whole[4:])


@pytest.mark.parametrize("flex", [False, True])
def test_a_mask_made_in_evaluation_can_be_trained_with(flex):
    block_mask.cache_clear()
    with torch.inference_mode():
        mask = block_mask(0, 256, 128, 32, CPU, flex)
    assert not (mask.kv_indices if flex else mask).is_inference()


def test_flex_attention_does_not_break_a_compiled_graph():
    mask = block_mask(0, 256, 128, 32, CPU, True)
    q = torch.randn(1, 2, 256, 16)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: attend(q, q, q, mask, 0.0, False, False), backend="eager", fullgraph=True)
    plain = attend(q, q, q, block_mask(0, 256, 128, 32, CPU, False), 0.0, False, False)
    torch.testing.assert_close(compiled(q), plain, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("noisy, total, start", [(256, 480, 0), (0, 256, 128)])
def test_flex_attention_and_sdpa_give_the_same_numbers(monkeypatch, grouped, noisy, total, start):
    from torch.nn.attention.flex_attention import flex_attention

    # Fused kernels are for GPUs; the uncompiled function computes the same.
    monkeypatch.setattr(block_attention, "_flex_attention", lambda: flex_attention)
    torch.manual_seed(0)
    q = torch.randn(2, 4, total - start, 8)
    k, v = (torch.randn(2, 2 if grouped else 4, total, 8) for _ in range(2))
    plain, flex = (
        attend(q, k, v, block_mask(start, total, noisy, 32, CPU, flex), 0.0, False, grouped) for flex in (False, True)
    )
    torch.testing.assert_close(plain, flex, atol=2e-6, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention is compiled on a GPU")
def test_flex_attention_trains_on_a_gpu_as_sdpa_does():
    torch.manual_seed(0)
    model = TransformerBackbone(20, 64, 128, 2, 2, max_length=256).cuda()
    xt, x0 = torch.randint(20, (2, 2, 256), device="cuda")
    gradients = []
    for dropout in (0.0, 1e-9):  # dropout is what SDPA alone has
        model.dropout = dropout
        model.train().zero_grad()
        model.hidden_states(xt, block_size=32, clean=x0[:, :-32]).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


# --- block by block ---


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

"""The backbone: what attends to what, what positions mean, and what its options must not change."""

import copy
import io
import shutil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from puma_lightning.models import TransformerBackbone
from puma_lightning.models.transformer import RotaryTable, rotate

SMALL: dict[str, Any] = dict(
    vocab_size=13, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, max_length=16
)
seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=15, deadline=None)


def build(**changes: Any) -> TransformerBackbone:
    """A small float64 model with weights large enough for every path to be seen in the logits."""
    torch.manual_seed(changes.pop("seed", 0))
    model = TransformerBackbone(**{**SMALL, **changes}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(13, (batch, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: TransformerBackbone, input_ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids).square().mean().backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


# --- rotary embedding ---


@few
@given(seed=seeds, pairs=st.integers(1, 8), offset=st.integers(0, 20))
def test_rotary_scores_depend_on_relative_position_only(seed: int, pairs: int, offset: int) -> None:
    table = RotaryTable(2 * pairs, 64, 10000.0)
    cos, sin = (part.double() for part in table(64))
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 2 * pairs, generator=generator, dtype=torch.float64)
    queries, keys = rotate(q.expand(64, -1), cos, sin), rotate(k.expand(64, -1), cos, sin)
    scores = queries @ keys.T
    shifted = scores[offset:, offset:]
    torch.testing.assert_close(shifted, scores[: 64 - offset, : 64 - offset], atol=1e-4, rtol=1e-4)


@few
@given(seed=seeds, pairs=st.integers(1, 8))
def test_rotary_keeps_norms(seed: int, pairs: int) -> None:
    x = torch.randn(2, 3, 16, 2 * pairs, generator=torch.Generator().manual_seed(seed))
    rotated = rotate(x, *RotaryTable(2 * pairs, 16, 10000.0)(16))
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(rotated[:, :, 0], x[:, :, 0])


def test_rotary_pairs_channel_i_with_i_plus_half() -> None:
    """The rotate-half convention: position p turns channels (i, i + E/2) by p / theta^(2i/E)."""
    x = torch.zeros(8)
    x[1] = 1.0
    rotated = rotate(x.expand(4, -1), *RotaryTable(8, 4, 100.0)(4))
    angle = torch.arange(4) / 100.0 ** (2 / 8)
    expected = torch.zeros(4, 8)
    expected[:, 1], expected[:, 5] = angle.cos(), angle.sin()
    torch.testing.assert_close(rotated, expected)


@pytest.mark.parametrize("move", [lambda m: m.bfloat16(), lambda m: m.to("meta").to_empty(device="cpu")])
def test_rotary_table_survives_casts_and_materialisation(move: Any) -> None:
    table, moved = RotaryTable(8, 32, 10000.0), move(RotaryTable(8, 32, 10000.0))
    assert moved.cos.dtype == torch.float32
    assert torch.equal(moved.cos, table.cos) and torch.equal(moved.sin, table.sin)


def test_rotation_of_bfloat16_is_exact_up_to_one_rounding() -> None:
    x = torch.randn(1, 1, 32, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    cos, sin = RotaryTable(8, 32, 10000.0)(32)
    assert torch.equal(rotate(x, cos, sin), rotate(x.float(), cos, sin).bfloat16())


# --- who sees whom ---


@few
@given(seed=seeds, causal=st.booleans(), length=st.integers(2, 8), num_kv_heads=st.sampled_from([1, 2, 4]))
def test_who_sees_whom(seed: int, causal: bool, length: int, num_kv_heads: int) -> None:
    """Changing token j changes the logits at i >= j in a causal model, everywhere in a bidirectional one."""
    model = build(seed=seed, causal=causal, num_kv_heads=num_kv_heads)
    original = tokens(1, length, seed)
    changed = (original + torch.eye(length, dtype=torch.int64)) % 13  # row j: another token j
    with torch.no_grad():
        effect = (model(changed) - model(original)).abs().amax(-1)  # (j, i)
    seen = torch.ones(length, length).triu().bool() if causal else torch.ones(length, length).bool()
    assert (effect[seen] > 1e-9).all()
    assert (effect[~seen] < 1e-12).all()


@pytest.mark.parametrize("causal", [True, False])
def test_gradient_flows_from_visible_positions_only(causal: bool) -> None:
    model = build(causal=causal)
    embedded: list[Tensor] = []
    model.embed_tokens.register_forward_hook(lambda _module, _inputs, output: embedded.append(output))
    logits = model(tokens(1, 6))
    (gradient,) = torch.autograd.grad(logits[0, 2].sum(), embedded)
    reached = gradient[0].abs().amax(-1) > 0
    assert reached.tolist() == [True, True, True, *([not causal] * 3)]


@few
@given(seed=seeds, length=st.integers(1, 16))
def test_rows_are_independent(seed: int, length: int) -> None:
    model, input_ids = build(seed=seed), tokens(3, length, seed)
    with torch.no_grad():
        alone = torch.cat([model(row[None]) for row in input_ids])
        torch.testing.assert_close(model(input_ids), alone)


@few
@given(seed=seeds, num_kv_heads=st.sampled_from([1, 2]))
def test_grouped_queries_equal_repeated_key_value_heads(seed: int, num_kv_heads: int) -> None:
    grouped, full = build(seed=seed, num_kv_heads=num_kv_heads, qkv_bias=True), build(qkv_bias=True)
    state = grouped.state_dict()
    for name, value in state.items():
        if "k_proj" in name or "v_proj" in name:
            heads = value.unflatten(0, (num_kv_heads, -1))
            state[name] = heads.repeat_interleave(4 // num_kv_heads, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    torch.testing.assert_close(grouped(tokens(2, 9, seed)), full(tokens(2, 9, seed)))


# --- parameters ---


def test_names_are_those_of_qwen2() -> None:
    layer = {
        "input_layernorm.weight",
        *(f"self_attn.{name}_proj.{part}" for name in "qkv" for part in ("weight", "bias")),
        "self_attn.o_proj.weight",
        "post_attention_layernorm.weight",
        *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    }
    expected = {f"layers.{n}.{name}" for n in range(2) for name in layer}
    expected |= {"embed_tokens.weight", "norm.weight", "lm_head.weight"}
    assert set(TransformerBackbone(**SMALL, qkv_bias=True).state_dict()) == expected  # so no buffer either


def test_sudoku_model_has_the_papers_size() -> None:
    model = TransformerBackbone(vocab_size=11)
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_825_728


def test_tied_embeddings_share_storage() -> None:
    tied, untied = TransformerBackbone(**SMALL, tie_embeddings=True), TransformerBackbone(**SMALL)
    assert tied.lm_head.weight is tied.embed_tokens.weight
    assert copy.deepcopy(tied).lm_head.weight.data_ptr() != tied.lm_head.weight.data_ptr()
    count = [sum(parameter.numel() for parameter in model.parameters()) for model in (untied, tied)]
    assert count[0] - count[1] == 13 * 32


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = TransformerBackbone(vocab_size=500, hidden_size=128, num_layers=8, qkv_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            std = 0.02 / 4 if "o_proj" in name or "down_proj" in name else 0.02  # sqrt(2 * 8 layers) = 4
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name


def test_logits_are_the_output_layer_of_the_hidden_states() -> None:
    model, input_ids = build(), tokens(2, 5)
    hidden = model.hidden_states(input_ids)
    assert hidden.shape == (2, 5, 32) and model(input_ids).shape == (2, 5, 13)
    assert torch.equal(model(input_ids), model.lm_head(hidden))
    assert (model.vocab_size, model.max_length, model.causal) == (13, 16, False)


# --- options that must not change the result ---


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_keeps_gradients(dropout: float) -> None:
    plain = build(dropout=dropout)
    recomputed = build(dropout=dropout, activation_checkpointing=True)
    torch.manual_seed(1)
    expected = gradients(plain, tokens(2, 8))
    torch.manual_seed(1)
    actual = gradients(recomputed, tokens(2, 8))
    assert expected.keys() == actual.keys() == dict(plain.named_parameters()).keys()
    for name, gradient in expected.items():
        assert torch.equal(actual[name], gradient), name


def test_activation_checkpointing_recomputes_in_training_only() -> None:
    model, calls = build(activation_checkpointing=True), []
    model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(None))
    gradients(model, tokens(1, 4))
    assert len(calls) == 2
    gradients(model.eval(), tokens(1, 4))
    assert len(calls) == 3


def test_dropout_acts_in_training_only() -> None:
    model, input_ids = build(dropout=0.5), tokens(2, 8)
    assert not torch.equal(model(input_ids), model(input_ids))
    model.eval()
    assert torch.equal(model(input_ids), model(input_ids))
    torch.testing.assert_close(model(input_ids), build()(input_ids))


def test_bfloat16_autocast_is_close() -> None:
    torch.manual_seed(0)
    model, input_ids = TransformerBackbone(**SMALL), tokens(2, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(input_ids)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), model(input_ids), atol=5e-3, rtol=5e-2)


def test_compile_option_keeps_keys_and_survives_copies() -> None:
    """Nothing is compiled before the first call, so this needs no compiler."""
    model = TransformerBackbone(**SMALL, compile=True)
    plain = TransformerBackbone(**SMALL)
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(tokens(2, 5)), plain(tokens(2, 5)))


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_model_computes_the_same(recompute: bool) -> None:
    compiled, plain = build(compile=True, activation_checkpointing=recompute), build()
    for length in (7, 12):
        torch.testing.assert_close(compiled(tokens(2, length)), plain(tokens(2, length)))
    expected, actual = gradients(plain, tokens(2, 7)), gradients(compiled, tokens(2, 7))
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient)
    input_ids = tokens(2, 5)
    torch.testing.assert_close(copy.deepcopy(compiled)(input_ids), compiled(input_ids))


# --- errors ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({name: 0}, f"{name}: expected at least 1, got 0")
            for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
        ),
        ({"max_length": 0}, "max_length: expected at least 1, got 0"),
        ({"num_kv_heads": -1}, "num_kv_heads: expected at least 1, got -1"),
        ({"hidden_size": 30}, r"hidden_size: expected a multiple of .* = 8 .* got 30"),
        ({"hidden_size": 12}, r"hidden_size: .* got 12"),
        ({"num_kv_heads": 3}, "num_kv_heads: expected a divisor of num_heads = 4, got 3"),
        ({"num_kv_heads": 8}, "num_kv_heads: expected a divisor of num_heads = 4, got 8"),
        ({"dropout": 1.0}, "dropout: .* got 1.0"),
        ({"dropout": -0.1}, "dropout: .* got -0.1"),
        ({"dropout": float("nan")}, "dropout: .* got nan"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ({"norm_eps": -1e-6}, "norm_eps: expected positive"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerBackbone(**{**SMALL, **changes})


def test_too_long_sequences_are_refused() -> None:
    model = TransformerBackbone(**SMALL)
    assert model(tokens(1, 16)).shape == (1, 16, 13)
    with pytest.raises(ValueError, match="max_length: expected at most 16 positions, got 17; shorten"):
        model(tokens(1, 17))


@pytest.mark.parametrize("learned", [False, True])
def test_only_learned_positions_tell_equal_tokens_apart(learned):
    """Rotary scores depend on distance alone, so a sequence of one repeated token has no places."""
    torch.manual_seed(0)
    model = TransformerBackbone(
        5, hidden_size=16, intermediate_size=16, num_layers=2, num_heads=2, max_length=12, learned_positions=learned
    )
    hidden = model.hidden_states(torch.full((1, 9), 3))[0]
    assert torch.allclose(hidden, hidden[:1].expand_as(hidden), atol=1e-5) is not learned
    assert ("embed_positions.weight" in model.state_dict()) is learned

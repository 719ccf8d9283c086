"""Qwen2 weights as `transformers` saves them: the same logits here, and clear words about what does not fit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from puma_lightning import AutoregressiveLM, MaskedDiffusion, TransformerBackbone, hub
from puma_lightning.models.qwen2 import read_qwen2

V = 40
SHAPE = dict(
    hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, max_length=64,
    rope_theta=1000.0, norm_eps=1e-5, qkv_bias=True,
)  # fmt: skip


def write(folder, tied=False, shard="5GB", **changes):
    """A small random Qwen2 with weights of every kind, written by transformers; returns its model."""
    transformers = pytest.importorskip("transformers", reason="pip install 'puma_lightning[test]'")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rope_theta=1000.0, rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder, max_shard_size=shard)
    if changes:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return model


def causal_lm(tied=False, vocab_size=V, **changes):
    backbone = TransformerBackbone(vocab_size, causal=True, tie_embeddings=tied, **{**SHAPE, **changes})
    return AutoregressiveLM(backbone, mask_id=vocab_size - 1).eval()


def tokens(batch=3, length=17):
    return torch.randint(V - 1, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("tied", "shard"), [(False, "5GB"), (True, "5GB"), (False, "10KB")])
def test_the_logits_are_those_of_transformers(tmp_path, tied, shard):
    theirs = write(tmp_path, tied, shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "10KB")
    ours = causal_lm(tied)
    before = ours.backbone(tokens())
    ours.load_weights(str(tmp_path))
    with torch.no_grad():
        expected = theirs(tokens()).logits
        torch.testing.assert_close(ours.backbone(tokens()), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(before, expected, atol=0.1)


def test_a_diffusion_model_starts_from_the_same_weights_shifted(tmp_path):
    theirs = write(tmp_path)
    model = MaskedDiffusion(TransformerBackbone(V, **SHAPE), V - 1, shifted=True).eval()
    model.load_weights(str(tmp_path))
    model.backbone.causal = True
    for layer in model.backbone.layers:
        layer.self_attn.causal = True
    with torch.no_grad():
        expected = theirs(tokens()).logits[:, :-1, : V - 1]
        torch.testing.assert_close(model(tokens())[:, 1:, : V - 1], expected, atol=1e-4, rtol=1e-4)


def test_the_vocabulary_grows_for_the_mask_token_and_says_so(tmp_path, caplog):
    theirs = write(tmp_path)
    ours = causal_lm(vocab_size=V + 2)
    with caplog.at_level("INFO"):
        ours.load_weights(str(tmp_path))
    assert "grew from 40 to 42" in caplog.text
    with torch.no_grad():
        torch.testing.assert_close(ours.backbone(tokens())[..., :V], theirs(tokens()).logits, atol=1e-4, rtol=1e-4)
    embedding = ours.backbone.embed_tokens.weight
    torch.testing.assert_close(embedding[V], embedding[:V].mean(0))


def test_padding_is_cut_off_and_another_vocabulary_refused(tmp_path, caplog, monkeypatch):
    theirs = write(tmp_path)
    ours = causal_lm(vocab_size=V - 3)
    with caplog.at_level("INFO"):
        ours.load_weights(str(tmp_path))
    assert "left out 3 rows" in caplog.text
    with torch.no_grad():
        got, expected = ours.backbone(tokens().clamp_max(V - 4)), theirs(tokens().clamp_max(V - 4)).logits
        torch.testing.assert_close(got, expected[..., : V - 3], atol=1e-4, rtol=1e-4)
    monkeypatch.setattr("puma_lightning.training.weights.MAX_PADDING", 2)
    with pytest.raises(ValueError, match=r"rows for the 37 tokens.* got 40.*tokenizer"):
        causal_lm(vocab_size=V - 3).load_weights(str(tmp_path))


def test_a_vocabulary_does_not_grow_into_another_one(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match=r"rows for the 2,000 tokens.* or a mask token fewer, got 40"):
        causal_lm(vocab_size=2000).load_weights(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(num_heads=8, num_kv_heads=4),
            "num_heads: expected 4, .* got 8 in this model; set the backbone's num_heads to 4",
        ),
        (dict(rope_theta=10000.0), "rope_theta: expected 1000.0, .* got 10000.0"),
        (dict(norm_eps=1e-6), "norm_eps: expected 1e-05"),
        (dict(hidden_size=40), r"embed_tokens.weight is \(40, 32\) instead of \(40, 40\)"),
        (dict(num_layers=3), "layers.2.*is missing"),
        (dict(learned_positions=True), "embed_positions.weight is missing"),
        (dict(qkv_bias=False), "q_proj.bias is unknown"),
        (dict(tied=True), "one weight here and two different ones.*tie_embeddings"),
    ],
)
def test_a_backbone_of_another_form_is_told_the_first_mismatch(tmp_path, changes, message):
    write(tmp_path)
    with pytest.raises(ValueError, match=message):
        causal_lm(**changes).load_weights(str(tmp_path))


def test_an_unshifted_model_is_refused(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match=r"shifted` to true: an autoregressive model predicts position i\+1"):
        MaskedDiffusion(TransformerBackbone(V, **SHAPE), V - 1).load_weights(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model_type="llama"), "got 'llama'"),
        (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1000.0}), "got 'yarn'"),
        (dict(use_sliding_window=True), "use_sliding_window"),
    ],
)
def test_what_the_backbone_does_not_do_is_refused(tmp_path, changes, message):
    write(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        read_qwen2(str(tmp_path))


def test_damaged_and_missing_files(tmp_path):
    write(tmp_path / "whole")
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read as such"):
        read_qwen2(str(cut))
    weights.unlink()
    with pytest.raises(ValueError, match=r"model.safetensors: expected weights"):
        read_qwen2(str(cut))
    (cut / "config.json").write_text("{")
    with pytest.raises(ValueError, match="expected JSON"):
        read_qwen2(str(cut))
    (cut / "config.json").unlink()
    with pytest.raises(ValueError, match="expected the model's config"):
        read_qwen2(str(cut))


def test_half_precision_weights_are_read(tmp_path):
    write(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(path).items()}, path)
    ours = causal_lm()
    ours.load_weights(str(tmp_path))
    assert ours.backbone.embed_tokens.weight.dtype == torch.float32


def test_a_name_that_is_nothing():
    with pytest.raises(ValueError, match=r"expected a checkpoint, a folder .* got ./nowhere"):
        read_qwen2("./nowhere")


def test_a_hub_out_of_reach_says_what_to_pass_instead(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(hub, "_hub_answers", lambda: False)
    monkeypatch.setattr("puma_lightning.models.qwen2.snapshot_download", unreachable)
    with pytest.raises(
        ValueError,
        match=r"init_from: .*'Qwen/Qwen2-0.5B', and .*can't be reached \(ConnectionError.*give a local folder",
    ):
        read_qwen2("Qwen/Qwen2-0.5B")


def test_a_model_from_the_hub(tmp_path, monkeypatch):
    write(tmp_path)
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(hub, "_hub_answers", lambda: True)
    monkeypatch.setattr("puma_lightning.models.qwen2.snapshot_download", download)
    tensors, settings = read_qwen2("Qwen/Qwen2-0.5B")
    assert asked[0][0] == "Qwen/Qwen2-0.5B" and "config.json" in asked[0][1]
    assert settings == {"num_heads": 4, "num_kv_heads": 2, "rope_theta": 1000.0, "norm_eps": 1e-5}
    assert "layers.1.mlp.up_proj.weight" in tensors

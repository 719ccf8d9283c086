"""The published implementation (JaeyeonKim01/PUMA), from a checkout of it."""

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from puma_lightning.models import TransformerBackbone

# Its names for the parts of a layer; the rest of a parameter's name is ours.
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn.": "self_attn.",
    "mlp_norm": "post_attention_layernorm",
    "mlp.w1": "mlp.up_proj",
    "mlp.w2": "mlp.gate_proj",
    "mlp.w3": "mlp.down_proj",
}
NAMES = {"emb.weight": "embed_tokens.weight", "final_norm.weight": "norm.weight", "lm_head.weight": "lm_head.weight"}


def load(reference: Path, name: str) -> ModuleType:
    """One of its modules at the top of the checkout, such as ``progressive``."""
    path = reference / f"{name}.py"
    if not path.is_file():
        raise SystemExit(f"no {name}.py at {reference}: give a checkout of JaeyeonKim01/PUMA")
    spec = importlib.util.spec_from_file_location(f"published_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digest(reference: Path, name: str) -> str:
    return hashlib.sha256((reference / f"{name}.py").read_bytes()).hexdigest()


def backbone(reference: Path, ours: TransformerBackbone) -> nn.Module:
    """Its model with the sizes and the weights of one of ours; its rotary embedding pairs other channels."""
    sys.path.insert(0, str(reference))
    try:
        transformer = importlib.import_module("model.transformer")
    finally:
        sys.path.remove(str(reference))
    first = ours.layers[0]
    heads = ours.settings
    theirs: nn.Module = transformer.MDMTransformer(
        transformer.MDMConfig(
            vocab_size=ours.vocab_size,
            hidden_size=ours.embed_tokens.embedding_dim,
            intermediate_size=first.mlp.gate_proj.out_features,
            num_layers=len(ours.layers),
            num_attention_heads=int(heads["num_heads"]),
            num_kv_heads=int(heads["num_kv_heads"]),
            max_position=ours.max_length,
            tie_lm_head=ours.lm_head.weight is ours.embed_tokens.weight,
            bias_qkv=first.self_attn.q_proj.bias is not None,
        )
    )
    weights = ours.state_dict()
    with torch.no_grad():
        for name, parameter in theirs.state_dict().items():
            # With biases it has one more, after attention.
            parameter.copy_(weights[our_name(name)]) if our_name(name) in weights else parameter.zero_()
    return theirs.to(ours.lm_head.weight.device)


def our_name(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    _, index, rest = name.split(".", 2)
    for theirs, ours in LAYER_NAMES.items():
        if rest.startswith(theirs):
            return f"layers.{index}.{ours}{rest[len(theirs) :]}"
    raise SystemExit(f"the published model has a parameter {name} that ours has not: is this another version of it?")

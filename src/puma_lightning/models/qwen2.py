"""Weights of Hugging Face's Qwen2 and Qwen2.5 models, under the names of ``TransformerBackbone``."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from puma_lightning.hub import from_hub


def read_qwen2(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the weights of a Qwen2 model on the CPU.

    Args:
        name: A folder with ``config.json`` and safetensors files, or a model's name on the hub.

    Returns:
        The tensors, by the names of ``TransformerBackbone``'s state dict, and its ``settings``.

    Raises:
        ValueError: If there is no such model, the hub is out of reach, or it is no plain Qwen2.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = _download(name)
    config = _json(folder / "config.json", "the model's config")
    settings = _settings(config, name)
    tensors: dict[str, Tensor] = {}
    for file in _files(folder):
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file}: expected safetensors, got a file that cannot be read as such ({error}); fetch it again"
            ) from error
    tensors = {key.removeprefix("model."): tensor for key, tensor in tensors.items()}
    if config.get("tie_word_embeddings") and "embed_tokens.weight" in tensors:
        # The tied twin is left out of the file.
        tensors.setdefault("lm_head.weight", tensors["embed_tokens.weight"])
    return tensors, settings


def _download(name: str) -> Path:
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(
            "init_from: expected a checkpoint, a folder with config.json and model.safetensors, or a model's name on "
            f"the Hugging Face hub such as Qwen/Qwen2-0.5B, got {name}, where there is none of these; check the path"
        )
    with from_hub("init_from", name, "a local folder with its config.json and safetensors files"):
        return Path(
            snapshot_download(name, allow_patterns=["config.json", "*.safetensors", "*.safetensors.index.json"])
        )


def _files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model, which may be one or several."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_json(index, "the index of the weights")["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    files = [folder / name for name in names]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: expected weights, found no such file; save the model as safetensors there")
    return files


def _json(file: Path, what: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text())
        return content
    except FileNotFoundError:
        raise ValueError(f"{file}: expected {what}, found no such file; fetch it again") from None
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got: {error}; fetch it again") from error


def _settings(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Return what the shapes of the weights do not show; refuse what ``TransformerBackbone`` does not do."""
    rope: dict[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    for what, got, expected in (
        ("model_type", config.get("model_type"), "qwen2"),
        ("hidden_act", config.get("hidden_act", "silu"), "silu"),
        ("rope_type", rope_type, "default"),
        ("use_sliding_window", bool(config.get("use_sliding_window")), False),
    ):
        if got != expected:
            raise ValueError(
                f"{name}: expected {what} = {expected!r}, as plain Qwen2 models have, got {got!r}; use one of those"
            )
    return {
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config.get("num_key_value_heads", config["num_attention_heads"]),
        "rope_theta": float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
    }

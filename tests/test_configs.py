"""The configs that name the paper (arXiv 2602.10314) hold its numbers."""

import re
from pathlib import Path

import pytest

CONFIGS = Path(__file__).parents[1] / "configs"
METHODS = [path for path in sorted(CONFIGS.rglob("*.yaml")) if "model:" in path.read_text()]
K_GROWS = [[0, 12], *([60_000 + 30_000 * i, 15 + 3 * i] for i in range(10))]
K_GROWS_IN_BLOCKS = [[30_000 * i, 5 + 3 * i] for i in range(13)]


def load(config):
    return config["model"]["init_args"], config["data"]["init_args"], config["trainer"]


def assert_holds(got, expected):
    assert {name: got.get(name) for name in expected} == expected


def assert_optimised_as_in_the_paper(model, trainer):
    assert model["optimizer"]["class_path"] == "torch.optim.AdamW"
    assert_holds(model["optimizer"]["init_args"], {"lr": 3e-4, "weight_decay": 0.01, "fused": True})
    assert model["scheduler"]["class_path"] == "puma_lightning.WarmupCosine"
    assert_holds(model["scheduler"]["init_args"], {"warmup_steps": 1000, "total_steps": None, "min_ratio": 0.0})
    assert trainer["gradient_clip_val"] == 1.0


def averages(trainer):
    return [c["init_args"] for c in trainer["callbacks"] if c["class_path"].endswith("EMAWeightAveraging")]


def test_configs_say_nothing_twice():
    """What methods share is in parts; and every file says what it is in its first line."""
    files = sorted(CONFIGS.rglob("*.yaml"))
    assert sum(len(path.read_text().splitlines()) for path in files) <= 680
    assert all(path.read_text().startswith("# ") for path in files)
    named = {path.parent / part for path in METHODS for part in re.findall(r": (\w+\.yaml)$", path.read_text(), re.M)}
    assert named == set(files) - set(METHODS)


@pytest.mark.parametrize(
    "path", [path for path in METHODS if path.parent.name == "tinygsm"], ids=lambda path: path.stem
)
def test_tinygsm(path, parsed):
    model, data, trainer = load(parsed(path))
    sizes = {"hidden_size": 512, "num_layers": 14, "num_heads": 8, "intermediate_size": 1536}
    assert_holds(model["backbone"]["init_args"], {**sizes, "tie_embeddings": True, "max_length": 512})
    assert_holds(data, {"sequence_length": 512, "padding": "eos", "tokenizer": "Qwen/Qwen2-0.5B"})
    assert_optimised_as_in_the_paper(model, trainer)
    (average,) = averages(trainer)
    assert average["decay"] == 0.9999
    if "puma" in path.stem:
        assert K_GROWS[-1] == [330_000, 42] and K_GROWS_IN_BLOCKS[-1] == [360_000, 41]
        stages = K_GROWS_IN_BLOCKS if path.stem == "block_puma" else K_GROWS
        assert_holds(model["forward_process"]["init_args"], {"num_stages": stages, "threshold": 0.9})
    if "block" in path.stem:
        assert model["block_size"] == 256
        assert data["min_answer_length"] == 42  # room for the last K


@pytest.mark.parametrize("name", ["mdm", "puma"])
def test_sudoku(name, parsed):
    model, data, trainer = load(parsed(CONFIGS / "sudoku" / f"{name}.yaml"))
    sizes = {"hidden_size": 256, "num_layers": 8, "num_heads": 8, "intermediate_size": 768}
    assert_holds(model["backbone"]["init_args"], sizes)
    assert_holds(data, {"order": 9, "batch_size": 32})
    assert_optimised_as_in_the_paper(model, trainer)
    assert not averages(trainer)
    if name == "puma":
        process = {
            "num_stages": 8,
            "policy": {"class_path": "puma_lightning.Confidence"},
            "threshold": None,
            "pool": None,
        }
        assert model["forward_process"]["init_args"] == process

"""The configs that name the paper (arXiv 2602.10314) hold its numbers."""

from pathlib import Path

import pytest
import yaml

CONFIGS = Path(__file__).parents[1] / "configs"
K_GROWS = [[0, 12], *([60_000 + 30_000 * i, 15 + 3 * i] for i in range(10))]
K_GROWS_IN_BLOCKS = [[30_000 * i, 5 + 3 * i] for i in range(13)]


def load(path):
    config = yaml.safe_load(path.read_text())
    return config["model"]["init_args"], config["data"]["init_args"], config["trainer"]


def assert_holds(got, expected):
    assert {name: got.get(name) for name in expected} == expected


def assert_optimised_as_in_the_paper(model, trainer):
    assert model["optimizer"] == {
        "class_path": "torch.optim.AdamW",
        "init_args": {"lr": 3e-4, "weight_decay": 0.01, "fused": True},
    }
    assert model["scheduler"] == {"class_path": "WarmupCosine", "init_args": {"warmup_steps": 1000}}
    assert trainer["gradient_clip_val"] == 1.0


@pytest.mark.parametrize("path", sorted((CONFIGS / "tinygsm").glob("*.yaml")), ids=lambda path: path.stem)
def test_tinygsm(path):
    model, data, trainer = load(path)
    sizes = {"hidden_size": 512, "num_layers": 14, "num_heads": 8, "intermediate_size": 1536}
    assert_holds(model["backbone"]["init_args"], {**sizes, "tie_embeddings": True, "max_length": 512})
    assert_holds(data, {"sequence_length": 512, "padding": "eos", "tokenizer": "Qwen/Qwen2-0.5B"})
    assert_optimised_as_in_the_paper(model, trainer)
    (average,) = (c for c in trainer["callbacks"] if c["class_path"] == "EMAWeightAveraging")
    assert average["init_args"]["decay"] == 0.9999
    if "puma" in path.stem:
        assert K_GROWS[-1] == [330_000, 42] and K_GROWS_IN_BLOCKS[-1] == [360_000, 41]
        stages = K_GROWS_IN_BLOCKS if path.stem == "block_puma" else K_GROWS
        assert_holds(model["forward_process"]["init_args"], {"num_stages": stages, "threshold": 0.9})
    if "block" in path.stem:
        assert model["block_size"] == 256
        assert data["min_answer_length"] == 42  # room for the last K


@pytest.mark.parametrize("name", ["mdm", "puma"])
def test_sudoku(name):
    model, data, trainer = load(CONFIGS / "sudoku" / f"{name}.yaml")
    sizes = {"hidden_size": 256, "num_layers": 8, "num_heads": 8, "intermediate_size": 768}
    assert_holds(model["backbone"]["init_args"], sizes)
    assert_holds(data, {"order": 9, "batch_size": 32})
    assert_optimised_as_in_the_paper(model, trainer)
    assert not [c for c in trainer["callbacks"] if c["class_path"] == "EMAWeightAveraging"]
    if name == "puma":
        assert model["forward_process"]["init_args"] == {"num_stages": 8, "policy": "Confidence", "threshold": None}

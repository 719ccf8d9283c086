"""The benchmarks run, and the test that compares chains can tell alike from different."""

from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def published_chain(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("published_chain")


@pytest.fixture
def train_step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("train_step")


@pytest.fixture
def block(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("block")


def test_script_is_a_function_of_sequence_position_and_count(published_chain):
    setting = published_chain.Setting("", 12, (2, 5), 4)
    x0, prompt_mask = published_chain.sequences(np.array([7, 8, 7], np.uint64), setting)
    assert x0[0].equal(x0[2]) and prompt_mask[0].equal(prompt_mask[2]) and not x0[0].equal(x0[1])
    assert set(prompt_mask.sum(1).tolist()) <= {2, 5}
    log_probs = published_chain.scripted_log_probs(x0, torch.tensor([3, 3, 4]))
    assert log_probs.exp().sum(-1).allclose(torch.ones(3, 12))
    assert log_probs.isneginf().nonzero()[:, 2].unique().tolist() == [published_chain.MASK]
    assert not log_probs[0].equal(log_probs[2])


def test_comparison_of_chains_tells_alike_from_different(published_chain):
    rng = np.random.default_rng(0)

    def chains(shift: float):
        revealed = rng.integers(0, 5, (1500, 4)) + (rng.random((1500, 1)) < shift)
        number = np.arange(1500).repeat(4)
        cells = np.stack([number, 0 * number, np.tile(np.arange(4), 1500), revealed.ravel()], axis=1)
        return published_chain.Chains(cells, np.full(1500, 4))

    def p_value(one, other) -> float:
        return published_chain.compare(published_chain.occupancy(one, other), rng)["p"]

    alike = [p_value(chains(0), chains(0)) for _ in range(10)]
    assert min(alike) > 1e-3 and max(alike) > 0.2
    assert p_value(chains(0), chains(0.1)) < 1e-3


def test_train_step_measures_all_processes(train_step):
    shape = train_step.Shape(8, 16, 1, 2, False, 6, 8, 2, 4, 3)
    measured = train_step.measure(shape, rounds=2, warmup=1, accelerator="cpu", precision="32-true", label="tiny")
    results = measured["results"]
    assert list(results) == ["RandomMasking", "PUMA", "PUMA tau=0.9"]
    for result in results.values():
        assert 0 < result["step_ms"]["min"] <= result["step_ms"]["median"] <= result["step_ms"]["max"]
    assert set(results["RandomMasking"]["ratios_to_baseline"]["step"].values()) == {1.0}


def test_block_measures_both_sides_of_training_and_sampling(block):
    sizes = "--hidden_size 16 --num_layers 1 --num_heads 2 --vocab_size 32 --length 32 --num_blocks 2 4 --block_sizes 8"
    args = block.parser().parse_args([*sizes.split(), "--rounds", "2"])
    trained, sampled = block.train(args), block.generate(args)
    assert list(trained) == ["2", "4"] and list(sampled) == ["8"]
    for measured in (*trained.values(), *sampled.values()):
        assert measured["times_as_fast"]["cpu"]["of_medians"] > 0
    # 24 positions after the prompt of 8, two in each pass, and a pass to read each block but the last.
    assert sampled["8"]["forward_passes"] == 12 + 3

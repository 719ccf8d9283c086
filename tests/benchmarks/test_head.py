"""The benchmark of the output layer runs, and compares like with like."""

import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("head")


def test_both_sides_compute_the_same(head):
    measured = head.measure(head.Shape(3, 16, 0.5, 101, 8), rounds=2)
    assert max(measured["relative_difference"].values()) < 1e-5
    for side in ("ours", "textbook"):
        times = measured["seconds"][side]
        assert 0 < times["min"] <= times["median"] <= times["max"]


@pytest.mark.slow
def test_everything_is_reported(head, monkeypatch, tmp_path):
    out = tmp_path / "head.json"
    words = ["--length", "16", "--vocab-size", "101", "--hidden-size", "8", "--full-batch-size", "4", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / "head.py"), *words, "--threads", "1", "--out", str(out)])
    head.main()
    report = json.loads(out.read_text())
    for side in ("ours", "textbook"):
        assert report["peak_memory"][side]["total_gb"] > 0
    assert set(report["full_size"]) == {"batch_size", "ours"}
    assert str(tmp_path) not in out.read_text()

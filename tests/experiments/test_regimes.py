"""What the queue of forward processes says of values that are known."""

import importlib
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="module")
def made():
    """The modules of the scripts; their folder is not a package."""
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        yield {name: importlib.import_module(name) for name in ("regimes", "_curves", "_runs")}
    finally:
        sys.path.remove(str(EXPERIMENTS))


def points(made, run: str, ends: list[float], steps: int = 1000):
    """A straight line from 0 for each seed, of every measure."""
    return [
        made["_runs"].Point(run, seed, step, 1.0, measure, (-1 if measure == "val/loss" else 1) * end * step / steps)
        for seed, end in enumerate(ends)
        for step in (0, steps // 2, steps)
        for measure in made["regimes"].MEASURES
    ]


def test_a_run_that_climbs_twice_as_fast_is_twice_as_soon(made):
    """In every resample, as seeds are drawn in pairs: which are good hides nothing."""
    known = points(made, "stratified", [0.1, 0.4, 0.2]) + points(made, "puma", [0.2, 0.8, 0.4])
    found = made["regimes"].report(known, ["stratified", "puma"], 1000)["solved, 3 cells a pass"]["puma"]
    assert found["speed_up"] == pytest.approx(2, abs=0.01) and found["interval"] == pytest.approx([2, 2], abs=0.01)
    assert found["final_difference"]["difference"] == pytest.approx(0.7 / 3, abs=1e-3)
    assert found["seeds"] == [0, 1, 2]


def test_runs_that_are_not_whole_are_not_compared(made):
    known = points(made, "stratified", [0.5, 0.5]) + points(made, "puma", [0.5], steps=500)
    found = made["regimes"].report(known, ["stratified", "puma"], 1000)["solved, 1 cell a pass"]
    assert list(found) == ["stratified"]


def test_a_run_is_compared_with_the_one_of_the_same_data_and_batches(made):
    baseline_of = made["regimes"].baseline_of
    assert baseline_of("puma_t0.9_n300") == "stratified_n300" and baseline_of("pool_64b_t0.9_b8") == "stratified_b8"
    assert baseline_of("pool_64b_t0.9_k3") == "stratified"
    for _, entries in made["regimes"].SCALES.values():
        names = {name for entry in entries for name in entry.runs}
        assert {baseline_of(name) for name in names} <= names


def test_a_picture_is_drawn_of_what_is_known(made, tmp_path):
    known = points(made, "stratified", [0.5] * 3) + points(made, "puma", [0.2] * 3)
    found = made["regimes"].report(known, ["stratified", "puma"], 1000)
    made["regimes"].picture(found).savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_variance_over_windows_is_that_of_independent_steps_or_of_repeated_ones(made):
    """w times the variance of a mean over w: the same for all w if steps are independent, w times it if they repeat."""
    torch, mechanism = pytest.importorskip("torch"), importlib.import_module("mechanism")
    values = torch.randn(32 * 400, 3, generator=torch.Generator().manual_seed(0))
    independent = mechanism.over_windows(values)
    assert [independent[w] / 3 for w in (1, 8, 32)] == pytest.approx([1, 1, 1], abs=0.15)
    repeated = mechanism.over_windows(values[: 32 * 50].repeat_interleave(8, 0))
    assert repeated[8] / repeated[1] == pytest.approx(8, rel=0.02)

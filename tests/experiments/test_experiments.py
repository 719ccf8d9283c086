"""Experiments run what is missing and nothing else, and say of curves what is in them."""

import csv
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def script(name: str):
    @pytest.fixture
    def imported(monkeypatch: pytest.MonkeyPatch):
        monkeypatch.syspath_prepend(str(EXPERIMENTS))
        return import_module(name)

    return imported


curves, runs, figure5 = script("_curves"), script("_runs"), script("figure5")


# --- curves ---


def test_a_level_is_reached_between_two_validations(curves):
    curve = {100: 0.2, 200: 0.4, 300: 0.3, 400: 0.9}
    assert curves.first_reach(curve, 0.3) == pytest.approx(150)
    assert curves.first_reach(curve, 0.1) == 100
    assert curves.first_reach(curve, 0.6) == pytest.approx(350)
    assert curves.first_reach(curve, 0.95) is None


def line(slope: float, start: float = 0.0):
    return {step: start + slope * step for step in range(100, 1100, 100)}


def test_a_curve_twice_as_steep_is_there_twice_as_soon(curves):
    found = curves.speed_up([line(1.0)] * 3, [line(2.0)] * 3)
    assert found["speed_up"] == pytest.approx(2)
    assert found["interval"] == pytest.approx([2, 2])
    assert found["steps"] == {"baseline": 1000, "other": 500}
    assert found["never"] == 0
    assert not found["at_first_validation"]


def test_what_never_gets_there_and_a_baseline_that_gets_nowhere_have_no_speed_up(curves):
    assert curves.speed_up([line(1.0)] * 3, [line(0.5)] * 3)["speed_up"] is None
    nothing = curves.speed_up([line(0.0)] * 3, [line(1.0)] * 3)
    assert nothing["speed_up"] is None and nothing["interval"] is None
    assert curves.speed_up([line(1.0)] * 2, [line(2.0)] * 2)["interval"] is None


def test_the_interval_holds_what_seeds_differ_by_and_those_that_never_get_there(curves):
    """Three seeds, of which one is slow: a resample of slow ones alone never reaches the level."""
    found = curves.speed_up([line(1.0)] * 3, [line(2.0), line(1.6), line(0.5)])
    low, high = found["interval"]
    assert low == 0 and high == pytest.approx(2)
    assert 1 < found["speed_up"] < 2
    # Means below 1: three slow of three, or two slow and one of 1.6 (2.6 / 3) or 2 (3 / 3, which is there).
    assert found["never"] == pytest.approx((1 + 3) / 27, abs=0.03)


def test_the_mean_is_over_the_steps_that_all_seeds_have(curves):
    assert curves.mean([{1: 0.0, 2: 1.0, 3: 5.0}, {1: 1.0, 2: 2.0}]) == {1: 0.5, 2: 1.5}


# --- runs ---


class Fits:
    """In place of ``puma fit``: writes what a run leaves, or stops half-way."""

    def __init__(self, stop: bool = False) -> None:
        self.commands: list[list[str]] = []
        self.stop = stop

    def run(self, words, *, cwd, **_):
        self.commands.append(words)
        folder = Path(cwd) / "runs" / f"version_{len(list(Path(cwd).glob('runs/*')))}" / "checkpoints"
        folder.mkdir(parents=True)
        (folder / "last.ckpt").touch()
        return type("Done", (), {"returncode": int(self.stop)})


@pytest.fixture
def fits(runs, monkeypatch):
    fake = Fits()
    monkeypatch.setattr(runs.subprocess, "run", fake.run)
    return fake


def test_what_is_done_is_not_done_again_and_what_starts_from_a_run_comes_after_it(runs, fits, tmp_path):
    some = {"late": runs.Run("b", "b.yaml", ("--x", "1"), start="early"), "early": runs.Run("a", "a.yaml")}
    for _ in "twice":
        runs.train(some, [0, 1], tmp_path, 1, None, [])
    assert len(fits.commands) == 4
    assert [words[words.index("--config") + 1].rsplit("/", 1)[1] for words in fits.commands] == ["a.yaml"] * 2 + [
        "b.yaml"
    ] * 2
    for words, seed in zip(fits.commands[2:], (0, 1), strict=True):
        start = words[words.index("--model.init_args.init_from") + 1]
        assert start == str(tmp_path / f"early_{seed}/runs/version_0/checkpoints/last.ckpt")


def test_an_interrupted_run_is_resumed(runs, fits, tmp_path):
    fits.stop = True
    one = {"a": runs.Run("a", "a.yaml")}
    with pytest.raises(SystemExit, match=r"a, seed 0 failed, see .*log.txt"):
        runs.train(one, [0], tmp_path, 1, None, [])
    fits.stop = False
    runs.train(one, [0], tmp_path, 1, None, [])
    words = fits.commands[-1]
    assert words[words.index("--ckpt_path") + 1] == str(tmp_path / "a_0/runs/version_0/checkpoints/last.ckpt")
    assert "--ckpt_path" not in fits.commands[0]


def test_a_folder_with_other_settings_is_refused(runs, fits, tmp_path):
    one = {"a": runs.Run("a", "a.yaml")}
    runs.train(one, [0], tmp_path, 1, None, [])
    with pytest.raises(SystemExit, match="other settings"):
        runs.train(one, [0], tmp_path, 1, None, ["--trainer.max_steps", "7"])


def test_a_folder_is_refused_before_anything_is_trained(runs, fits, tmp_path):
    one = {"a": runs.Run("a", "a.yaml")}
    runs.train(one, [1], tmp_path, 1, None, [])
    with pytest.raises(SystemExit, match="other settings"):
        runs.train(one, [0, 1, 2], tmp_path, 1, None, ["--x", "1"])
    assert len(fits.commands) == 1


def test_files_are_found_from_the_folder_of_a_run(runs, fits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.csv", "b.csv"):
        Path(name).touch()
    flags = ["--data.train_file", "a.csv", "--data.val_file", "[a.csv, b.csv]", "--data.layout", "in_place"]
    runs.train({"a": runs.Run("a", "a.yaml")}, [0], tmp_path / "runs", 1, None, flags)
    a, b = tmp_path / "a.csv", tmp_path / "b.csv"
    words = fits.commands[0]
    assert words[words.index("--data.train_file") + 1] == str(a)
    assert words[words.index("--data.val_file") + 1] == f"[{a},{b}]"
    assert words[words.index("--data.layout") + 1] == "in_place"


@pytest.mark.slow
def test_figure5_runs_and_reports(figure5, monkeypatch, tmp_path, capsys):
    """Four steps of small models, and again nothing."""
    small = ["--data.num_train", "128", "--data.num_val", "16", "--data.num_test", "16", "--data.clues", "20"]
    small += ["--data.batch_size", "8", "--trainer.val_check_interval", "2", "--data.eval_batch_size", "16"]
    small += ["--model.init_args.backbone.init_args.hidden_size", "16", "--trainer.max_steps", "4"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "figure5"
    words = ["figure5.py", "--seeds", "0", "1", "--folder", str(tmp_path / "runs"), "--out", str(out), "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [*words, *small])
    monkeypatch.setitem(figure5.SCALES["cpu"], "puma_k3", figure5.SCALES["cpu"]["puma_k6"])
    figure5.main()
    started = time.perf_counter()
    figure5.main()
    assert time.perf_counter() - started < 10  # nothing is trained again
    rows = list(csv.DictReader(out.with_suffix(".csv").open()))
    assert {row["run"] for row in rows} == {"mdm", "puma_k6", "puma_k3"}
    assert {(row["seed"], row["step"]) for row in rows} == {(seed, step) for seed in "01" for step in "24"}
    assert {"val/solved/confidence_1", "val/loss", "chain/mismatch"} <= {row["metric"] for row in rows}
    assert all(float(row["seconds"]) >= 0 for row in rows)
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert "PUMA, K 6" in capsys.readouterr().out
    assert str(tmp_path) not in out.with_suffix(".json").read_text()

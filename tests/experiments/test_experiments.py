"""Experiments run what is missing and nothing else, and say of curves what is in them."""

import csv
import json
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from matplotlib.figure import Figure
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from puma_lightning import SudokuDataModule
from puma_lightning.cli import main

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def script(name: str):
    @pytest.fixture
    def imported(monkeypatch: pytest.MonkeyPatch):
        monkeypatch.syspath_prepend(str(EXPERIMENTS))
        return import_module(name)

    return imported


curves, runs, comparison = script("_curves"), script("_runs"), script("_comparison")
figure3, figure4, figure5 = script("figure3"), script("figure4"), script("figure5")
figure1, search, sudoku_9x9 = script("figure1"), script("search"), script("sudoku_9x9")


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
        time.sleep(0.1)
        folder = Path(cwd) / "runs" / f"version_{len(list(Path(cwd).glob('runs/*')))}" / "checkpoints"
        folder.mkdir(parents=True)
        (folder / "last.ckpt").touch()
        return type("Done", (), {"returncode": int(self.stop)})


@pytest.fixture
def fits(runs, monkeypatch, tmp_path):
    fake = Fits()
    monkeypatch.setattr(runs.subprocess, "run", fake.run)
    root = tmp_path / "root"
    (root / "experiments").mkdir(parents=True)
    for name in ("a.yaml", "b.yaml", "experiments/policies.yaml"):
        (root / name).write_text(name)
    monkeypatch.setattr(runs, "ROOT", root)
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


def test_what_starts_from_a_run_waits_for_it_however_many_go_at_a_time(runs, fits, tmp_path):
    """Also if that one waits for another itself."""
    some = {
        "judged": runs.Run("c", "b.yaml", start="late", command="validate"),
        "late": runs.Run("b", "b.yaml", start="early"),
        "early": runs.Run("a", "a.yaml"),
    }
    runs.train(some, [0, 1], tmp_path / "runs", 6, None, [])
    assert [words[3] for words in fits.commands] == ["fit"] * 4 + ["validate"] * 2
    starts = [words[-3] for words in fits.commands]  # before --trainer.enable_progress_bar false
    assert ["early" in start for start in starts] == [False] * 2 + [True] * 2 + [False] * 2


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


def test_what_another_process_does_is_waited_for(runs, fits, tmp_path):
    """Two experiments that share a run, at the same time: it is done once."""
    one = {"a": runs.Run("a", "a.yaml")}
    with ThreadPoolExecutor(2) as pool:
        for job in [pool.submit(runs.train, one, [0], tmp_path / "runs", 1, None, []) for _ in range(2)]:
            job.result()
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


def test_a_run_is_validated_at_the_end_of_another_with_a_second_config(runs, fits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    judged = runs.Run("b", "a.yaml", ("--config", "experiments/policies.yaml"), start="early", command="validate")
    runs.train({"judged": judged, "early": runs.Run("a", "a.yaml")}, [0], tmp_path, 1, None, [])
    words = fits.commands[1]
    assert words[3] == "validate"
    assert [Path(words[i + 1]) for i, word in enumerate(words) if word == "--config"] == [
        runs.ROOT / "a.yaml",
        runs.ROOT / "experiments/policies.yaml",
    ]
    assert words[words.index("--ckpt_path") + 1] == str(tmp_path / "early_0/runs/version_0/checkpoints/last.ckpt")
    assert "--model.init_args.init_from" not in words


def test_a_changed_config_is_another_setting_also_of_what_a_run_starts_from(runs, fits, tmp_path):
    one = {"a": runs.Run("a", "a.yaml", ("--config", "b.yaml"))}
    two = {"early": runs.Run("early", "b.yaml"), "late": runs.Run("late", "a.yaml", start="early")}
    runs.train(one, [0], tmp_path / "one", 1, None, [])
    runs.train(two, [0], tmp_path / "two", 1, None, [])
    (runs.ROOT / "b.yaml").write_text("other")
    with pytest.raises(SystemExit, match="a_0 holds a run with other settings"):
        runs.train(one, [0], tmp_path / "one", 1, None, [])
    # Whoever deletes and repeats what has changed must not be left with what was made from it.
    shutil.rmtree(tmp_path / "two/early_0")
    with pytest.raises(SystemExit, match="late_0 holds a run with other settings"):
        runs.train(two, [0], tmp_path / "two", 1, None, [])


def test_a_config_that_is_not_there_is_told(runs, fits, tmp_path):
    with pytest.raises(SystemExit, match=r"expected a config at .*none\.yaml"):
        runs.train({"a": runs.Run("a", "none.yaml")}, [0], tmp_path / "runs", 1, None, [])


def test_patterns_and_flags_with_equals_are_found_too(runs, fits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.csv").touch()
    flags = ["--data.train_file", "*.csv", "--data.val_file=a.csv", "--data.layout=in_place", "--x", "*.parquet"]
    runs.train({"a": runs.Run("a", "a.yaml")}, [0], tmp_path / "runs", 1, None, flags)
    words = fits.commands[0]
    assert words[words.index("--data.train_file") + 1] == str(tmp_path / "*.csv")
    assert f"--data.val_file={tmp_path / 'a.csv'}" in words
    assert {"--data.layout=in_place", "*.parquet"} <= set(words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seed_everything", "3"], "give --seeds"),
        (["--seed_everything=3"], "give --seeds"),
        (["--scale", "gpu"], "cpu"),
    ],
)
def test_what_makes_no_sense_is_refused(runs, monkeypatch, capsys, words, said):
    monkeypatch.setattr(sys, "argv", ["beyond.py", *words])
    with pytest.raises(SystemExit):
        runs.arguments(None, "beyond", "sudoku", ["cpu"])
    assert said in capsys.readouterr().err


class Logged:
    """A run as ``puma fit`` leaves it: what it logged, in one file for each attempt, and its last checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.attempts = 0

    def attempt(self, values: list[tuple[str, int, float, float]], global_step: int) -> None:
        """Metric, steps done, seconds since the attempt began, value."""
        target = self.folder / f"version_{self.attempts}"
        (target / "checkpoints").mkdir(parents=True)
        writer, began = EventFileWriter(str(target)), time.time()
        for metric, step, seconds, value in values:
            summary = summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag=metric, simple_value=value)])
            writer.add_event(event_pb2.Event(wall_time=began + seconds, step=step - 1, summary=summary))
        writer.close()
        (events,) = target.glob("events*")
        events.rename(target / f"events.out.tfevents.{self.attempts}.x")
        torch.save({"global_step": global_step}, target / "checkpoints" / "last.ckpt")
        (target / "config.yaml").write_text("{trainer: {max_steps: 40}}")
        self.attempts += 1


def test_the_seconds_of_a_resumed_run_are_those_it_took_up_to_there(runs, tmp_path):
    """Killed after step 40, resumed from a checkpoint of step 30, which took 60 seconds."""
    logged = Logged(tmp_path / "a_0")
    first = [("train/loss", n, 2.0 * n, 1.0) for n in (10, 20, 30, 40)]
    logged.attempt([*first, ("val/solved", 20, 41.0, 0.1)], 30)
    logged.attempt([("train/loss", 31, 5.0, 1.0), ("val/solved", 40, 30.0, 0.2)], 40)
    points = runs.collect({"a": runs.Run("a", "a.yaml")}, [0], tmp_path)
    assert [(p.step, p.value) for p in points] == [(20, pytest.approx(0.1)), (40, pytest.approx(0.2))]
    assert [p.seconds for p in points] == pytest.approx([41, 60 + 30], abs=1)


@pytest.mark.parametrize("there", [[], [("val/loss", 40, 81.0, 0.1)]], ids=["not at all", "in part"])
@pytest.mark.parametrize("saved", [20, 40])
def test_a_run_whose_end_was_not_validated_is_told(runs, tmp_path, there, saved):
    """It was killed while it validated for the last time and nothing was left to resume; or stopped politely before."""
    Logged(tmp_path / "a_0").attempt([("val/solved", 20, 41.0, 0.1), ("val/loss", 20, 41.0, 0.1), *there], saved)
    with pytest.raises(SystemExit, match=r"step 40 was not validated.*Delete the folder"):
        runs.collect({"a": runs.Run("a", "a.yaml")}, [0], tmp_path)


def test_a_validation_that_says_nothing_is_told(runs, tmp_path):
    """A process that is asked to stop ends as if all were well."""
    Logged(tmp_path / "a_0").attempt([], 0)
    with pytest.raises(SystemExit, match="not validated"):
        runs.collect({"a": runs.Run("a", "a.yaml", start="b", command="validate")}, [0], tmp_path)


# --- comparisons ---


def logged(runs, run, metric, values, seeds=(0, 1, 2)):
    """The same values of every seed, at steps 10, 20, ..."""
    return [runs.Point(run, s, 10 * i + 10, i, metric, v) for s in seeds for i, v in enumerate(values)]


def test_every_metric_of_a_measure_is_reported_of_the_runs_that_have_it(runs, comparison):
    points = logged(runs, "a", "val/solved/x", [0.2, 0.4]) + logged(runs, "b", "val/solved/x", [0.4, 0.6])
    points += logged(runs, "a", "val/solved/y", [0.1, 0.1]) + logged(runs, "a", "val/loss", [3.0, 2.0])
    asked = comparison.Comparison(
        {name: runs.Run(name, f"{name}.yaml") for name in "ab"}, (("a", "b"),), "val/solved/", (("val/loss", "steps"),)
    )
    found = comparison.report(points, asked)
    assert found["val/solved/x"]["final"] == {"a": [0.4] * 3, "b": [0.6] * 3}
    assert found["val/solved/x"]["speed_up"]["b over a"]["speed_up"] == 2
    assert found["val/solved/y"] == {"final": {"a": [0.1] * 3}, "speed_up": {}}
    assert list(found) == ["val/solved/x", "val/solved/y"]
    line = comparison.said(asked.runs["b"], found["val/solved/x"], "b")
    assert "60.0%" in line and "final value of a 2.0 times sooner" in line


def test_curves_are_drawn_of_what_was_fitted(runs, comparison):
    """Each of the first metric that begins as asked; not of what was validated afterwards."""
    points = logged(runs, "a", "val/right/one", [0.2, 0.4]) + logged(runs, "a_judged", "val/right/one", [0.9])
    points += logged(runs, "b", "val/right/two", [0.3, 0.5, 0.7])
    fitted = {name: runs.Run(name, f"{name}.yaml") for name in "ab"}
    judged = runs.Run("a", "a.yaml", start="a", command="validate")
    panels = (
        ("val/right/", "steps"),
        ("val/right/", "seconds"),
        ("val/right/two", "steps"),
        lambda axis, _: axis.plot([7]),
    )
    asked = comparison.Comparison({**fitted, "a_judged": judged}, (), "val/right/", panels)
    axes = [axis for axis in comparison.picture(points, asked).axes if axis.get_visible()]
    lines = [[(line.get_label(), list(line.get_xdata())) for line in axis.lines] for axis in axes]
    assert lines[0] == [("a", [10, 20]), ("b", [10, 20, 30])]
    assert lines[1] == [("a", [0, 1]), ("b", [0, 1, 2])]
    assert lines[2] == [("b", [10, 20, 30])]
    assert len(lines[3]) == 1
    assert axes[0].lines[1].get_color() == axes[2].lines[0].get_color()


def test_where_files_are_is_not_written_down(runs, comparison, tmp_path):
    flags = [
        "--data.train_file",
        "/here/a.csv",
        "--data.val_file=/here/b.csv",
        "[/here/a.csv, c.csv]",
        "there/*.csv",
        "3",
    ]
    args = runs.Arguments(seeds=[0], out=tmp_path / "found", flags=flags)
    comparison.write(args, {"a": runs.Run("a", "a.yaml")}, [], {}, {})
    written = json.loads((tmp_path / "found.json").read_text())["runs"]["a"]["flags"]
    assert written == ["--data.train_file", "a.csv", "--data.val_file=b.csv", "[a.csv, c.csv]", "*.csv", "3"]


def test_policies_are_drawn_of_the_first_set(runs, figure4):
    """Others, whose names have an ending, would be points of the same line."""
    points = [
        point
        for suffix, solved in (("", 0.8), ("/hard", 0.2))
        for metric, value in (("solved", solved), ("nfe", 26.0))
        for point in logged(runs, "a", f"val/{metric}/confidence_1{suffix}", [value])
    ]
    axis = Figure().subplots()
    figure4.against_nfe("a", "A")(axis, points)
    (line,) = axis.lines
    assert line.get_xydata().tolist() == [[26.0, pytest.approx(0.8)]]


def test_runs_of_different_lengths_are_not_compared(runs, comparison):
    points = logged(runs, "a", "val/solved/x", [0.2, 0.4]) + logged(runs, "b", "val/solved/x", [0.4])
    asked = comparison.Comparison(
        {name: runs.Run(name, f"{name}.yaml") for name in "ab"}, (("a", "b"),), "val/solved/", ()
    )
    with pytest.raises(SystemExit, match="different steps"):
        comparison.report(points, asked)


@pytest.mark.parametrize(
    "name", ["batch", "beyond", "blocks", "figure1", "figure3", "figure4", "figure5", "search", "sudoku_9x9"]
)
def test_every_config_of_an_experiment_is_there(name, monkeypatch):
    """And what a run starts from is a run of the same experiment."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    module = import_module(name)
    if hasattr(module, "comparison"):
        found = [module.comparison(scale).runs for scale in ("cpu", "gpu")]
    else:
        found = [module.CPU] if hasattr(module, "CPU") else list(module.RUNS.values())
    for some in found:
        for run in some.values():
            assert all(config.is_file() for config in configs(run))
            assert run.start is None or run.start in some


def configs(run) -> list[Path]:
    """Of a run, the first and those that follow it."""
    more = [value for flag, value in pairwise(run.flags) if flag == "--config"]
    return [EXPERIMENTS.parent / config for config in (run.config, *more)]


def test_every_row_of_the_search_is_a_pair_with_the_same_changes(search):
    """But for what only a chain has, so that the baseline is tuned as hard."""
    told = list(search.ROWS.values())
    assert {name for pair in told for name in pair} == set(search.CPU)
    for label, pair in search.ROWS.items():
        baseline, puma = (search.CPU[name] for name in pair)
        assert "mdm" in baseline.config
        assert "puma" in puma.config
        if label in search.BOTH:
            assert baseline.flags == puma.flags
        else:
            assert pair[0] == "mdm"


def test_orders_agree_with_themselves_and_not_with_their_reverse(figure3):
    prompt = torch.tensor([[True, False, False, False], [False, False, False, True]])
    order = torch.tensor([[-1, 0, 2, 1], [2, 1, 0, -1]])
    assert figure3.agreement(order, order, prompt) == pytest.approx(1, abs=1e-4)
    assert figure3.agreement(order, torch.where(prompt, order, 2 - order), prompt) == pytest.approx(-1, abs=1e-4)
    half = torch.stack([order[0], torch.where(prompt[1], order[1], 2 - order[1])])
    assert figure3.agreement(order, half, prompt) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("name", ["batch", "beyond", "blocks", "figure1", "figure4", "figure5", "sudoku_9x9"])
def test_panels_show_what_some_run_logs(name, monkeypatch):
    """The names of the metrics are those that the samplers and metrics of the configs make."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    module = import_module(name)
    if hasattr(module, "comparison"):
        asked = [module.comparison(scale) for scale in ("cpu", "gpu")]
    else:
        asked = list(module.SCALES.values())
    for comparison in asked:
        made = {"val/loss", "chain/mismatch", "chain/sequences"}
        for run in comparison.runs.values():
            config = import_module("_runs").read_config(configs(run)[-1])
            for callback in config["trainer"]["callbacks"]:
                if callback["class_path"] == "GenerationEvaluation":
                    made |= logged_names(callback["init_args"])
        for panel in comparison.panels:
            if isinstance(panel, tuple):
                assert any(metric.startswith(panel[0]) for metric in made), panel
        assert any(metric.startswith(comparison.measure) for metric in made)


@pytest.mark.slow
def test_a_model_of_text_is_judged_under_every_policy(figure1, monkeypatch, tmp_path, capsys):
    """What ``--scale gpu`` does at the end, with a small model of the word problems."""
    run = figure1.comparison("gpu").runs["puma_judged"]
    assert (run.command, run.start, run.flags) == ("validate", "puma", figure1.EVERY_POLICY)
    monkeypatch.chdir(tmp_path)
    small = [
        "--data.num_train",
        "64",
        "--data.num_val",
        "4",
        "--data.eval_batch_size",
        "4",
        "--data.cache_dir",
        "cache",
    ]
    small += ["--trainer.logger", "false", "--config", str(EXPERIMENTS.parent / run.flags[1])]
    main(["validate", "--config", str(EXPERIMENTS.parent / "configs/words/puma.yaml"), *small])
    said = capsys.readouterr().out
    for policy in ("confidence", "margin"):
        assert all(f"val/program_accuracy/{policy}_{number}" in said for number in (1, 2, 3))


def logged_names(evaluation: dict) -> set[str]:
    """``val/<metric>/<sampler>``, as the samplers call themselves."""
    names = set()
    for sampler in evaluation["samplers"]:
        arguments = sampler.get("init_args", sampler)
        if sampler.get("class_path") == "LeftToRightSampler":
            name = "left_to_right"
        else:
            within = arguments.get("within", arguments)
            name = "block_" * ("within" in arguments) + f"{within['policy'].lower()}_{within['tokens_per_step']}"
        for metric in evaluation["metrics"]:
            # A metric of several numbers adds their names to its own.
            names |= {f"val/{metric}/{name}", f"val/{metric}_accuracy/{name}"}
    return names


def test_what_is_judged_was_not_trained_on(tmp_path):
    """The built-in puzzles of the small configs, and those of figure 4's policies."""
    small = yaml.safe_load((EXPERIMENTS.parent / "configs/sudoku/small_data.yaml").read_text())["init_args"]
    judged = yaml.safe_load((EXPERIMENTS / "policies.yaml").read_text())["data"]["init_args"]
    small = {**small, "num_train": 300, "cache_dir": tmp_path}
    boards = []
    for arguments, sets in ((small, "fit"), ({**small, **judged}, "validate")):
        data = SudokuDataModule(**arguments)
        data.prepare_data()
        data.setup(sets)
        loader = data.train_dataloader() if sets == "fit" else data.val_dataloader()
        boards.append({tuple(row["input_ids"].tolist()) for row in loader.dataset})
    assert len(boards[1]) == judged["num_val"] == small["num_test"] + small["num_val"] - 1
    assert not boards[0] & boards[1]


def test_kept_checkpoints_are_found_by_their_step(figure3, tmp_path):
    for name in ("step=500", "step=1000", "last", "best"):
        (tmp_path / f"{name}.ckpt").touch()
    assert {step: path.stem for step, path in figure3.checkpoints(tmp_path).items()} == {
        500: "step=500",
        1000: "step=1000",
    }


SMALL = [
    *("--data.num_train", "128", "--data.num_test", "16", "--data.clues", "20", "--data.batch_size", "8"),
    *("--data.eval_batch_size", "16", "--trainer.val_check_interval", "2", "--trainer.max_steps", "4"),
    *("--model.init_args.backbone.init_args.hidden_size", "16", "--data.num_val", "16"),
]


@pytest.mark.slow
def test_figures_3_and_4_share_their_runs(figure3, figure4, monkeypatch, tmp_path, capsys):
    """Small ones, of one seed, under every policy and at every checkpoint."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kept = tuple(flag.replace("=500", "=2") for flag in figure4.KEPT["cpu"])
    monkeypatch.setitem(figure4.KEPT, "cpu", kept)
    small = {name: replace(figure4.RUNS["cpu"][name], flags=kept) for name in ("mdm", "puma_k6")}
    monkeypatch.setitem(figure4.RUNS, "cpu", small)
    words = ["figure.py", "--seeds", "0", "--folder", str(tmp_path / "runs"), "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(tmp_path / "figure3"), *SMALL])
    figure3.main()
    rows = list(csv.DictReader((tmp_path / "figure3.csv").open()))
    assert {(row["run"], row["step"]) for row in rows} == {(run, step) for run in ("mdm", "puma_k6") for step in "24"}
    last = [float(row["value"]) for row in rows if row["step"] == "4" and row["metric"] == "order/agreement"]
    assert last == [1.0, 1.0]
    assert (tmp_path / "figure3_orders.png").stat().st_size > 10_000
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(tmp_path / "figure4"), *SMALL])
    figure4.main(None, "figure4", "sudoku", {"cpu": figure4.comparison("cpu")})
    rows = list(csv.DictReader((tmp_path / "figure4.csv").open()))
    judged = {row["metric"] for row in rows if row["run"] == "puma_k6_judged"}
    assert {"val/solved/margin_6", "val/nfe/confidence_1_tau0.9"} <= judged
    assert len(list((tmp_path / "runs").iterdir())) == 6
    for name in ("figure3", "figure4"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert "rank correlation" in capsys.readouterr().out


@pytest.mark.slow
def test_figure5_runs_and_reports(figure5, monkeypatch, tmp_path, capsys):
    """Four steps of small models, and again nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "figure5"
    words = ["figure5.py", "--seeds", "0", "1", "--folder", str(tmp_path / "runs"), "--out", str(out), "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [*words, *SMALL])
    small_runs = {name: figure5.SCALES["cpu"].runs[name] for name in ("mdm", "puma_k6")}
    asked = replace(figure5.SCALES["cpu"], runs=small_runs, pairs=(("mdm", "puma_k6"),))
    figure5.main(None, "figure5", "sudoku", {"cpu": asked})
    started = time.perf_counter()
    figure5.main(None, "figure5", "sudoku", {"cpu": asked})
    assert time.perf_counter() - started < 10  # nothing is trained again
    rows = list(csv.DictReader(out.with_suffix(".csv").open()))
    assert {row["run"] for row in rows} == {"mdm", "puma_k6"}
    assert {(row["seed"], row["step"]) for row in rows} == {(seed, step) for seed in "01" for step in "24"}
    assert {"val/solved/confidence_1", "val/loss", "chain/mismatch"} <= {row["metric"] for row in rows}
    assert all(float(row["seconds"]) >= 0 for row in rows)
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert "PUMA, K 6" in capsys.readouterr().out
    assert str(tmp_path) not in out.with_suffix(".json").read_text()


@pytest.mark.slow
def test_sudoku_9x9_runs_and_reports(sudoku_9x9, monkeypatch, tmp_path):
    """Four steps of small models."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "sudoku_9x9"
    words = ["sudoku_9x9.py", "--seeds", "0", "--folder", str(tmp_path / "runs"), "--out", str(out), "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [*words, *SMALL, "--data.clues", "45"])
    sudoku_9x9.main(None, "sudoku_9x9", "sudoku_9x9", sudoku_9x9.SCALES)
    found = json.loads(out.with_suffix(".json").read_text())
    for sampler in ("confidence_1", "confidence_4"):
        assert set(found[f"val/solved/{sampler}"]["final"]) == {"mdm", "puma"}
    assert out.with_suffix(".png").stat().st_size > 10_000

import copy
import pickle

import pytest
import torch
from jsonargparse import ArgumentParser

from puma_lightning.metrics.programs import ProgramAccuracy

HEAD = "def simple_math_problem():\n    "
TEXTS = [HEAD + "return 72", HEAD + "return '$1,234'", HEAD + "return 3", "nothing", HEAD + "return 1 / 0",
         HEAD + "while True: pass"]  # fmt: skip
ANSWERS = ["72", "1,234", "4", "5", "6", "7"]
SHARES = {"accuracy": 2 / 6, "unparsable": 1 / 6, "crashed": 1 / 6, "timed_out": 1 / 6}


def values(metric: ProgramAccuracy) -> dict[str, float]:
    return {name: share.item() for name, share in metric.compute().items()}


def test_shares_over_batches_of_different_size() -> None:
    metric = ProgramAccuracy(timeout=0.5)
    metric.update(TEXTS[:2], ANSWERS[:2])
    metric.update(TEXTS[2:], ANSWERS[2:])
    metric.update([], [])
    assert values(metric) == pytest.approx(SHARES)
    metric.reset()
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert all(torch.isnan(share) for share in metric.compute().values())


def test_states_add_up_over_ranks() -> None:
    ranks = [ProgramAccuracy(timeout=0.5) for _ in range(2)]
    ranks[0].update(TEXTS[:1], ANSWERS[:1])
    ranks[1].update(TEXTS[1:], ANSWERS[1:])
    joined = ProgramAccuracy()
    for name, reduce in joined._reductions.items():
        setattr(joined, name, reduce(torch.stack([getattr(rank, name) for rank in ranks])))
    joined._update_count = 1
    assert values(joined) == pytest.approx(SHARES)


def test_rows() -> None:
    metric = ProgramAccuracy(timeout=0.5)
    rows = metric.judge(TEXTS, ANSWERS)
    assert [row["outcome"] for row in rows] == ["ok", "ok", "ok", "unparsable", "crashed", "timed_out"]
    assert [row["correct"] for row in rows] == [True, True, False, False, False, False]
    assert [row["program_result"] for row in rows] == [72, "$1,234", 3, None, None, None]
    assert [row["correct"] for row in metric.judge(TEXTS[:2], None)] == [None, None]
    assert metric.total == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.clone()])
def test_copies_work(copied) -> None:
    metric = ProgramAccuracy(timeout=1.5, workers=1)
    metric.update(TEXTS[:1], ANSWERS[:1])
    other = copied(metric)
    other.update(TEXTS[2:3], ANSWERS[2:3])
    assert other.timeout == 1.5
    assert values(other)["accuracy"] == 0.5 and values(metric)["accuracy"] == 1


def test_the_command_line_builds_it() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ProgramAccuracy, "metric")
    config = {
        "class_path": "puma_lightning.metrics.programs.ProgramAccuracy",
        "init_args": {"timeout": 3, "workers": 2},
    }
    metric = parser.instantiate_classes(parser.parse_object({"metric": config})).metric
    assert (metric.timeout, metric.memory_mb, metric.workers) == (3.0, 256, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": 0}, "timeout: expected more than 0 seconds, got 0"),
        ({"timeout": float("nan")}, "timeout: expected more than 0 seconds, got nan"),
        ({"timeout": float("inf")}, "timeout: expected more than 0 seconds.*got inf"),
        ({"memory_mb": 8}, "memory_mb: expected at least 64.*got 8"),
        ({"workers": 0}, "workers: expected at least 1 or null, got 0"),
    ],
)
def test_bad_arguments_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        ProgramAccuracy(**options)


def test_bad_answers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a number such as .* as answer 1, got 'many'; pass"):
        ProgramAccuracy().update(TEXTS[:2], ["1", "many"])
    with pytest.raises(ValueError, match="answers: expected one for each of 2 completions, got 1"):
        ProgramAccuracy().update(TEXTS[:2], ["1"])


def test_a_system_that_cannot_hold_programs_is_refused_when_the_metric_is_made(monkeypatch) -> None:
    monkeypatch.setattr("puma_lightning.programs.runner.platform.machine", lambda: "riscv64")
    with pytest.raises(ValueError, match=r"programs: expected Linux on x86_64.*riscv64"):
        ProgramAccuracy()
    assert ProgramAccuracy(unsafe_without_filter=True).unsafe_without_filter

"""Runs of an earlier version go on as that version would have gone on, to the last bit; see ``old_runs/make.py``."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from puma_lightning.cli import main

HERE = Path(__file__).parent / "old_runs"
SPEC = importlib.util.spec_from_file_location("make_old_runs", HERE / "make.py")
make = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make)


@pytest.mark.parametrize("name", make.RUNS)
def test_an_old_checkpoint_resumes_to_the_same_losses_and_weights(tmp_path, monkeypatch, name):
    expected = json.loads((HERE / name / "after.json").read_text())
    arguments = ["--config", str(HERE / name / "config.yaml"), "--ckpt_path", str(HERE / name / "saved.ckpt")]
    if name == "two_processes":  # the launcher starts the command line again
        ran = subprocess.run(
            [sys.executable, "-m", "puma_lightning", "fit", *arguments], cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
    else:
        monkeypatch.chdir(tmp_path)
        main(["fit", *arguments])
    (run,) = (tmp_path / "runs").rglob("version_0")
    losses = make.logged_losses(run)
    assert list(losses) == list(expected["losses"])
    if (torch.__version__.split("+")[0], torch.backends.cpu.get_cpu_capability()) == (
        expected["torch"],
        expected["cpu"],
    ):
        assert losses == expected["losses"]
        assert make.fingerprint(run / "checkpoints" / "last.ckpt") == expected["weights"]
    else:
        # Other kernels round otherwise, and a chain may come to another order in time; another torch may drop others.
        first = [str(step) for step in range(make.SAVED, make.SAVED + 5)]
        rel = 1e-3 if torch.__version__.split("+")[0] == expected["torch"] else 0.1
        assert [losses[step] for step in first] == pytest.approx([expected["losses"][s] for s in first], rel=rel)

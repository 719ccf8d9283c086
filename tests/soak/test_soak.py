"""A few trials of the soak, as its command line runs them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_killed_runs_are_the_ones_left_alone(tmp_path):
    """Every loss, every validation, the last weights, to the last bit; asked to end, they end in time."""
    command = [sys.executable, "-m", "tests.soak", "--minutes", "1", "--trials", "24", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    runs, stopped = (int(number) for number in re.findall(r"(\d+) (?:runs|times)", done.stdout)[:2])
    assert runs > 5 and stopped > runs / 2

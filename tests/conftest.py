"""Settings for all tests: one thread, so that sums have one order, and no advice about loaders."""

import contextlib
import io
import re
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import yaml

torch.set_num_threads(1)


def pytest_configure(config) -> None:
    """What Lightning advises for real runs says nothing about these."""
    for message in (
        ".*does not have many workers.*",
        ".*The number of training batches.*",
        ".*isinstance.treespec.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*was configured so validation will.*",
        ".*val_dataloader.*hook.*",
        ".*sync_dist=True.*",
        ".*enable_checkpointing.*",
    ):
        config.addinivalue_line("filterwarnings", f"ignore:{message}")


@pytest.fixture(scope="session")
def parsed():
    """From the path of a config to what the command line makes of it, with all defaults and all parts."""
    from puma_lightning.cli import main

    @lru_cache
    def text(path: Path) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
            main(["fit", "--config", str(path), "--print_config"])
        return printed.getvalue()

    return lambda path: yaml.safe_load(text(path))


@pytest.fixture
def refused(capsys):
    """Expect of the command line, run in process, that it ends with 1 and a sentence that a pattern is found in."""

    @contextlib.contextmanager
    def expected(pattern: str):
        with pytest.raises(SystemExit) as ended:
            yield
        said = capsys.readouterr().err
        assert ended.value.code == 1 and re.search(f"^puma: error: .*{pattern}", said, re.MULTILINE), said[-2000:]

    return expected

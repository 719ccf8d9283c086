"""The README tells the truth."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_your_own_data_is_at_most_twenty_lines_and_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = README.split("## Your own data")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)
    assert len(code.strip().splitlines()) <= 20
    exec(code.replace("max_steps=300", 'max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False'), {})


def test_every_file_it_names_exists():
    for path in re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r"configs/[\w/]+\.yaml", README):
        assert (Path(__file__).parents[1] / path).exists(), path

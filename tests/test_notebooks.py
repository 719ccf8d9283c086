"""The notebooks run from top to bottom."""

import ast
import importlib
import re
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
PROOF = "teacher and student: the same order, position by position"
EXACT_MATCH = re.compile(r"exact match on \d+ held-out lines: ([\d.]+)%")


def printed(notebook) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


# The first one is short; the others train models that are worth looking at.
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[] if path.stem == "01_the_chain" else pytest.mark.slow)
        for path in sorted(NOTEBOOKS.glob("*.ipynb"))
    ],
)
def test_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install 'puma_lightning[test]'")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install 'puma_lightning[test]'")
    import nbformat

    # The kernel is another process: it must find this package, and this many threads, by the environment.
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOKS.parent / "src"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # What a notebook reads from the user's home, it would read from an empty one.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    work = tmp_path / "work"
    work.mkdir()

    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []  # what is found below was printed now
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(work)}}
    )
    client.execute()  # raises CellExecutionError with the traceback of a cell that fails

    errors = [o for cell in notebook.cells for o in cell.get("outputs", []) if o.output_type == "error"]
    assert not errors
    assert not list(work.iterdir()), "the notebook left files behind"
    assert not (tmp_path / "cache" / "puma_lightning").exists(), "the notebook wrote to the user's cache"
    if path.stem == "01_the_chain":
        assert PROOF in printed(notebook)
    if path.stem == "02_your_own_data":
        (rate,) = EXACT_MATCH.findall(printed(notebook))
        assert float(rate) > 80


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_is_saved_executed_and_clean(path):
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert path.stat().st_size < 700_000
    if path.stem == "01_the_chain":
        assert PROOF in printed(notebook)


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_what_the_cells_import_is_there(path):
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    nodes = [node for cell in cells for node in ast.walk(ast.parse(cell))]
    imports = [(node.module, alias.name) for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert any(module == "puma_lightning" for module, _ in imports)
    for module, name in imports:
        if module.startswith("puma_lightning"):
            assert hasattr(importlib.import_module(module), name), f"{module} has no {name}"


def test_there_are_notebooks():
    assert (NOTEBOOKS / "01_the_chain.ipynb").is_file()

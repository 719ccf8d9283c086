"""The method stands on its own: torch alone, one step, and an example for everything that is public."""

import ast
import doctest
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import puma_lightning

SOURCES = Path(puma_lightning.__file__).parent
MODULES = [
    ".".join(("puma_lightning", *path.relative_to(SOURCES).with_suffix("").parts))
    for path in sorted((SOURCES / "chain").rglob("*.py"))
    if path.stem != "__init__"
]


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_has_an_example_that_runs(name):
    module = importlib.import_module(name)
    public = {
        key: value
        for key, value in vars(module).items()
        if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == name and key[0] != "_"
    }
    assert public
    assert [key for key, value in public.items() if ">>>" not in (value.__doc__ or "")] == []
    results = doctest.testmod(module)
    assert results.attempted and not results.failed


def test_the_method_imports_torch_alone():
    """No Lightning, no data, no files: it can be read, and used, without the rest."""
    code = f"""
import sys, types
package = types.ModuleType("puma_lightning")
package.__path__ = [{str(SOURCES)!r}]
sys.modules["puma_lightning"] = package
import importlib
for name in {MODULES}: importlib.import_module(name)
print([name for name in ("lightning", "datasets", "torchmetrics", "jsonargparse", "matplotlib") if name in sys.modules])
print(sorted(name for name in sys.modules if name.startswith("puma_lightning.") and name.count(".") == 1))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == [
        "[]",
        "['puma_lightning.chain', 'puma_lightning.graphs', 'puma_lightning.output']",
    ]


def calls(function: str) -> set[str]:
    """The files of the package in which a function or method of this name is called."""
    found = set()
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and function in (
                getattr(node.func, "id", None),
                getattr(node.func, "attr", None),
            ):
                found.add(str(path.relative_to(SOURCES)))
    return found


def test_nothing_but_the_step_reveals_by_scores():
    """Policy and threshold are put together in one place; ``reveal_at_random`` has no scores of its own."""
    assert calls("reveal") == {"chain/step.py", "chain/reveal.py"}


def test_teacher_and_student_take_the_same_step():
    """Whoever moves a chain by a policy does so by ``Unmasking.step``."""
    assert {"chain/teacher/puma.py", "chain/teacher/self_aligned.py", "chain/student/any_order.py"} <= calls("step")


def test_lightnings_insides_are_used_in_one_file():
    """Imports of private names, and private attributes of a Trainer or its loops."""
    found = set()
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            private = isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning")
            if private and any(alias.name[0] == "_" for alias in node.names):
                found.add(path.name)
            if isinstance(node, ast.Attribute) and node.attr in ("_data_source", "_should_accumulate", "_trainer"):
                found.add(path.name)
            if isinstance(node, ast.Attribute) and node.attr in ("batch_progress", "epoch_loop"):
                found.add(path.name)
    assert found == {"lightning_internals.py"}

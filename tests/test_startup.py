"""Nothing is imported at the start that nobody needs yet."""

import subprocess
import sys

import pytest

COUNT = "import sys; print(sum(name.split('.')[0] == 'transformers' for name in sys.modules))"


def say(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def test_the_package_does_not_import_transformers():
    """Lightning alone does, by way of torchmetrics."""
    pytest.importorskip("transformers")
    assert say(f"import puma_lightning; {COUNT}") == "0\n"


def test_metrics_that_need_it_get_it_when_they_are_used():
    """What they have imported is the real thing."""
    pytest.importorskip("transformers")
    code = "from torchmetrics.functional.text import bert; print(bert.AutoModel.from_pretrained.__self__.__name__)"
    assert say(f"import puma_lightning; {code}") == "AutoModel\n"


def test_a_torchmetrics_that_does_more_with_it_is_imported_as_usual(tmp_path):
    """The attempt leaves nothing behind."""
    for name, text in (
        ("transformers", "real = True"),
        ("torchmetrics", "from transformers import real\nif real is not True: raise ImportError('not the real one')"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    load = "import importlib.util as u; s = u.spec_from_file_location('startup', FILE); m = u.module_from_spec(s)"
    from puma_lightning import startup

    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {load.replace('FILE', repr(startup.__file__))}; "
    assert say(f"{code} s.loader.exec_module(m); import torchmetrics; print(torchmetrics.real)") == "True\n"

"""What every benchmark writes down besides its numbers: versions, the machine in words, the command line."""

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def environment(device: str = "cpu") -> dict[str, Any]:
    """Versions and hardware that the numbers depend on."""
    packages = {name: version(name) for name in ("lightning", "numpy")}
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **packages,
        "system": platform.system(),
        "device": device,
        "device_name": name,
        "torch_threads": torch.get_num_threads(),
    }


def command_line() -> str:
    """The command as it can be repeated elsewhere: no paths of this machine."""
    words = [word if not Path(word).is_absolute() else "PATH" for word in sys.argv[1:]]
    words = ["--reference" if word.startswith("--reference=") else word for word in words]
    for i, word in enumerate(words[:-1]):
        if word == "--reference":
            words[i + 1] = "PATH"
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")

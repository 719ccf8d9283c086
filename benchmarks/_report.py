"""What benchmarks write down: versions, the machine in words, the command line, the curves of finished runs."""

import csv
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml


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


def curves(folder: Path) -> dict[str, dict[int, float]]:
    """Every validation metric of a run by the optimizer step it was taken after."""
    found: dict[str, dict[int, float]] = {}
    for row in csv.DictReader((folder / "metrics.csv").open()):
        for name, value in row.items():
            if name.startswith("val/") and value:
                found.setdefault(name, {})[int(row["step"]) + 1] = float(value)
    return found


def settings(folder: Path) -> dict[str, object]:
    """What the run was, without the paths of the machine it ran on."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    data = config["data"]["init_args"]
    for name, value in data.items():
        if name.endswith("_file") and value:
            data[name] = [Path(path).name for path in ([value] if isinstance(value, str) else value)]
    data.pop("cache_dir", None)
    start = config["model"]["init_args"].get("init_from")
    if start and Path(start).is_absolute():
        config["model"]["init_args"]["init_from"] = Path(start).name
    keys = ("max_steps", "gradient_clip_val")
    trainer = {key: config["trainer"][key] for key in keys}
    return {"seed": config["seed_everything"], "model": config["model"], "data": data, "trainer": trainer}

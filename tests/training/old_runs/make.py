"""Make the runs in this folder: ``python tests/training/old_runs/make.py``, run by the version that they are to be of.

Each is a small run: its config as the command line saved it, its checkpoint after 20 of 50 optimizer steps, and what
the 30 steps after that gave, the losses and a hash of the last weights. A later version has to give the same to the
last bit. They were made by the last commit of version 0.1.0, and stay as they are.
"""

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

HERE = Path(__file__).parent
SAVED, STEPS = 20, 50
BACKBONE = {"hidden_size": 16, "intermediate_size": 32, "num_layers": 1, "num_heads": 2, "dropout": 0.1}
SUDOKU = {"order": 4, "clues": 6, "num_train": 100, "num_val": 8, "num_test": 8, "augment": 4}
WORDS = {"num_train": 400, "num_val": 8, "num_test": 8, "vocab_size": 600, "batch_size": 4}
FAST = {"optimizer": {"init_args": {"lr": 0.02}}, "scheduler": {"init_args": {"warmup_steps": 5}}}
AVERAGE = {"class_path": "EMAWeightAveraging", "init_args": {"decay": 0.9, "use_buffers": False}}


def chains(num_stages: Any, threshold: float | None) -> dict[str, Any]:
    """PUMA."""
    settings = {"num_stages": num_stages, "policy": "Confidence", "threshold": threshold}
    return {"forward_process": {"class_path": "ProgressiveUnmasking", "init_args": settings}}


# By name: the config, and what is other than there in the model, the data, the trainer and the callbacks.
RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], list[Any]]] = {
    "sudoku": (
        "quickstart", chains([[0, 4], [30, 6]], 0.3), {**SUDOKU, "batch_size": 8}, {"accumulate_grad_batches": 2}, []
    ),
    "two_processes": (
        "quickstart", chains(4, None), {**SUDOKU, "batch_size": 4}, {"devices": 2, "strategy": "ddp"}, []
    ),
    "block_curriculum": (
        "words/block_curriculum",
        {"block_size": [[0, 4], [10, 16], [30, 96]], **chains([[0, 2], [25, 4]], 0.05)}, WORDS, {}, [AVERAGE],
    ),
    "ar": ("words/ar", {}, WORDS, {}, []),
    "text_from_ar": ("words/puma_from_ar", {"init_from": "ar.ckpt", **chains(8, 0.05)}, WORDS, {}, []),
}  # fmt: skip


def logged_losses(folder: Path) -> dict[str, float]:
    """The training losses in a log directory, by optimizer step."""
    with (folder / "metrics.csv").open() as file:
        return {row["step"]: float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")}


def fingerprint(checkpoint: Path) -> str:
    """A hash of the weights in a checkpoint."""
    tensors = torch.load(checkpoint, weights_only=True)["state_dict"]
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def main() -> None:
    """Make them all."""
    root = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name, (config, model, data, trainer, callbacks) in RUNS.items():
            saving = {"every_n_train_steps": SAVED, "save_top_k": -1, "save_last": True, "filename": "{step}"}
            changes = {
                "model": {"init_args": {"backbone": {"init_args": BACKBONE}, **FAST, **model}},
                "data": {"init_args": {**data, "cache_dir": "cache"}},
                "trainer": {
                    "accelerator": "cpu", "max_steps": STEPS, "log_every_n_steps": 1, "val_check_interval": 1_000_000,
                    "logger": [{"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": name}}],
                    "callbacks": [{"class_path": "ModelCheckpoint", "init_args": saving}, *callbacks], **trainer,
                },
            }  # fmt: skip
            (work / "changes.yaml").write_text(yaml.safe_dump(changes))
            configs = ["--config", str(root / f"configs/{config}.yaml"), "--config", "changes.yaml"]
            subprocess.run(
                [sys.executable, "-m", "puma_lightning", "fit", *configs], cwd=work, check=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            )  # fmt: skip
            run = work / "runs" / name / "version_0"
            last = run / "checkpoints" / "last.ckpt"
            shutil.copy(last, work / f"{name}.ckpt")
            kept = HERE / name
            kept.mkdir(exist_ok=True)
            shutil.copy(run / "config.yaml", kept)
            shutil.copy(run / "checkpoints" / f"step={SAVED}.ckpt", kept / "saved.ckpt")
            after = {
                "torch": torch.__version__.split("+")[0],
                "cpu": torch.backends.cpu.get_cpu_capability(),
                "losses": {step: loss for step, loss in logged_losses(run).items() if int(step) >= SAVED},
                "weights": fingerprint(last),
            }
            (kept / "after.json").write_text(json.dumps(after, indent=1) + "\n")


if __name__ == "__main__":
    main()

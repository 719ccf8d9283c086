"""One run, in the process that calls ``train``; it writes down everything it computes, line by line."""

import hashlib
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from puma_lightning import graphs
from puma_lightning.callbacks import GenerationEvaluation
from puma_lightning.chain import policies
from puma_lightning.chain.student import BlockSampler, LeftToRightSampler, Sampler
from puma_lightning.chain.teacher import (
    ForwardProcess,
    MixedMasking,
    ProgressiveUnmasking,
    RandomMasking,
    SelfAlignedMasking,
)
from puma_lightning.data.batch import pad_collate
from puma_lightning.data.sudoku import SudokuDataModule
from puma_lightning.data.text import TextDataModule
from puma_lightning.metrics.sudoku import SudokuSolved
from puma_lightning.models import TransformerBackbone
from puma_lightning.modules import AutoregressiveLM, BlockDiffusion, MaskedDiffusion
from puma_lightning.training.optim import WarmupCosine
from tests.soak.configs import DATA, NUMBERED, Config
from tests.soak.dealt import Finished, Numbered
from tests.support import recorder

POISONED = "a gradient is NaN from here on"
LINES = [f"{a} and {b} are {a + b}" for a in range(12) for b in range(10)]


def prepare(shared: Path) -> None:
    """Make everything that runs share: a text, a tokenizer, the caches of all data."""
    shared.mkdir(parents=True, exist_ok=True)
    (shared / "lines.txt").write_text("\n".join(LINES))
    for data in DATA:
        for num_train in (47, 64, 90):
            datamodule({"data": data, "batch_size": 2, "workers": 0, "num_train": num_train}, shared).prepare_data()


def datamodule(config: Config, shared: Path) -> pl.LightningDataModule:
    """Make the DataModule of a run."""
    common: dict[str, Any] = {
        "batch_size": config["batch_size"],
        "num_workers": config["workers"],
        "num_train": config["num_train"],
        "num_val": 8,
        "num_test": 8,
        "cache_dir": str(shared / "cache"),
    }
    if config["data"].startswith("sudoku"):
        layout = "prompt_answer" if config["data"] == "sudoku sequence" else "in_place"
        return SudokuDataModule(order=4, layout=layout, augment=1, **common)
    if config["data"] == "ragged":
        return Ragged(config["batch_size"], config["workers"], config["num_train"])
    if config["data"] in NUMBERED:
        return Numbered(config["data"], config["batch_size"], config["workers"], config["num_train"])
    packed, streaming = config["data"] == "packed", config["data"] == "stream"
    if not packed:
        common["padding"] = config.get("padding", "first_eos")
    if streaming:
        number = common.pop("num_train")
        common |= {"streaming": True, "num_sequences": number, "shuffle_buffer": 20}
    file = str(shared / "lines.txt")
    return TextDataModule(train_file=file, vocab_size=270, sequence_length=16, packing=packed, **common)


class Ragged(pl.LightningDataModule):
    """A user's own: lines of different lengths, padded where they are collated, with the first two letters given."""

    vocab_size, mask_id = 129, 128

    def __init__(self, batch_size: int, workers: int, num_train: int) -> None:
        super().__init__()
        self.batch_size, self.workers, self.num_train = batch_size, workers, num_train

    def _loader(self, lines: list[str], shuffle: bool) -> DataLoader:
        examples = [{"input_ids": list(line.encode()), "prompt_mask": [True] * 2 + [False] * (len(line) - 2)}
                    for line in lines]  # fmt: skip
        return DataLoader(examples, self.batch_size, shuffle=shuffle, num_workers=self.workers, collate_fn=pad_collate)

    def train_dataloader(self) -> DataLoader:
        return self._loader(LINES[: self.num_train], shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader(LINES[-8:], shuffle=False)


def train(
    config: Config, folder: Path, shared: Path, ckpt: Path | None, rank: int = 0, poison: int | None = None
) -> None:
    """Run to the end; ``folder`` gets ``records.RANK.jsonl`` and checkpoints.

    Args:
        config: What runs.
        folder: Where.
        shared: What ``prepare`` has made.
        ckpt: What the run goes on from.
        rank: Of this process.
        poison: The batch whose gradients are NaN.
    """
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    pl.seed_everything(config["seed"], verbose=False)
    data = datamodule(config, shared)
    module = _module(config, data)
    record = Record(folder / f"records.{rank}.jsonl")
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=config["processes"],
        strategy="ddp" if config["processes"] > 1 else "auto",
        max_steps=config["max_steps"],
        max_epochs=config.get("max_epochs"),
        accumulate_grad_batches=1 if isinstance(config["accumulate"], dict) else config["accumulate"],
        gradient_clip_val=config["clip"],
        precision=config["precision"],
        val_check_interval=config["val_check_interval"],
        limit_train_batches=config["limit_train_batches"],
        overfit_batches=config["overfit_batches"],
        log_every_n_steps=config.get("steps_per_execution", 1),
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=CSVLogger(folder / "logs", name="", version=0, flush_logs_every_n_steps=7),
        callbacks=_callbacks(config, folder, record, rank),
    )
    if poison is not None and rank == 0:
        trainer.callbacks.append(Poison(poison, record))
    trainer.fit(module, datamodule=data, ckpt_path=ckpt)
    record.end(trainer, module)


def _module(config: Config, data: Any) -> pl.LightningModule:
    kind = config["kind"]
    backbone = TransformerBackbone(
        data.vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_layers=1,
        num_heads=2,
        max_length=32,
        dropout=config["dropout"],
        causal=kind == "left to right",
    )
    optimizer: Any = {
        "adamw": partial(torch.optim.AdamW, lr=0.01),
        "fused adamw": partial(torch.optim.AdamW, lr=0.01, fused=True),
        "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        "nesterov": partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    }[config["optimizer"]]
    common: dict[str, Any] = {
        "optimizer": optimizer,
        "scheduler": partial(WarmupCosine, warmup_steps=3) if config["scheduler"] else None,
        "steps_per_execution": config.get("steps_per_execution", 1),
        "captured": config.get("captured", False),
    }
    if common["captured"]:  # this process is one run's own
        graphs.can_record, graphs.record = lambda device: True, recorder.record
    if kind == "left to right":
        return AutoregressiveLM(backbone, data.mask_id, sampler=LeftToRightSampler(temperature=1.0), **common)
    common["forward_process"] = _process(**config["process"])
    within = Sampler(tokens_per_step=4, end_at_eos=config["end_at_eos"])
    if config["end_at_eos"]:
        common["eos_id"] = getattr(data, "eos_id", 0)
    if kind == "block":
        sampler = BlockSampler(within)
        return BlockDiffusion(backbone, data.mask_id, config["block_size"], sampler=sampler, **common)
    sampler = within
    return MaskedDiffusion(backbone, data.mask_id, sampler=sampler, shifted=config["shifted"], **common)


def _process(name: str, num_stages: Any = None, threshold: float | None = None, policy: str = "") -> ForwardProcess:
    if name == "random":
        return RandomMasking()
    if name == "self-aligned":
        return SelfAlignedMasking()
    kind = {"puma": ProgressiveUnmasking, "mixed": MixedMasking}[name]
    return kind(num_stages=num_stages, threshold=threshold, policy=getattr(policies, policy)())


def _callbacks(config: Config, folder: Path, record: "Record", rank: int) -> list[pl.Callback]:
    accumulate = config["accumulate"]
    callbacks: list[pl.Callback] = [record]
    if config["data"] in NUMBERED:
        callbacks.append(Finished(folder / f"finished.{rank}.jsonl", config.get("run", 0)))
    if isinstance(accumulate, dict):
        callbacks.append(GradientAccumulationScheduler({int(epoch): n for epoch, n in accumulate.items()}))
    if config["ema"]:
        callbacks.append(EMAWeightAveraging(use_buffers=False, decay=0.8))
    if config["generate"] and config["data"].startswith("sudoku"):
        callbacks.append(GenerationEvaluation({"solved": SudokuSolved()}, _samplers(config), num_examples=4))
    if config["save_best"]:
        callbacks.append(ModelCheckpoint(folder / "best", monitor="val/loss", save_top_k=1))
    callbacks.append(
        ModelCheckpoint(
            folder / "checkpoints",
            filename="{step}",
            every_n_train_steps=config["save_every"],
            save_top_k=1,
            save_last=True,
            save_on_exception=config["save_on_exception"],
        )
    )
    return callbacks


def _samplers(config: Config) -> list:
    if config["kind"] == "left to right":
        return [LeftToRightSampler()]
    within = Sampler(tokens_per_step=4, temperature=1.0)
    return [BlockSampler(within) if config["kind"] == "block" else within]


class Record(pl.Callback):
    """Appends a line for every batch, every validation and the end; a kill costs the last line at most."""

    every_step = True

    def __init__(self, path: Path) -> None:
        self._batches = 0
        self.silent = False
        # Written at once, by the system: what a killed process had computed is there.
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def _write(self, **line: Any) -> None:
        if self.silent:
            return
        os.write(self._file, (json.dumps(line) + "\n").encode())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._batches += 1
        index = trainer.fit_loop.epoch_loop.total_batch_idx
        state = digest(batch["input_ids"], batch["xt"])
        self._write(kind="batch", at=index, loss=outputs["loss"].item().hex(), state=state, step=trainer.global_step)

    def on_validation_end(self, trainer, pl_module) -> None:
        metrics = {
            name: value.item().hex() for name, value in sorted(trainer.callback_metrics.items()) if "val" in name
        }
        self._write(kind="validation", at=trainer.fit_loop.epoch_loop.total_batch_idx, metrics=metrics)

    def on_train_end(self, trainer, pl_module) -> None:
        if not self._batches:
            return  # the look at the first batch of a run that was over has filled it
        stream = pl_module.stream
        chains = digest(*(tensor for group in stream.groups if group for tensor in group.tensors().values()))
        self._write(kind="chains", at=0, chains=chains, steps=[stream.step, stream.snapshot()["position"]])

    def end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write down what the run led to, averaged weights in their place, unless it was over when it began."""
        if not self._batches:
            return
        self._write(kind="end", at=0, weights=digest(*module.state_dict().values()), step=trainer.global_step)


class Poison(pl.Callback):
    """Makes the gradients of one batch NaN, while its loss is finite; what comes after that is not recorded."""

    def __init__(self, batch: int, record: Record) -> None:
        self._batch, self._record = batch, record

    def on_train_start(self, trainer, pl_module) -> None:
        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            if trainer.fit_loop.epoch_loop.total_batch_idx < self._batch or self._record.silent:
                return gradient
            print(POISONED, flush=True)
            self._record.silent = True
            return gradient * torch.nan

        next(pl_module.parameters()).register_hook(spoil)


def contents(checkpoint: Any) -> tuple[str, str]:
    """Return a short hash of all that a checkpoint holds, and which of its numbers are not finite."""
    total, strange = hashlib.sha256(), []

    def add(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key, part in value.items():
                add(part, f"{name}/{key}")
        elif isinstance(value, list | tuple):
            for number, part in enumerate(value):
                add(part, f"{name}/{number}")
        elif isinstance(value, torch.Tensor):
            total.update(f"{name} {digest(value)} {value.dtype} {tuple(value.shape)}".encode())
            learned = "/gradients/" in name or name.startswith(
                ("/state_dict", "/optimizer_states", "/current_model_state")
            )
            if learned and value.is_floating_point() and not value.isfinite().all():
                strange.append(f"nan in {name}")
        else:
            total.update(f"{name} {value!r}".encode())

    add(checkpoint, "")
    return total.hexdigest(), ", ".join(strange)


def digest(*tensors: torch.Tensor) -> str:
    """Return a short hash of what tensors hold."""
    total = hashlib.sha256()
    for tensor in tensors:
        whole = tensor.detach().cpu().contiguous()
        total.update(whole.view(torch.uint8).numpy().tobytes() if whole.dim() else str(whole.item()).encode())
    return total.hexdigest()[:16]

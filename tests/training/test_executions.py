"""Several steps in an execution: what a run computes is what it computes without."""

import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from puma_lightning import MaskedDiffusion, ProgressiveUnmasking, WarmupCosine
from puma_lightning.callbacks import StepProgressBar
from puma_lightning.training.executions import Executions

V, MASK, LENGTH = 6, 5, 8
GENERATOR = torch.Generator().manual_seed(0)
ROWS = [{"input_ids": torch.randint(MASK, (LENGTH,), generator=GENERATOR)} for _ in range(46)]


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vocab_size = V
        self.embed, self.drop, self.out = nn.Embedding(V, 8), nn.Dropout(0.2), nn.Linear(8, V)

    def forward(self, xt: Tensor) -> Tensor:
        h = self.embed(xt)
        return self.out(self.drop(torch.tanh(h + h.mean(1, keepdim=True))))


class Seen(pl.Callback):
    """What callbacks see."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.steps: list[int] = []
        self.losses: list[Tensor] = []
        self.validations: dict[int, float] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.started.append(trainer.fit_loop.epoch_loop.total_batch_idx)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.steps.append(trainer.global_step)
        self.losses.append(pl_module.executions.losses)

    def on_validation_end(self, trainer, pl_module) -> None:
        self.validations[trainer.global_step] = trainer.callback_metrics["val/loss"].item()


class EveryStep(pl.Callback):
    """What one sees that says that it must see every step."""

    every_step = True

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(outputs["loss"].item())
        self.steps.append(trainer.global_step)


def run(
    folder: Path | None, steps: Any, accumulate: Any = 1, ema: bool = False, ckpt: Path | None = None, **options: Any
) -> tuple[EveryStep, Seen, dict[str, Tensor], pl.Trainer]:
    pl.seed_everything(0, verbose=False)
    every, seen = EveryStep(), Seen()
    callbacks: list[pl.Callback] = [every, seen]
    if isinstance(accumulate, dict):
        callbacks.append(GradientAccumulationScheduler(accumulate))
    if ema:
        callbacks.append(EMAWeightAveraging(use_buffers=False, decay=0.8))
    if folder is not None:
        callbacks += [LearningRateMonitor(), ModelCheckpoint(folder, "{step}", every_n_train_steps=6, save_top_k=-1)]
    module = MaskedDiffusion(
        Backbone(),
        MASK,
        ProgressiveUnmasking([[0, 2], [7, 4]]),
        optimizer=partial(torch.optim.AdamW, lr=0.01),
        scheduler=partial(WarmupCosine, warmup_steps=3),
        steps_per_execution=steps,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        accumulate_grad_batches=1 if isinstance(accumulate, dict) else accumulate,
        logger=False if folder is None else CSVLogger(folder, "", ""),
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=0.5,
        callbacks=callbacks,
        **{"max_steps": 24, "log_every_n_steps": 6, **options},
    )
    trainer.fit(module, DataLoader(ROWS, 4, shuffle=True), DataLoader(ROWS[:8], 4), ckpt_path=ckpt)
    return every, seen, module.state_dict(), trainer


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@settings(max_examples=15, deadline=None)
@given(
    steps=st.sampled_from([2, 3, 6]),
    accumulate=st.sampled_from([1, 2, {0: 1, 2: 3}]),
    ema=st.booleans(),
    options=st.sampled_from(
        [
            {},
            {"val_check_interval": 0.5},
            {"val_check_interval": 12, "check_val_every_n_epoch": None},
            {"max_steps": -1, "max_epochs": 3},
            {"overfit_batches": 7},
            {"limit_train_batches": 7},
            {"precision": "bf16-mixed", "limit_train_batches": 0.7},
        ]
    ),
)
def test_a_run_computes_the_same_to_the_last_bit(steps, accumulate, ema, options):
    """Every loss, every validation, the weights; and validations are where they were."""
    one, all_of_them, weights, trainer = run(None, 1, accumulate, ema, **options)
    several, seen, same_weights, other = run(None, steps, accumulate, ema, **options)
    assert several.losses == one.losses and several.steps == one.steps
    assert same(weights, same_weights)
    assert seen.validations == all_of_them.validations
    assert other.global_step == trainer.global_step and other.current_epoch == trainer.current_epoch
    assert len(seen.steps) < len(all_of_them.steps) and len(seen.steps) == len(seen.started)
    # Callbacks have a turn at every multiple; and the losses that they can have are all of them.
    assert set(range(steps, one.steps[-1] + 1, steps)) <= set(seen.steps)
    if isinstance(accumulate, int):  # what Lightning hands to callbacks is the part in an update
        assert torch.cat(seen.losses).tolist() == pytest.approx([accumulate * loss for loss in one.losses])


def test_logs_and_checkpoints_are_where_they_were(tmp_path):
    """At the same steps, with the same rates; the loss is the mean over an execution."""
    rows: dict[int, list[dict[str, str]]] = {}
    for steps in (1, 3):
        _, seen, *_ = run(tmp_path / str(steps), steps)
        lines = (tmp_path / str(steps) / "metrics.csv").read_text().splitlines()
        rows[steps] = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    means = {step - 1: losses.mean().item() for step, losses in zip(seen.steps, seen.losses, strict=True)}
    for one, three in zip(rows[1], rows[3], strict=True):
        logged = [row.pop("train/loss", "") for row in (one, three)]
        assert bool(logged[0]) == bool(logged[1])
        assert not logged[1] or float(logged[1]) == pytest.approx(means[int(three["step"])])
        assert one == three
    assert any(row.get("lr-AdamW") for row in rows[3])
    assert [path.name for path in sorted((tmp_path / "3").glob("*.ckpt"))] == [
        path.name for path in sorted((tmp_path / "1").glob("*.ckpt"))
    ]


@pytest.mark.parametrize(("first", "then"), [(1, 3), (3, 1), (2, 6), (6, 4), (3, 3)])
def test_a_run_goes_on_with_another_number(tmp_path, first, then):
    """From a checkpoint that any number wrote, to the last bit."""
    one, _, weights, _ = run(None, 1, accumulate=2)
    run(tmp_path, first, accumulate=2)
    options = {"log_every_n_steps": 12, "val_check_interval": None}
    (ckpt,) = tmp_path.glob("*step=6*.ckpt")
    rest, seen, end, _ = run(None, then, accumulate=2, ckpt=ckpt, **options)
    assert rest.losses == one.losses[-len(rest.losses) :] and rest.steps[0] == 6 + bool(len(rest.losses) == 36)
    assert same(weights, end)
    assert {step for step in range(12, 25) if step % then == 0} <= set(seen.steps)


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_that_ends_leaves_the_trainer_as_it_was(monkeypatch, fails):
    """Its loop is Lightning's own again, also after an exception."""
    trainers: list[pl.Trainer] = []

    def seen(self: Any, trainer: pl.Trainer, *_: Any) -> None:
        trainers.append(trainer)
        assert "advance" in vars(trainer.fit_loop.epoch_loop)
        if fails:
            raise RuntimeError("in between")

    monkeypatch.setattr(EveryStep, "on_train_batch_end", seen)
    with pytest.raises(RuntimeError, match="in between") if fails else nullcontext():
        run(None, 3)
    assert "advance" not in vars(trainers[0].fit_loop.epoch_loop)
    assert not {"teardown", "register_signal_handlers"} & vars(trainers[0]._signal_connector).keys()


@pytest.mark.parametrize(
    ("options", "name", "nearest"),
    [
        ({"max_steps": 25}, "max_steps", "give 24, or steps_per_execution 1 or auto"),
        ({"val_check_interval": 10, "check_val_every_n_epoch": None}, "val_check_interval", "give 12"),
        (
            {"val_check_interval": 10, "check_val_every_n_epoch": None, "accumulate": 2},
            "val_check_interval",
            "give 12, or steps_per_execution 1",
        ),
    ],
)
def test_an_interval_that_does_not_fit_is_refused(options, name, nearest):
    """Before training, with the nearest one that does."""
    with pytest.raises(ValueError, match=f"{name}: expected a multiple of steps_per_execution 6[ ,].*{nearest}"):
        run(None, 6, **options)


def test_intervals_of_logs_and_checkpoints_are_looked_at_too(tmp_path):
    """Where there are any."""
    with pytest.raises(ValueError, match=r"log_every_n_steps: .* got 50; give 48, or steps_per_execution 2 or"):
        run(tmp_path, 6, log_every_n_steps=50)
    with pytest.raises(ValueError, match=r"every_n_train_steps 6: .* got 6; give 8, or steps_per_execution 2 or"):
        run(tmp_path, 4, log_every_n_steps=4)
    run(None, 6, log_every_n_steps=50)


@pytest.mark.parametrize("steps", [1, 6])
def test_a_validation_may_be_due_at_a_time_and_a_bar_may_be_off(steps):
    """And where there is no validation, no interval of it matters."""
    run(None, steps, val_check_interval={"hours": 1}, check_val_every_n_epoch=None)
    run(None, steps, val_check_interval=10, limit_val_batches=0)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=6, logger=False, enable_checkpointing=False, enable_model_summary=False,
        callbacks=[StepProgressBar(refresh_rate=0)],
    )  # fmt: skip
    module = MaskedDiffusion(Backbone(), MASK, scheduler=None, steps_per_execution=steps)
    trainer.fit(module, DataLoader(ROWS, 4))


def test_a_callback_that_sees_every_step_may_log(monkeypatch):
    """Between turns as in them."""

    def log(self: Any, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        pl_module.log("step", float(trainer.global_step))

    monkeypatch.setattr(EveryStep, "on_train_batch_end", log)
    *_, trainer = run(None, 3)
    assert trainer.callback_metrics["step"] == 24


def test_a_trial_run_is_one_of_single_steps():
    """It has fewer steps than an execution."""
    _, seen, *_ = run(None, 6, fast_dev_run=3)
    assert seen.steps == [1, 2, 3]


@pytest.mark.parametrize("steps", [0, -1, 2.5, "all", True])
def test_a_number_is_needed(steps):
    """Or ``auto``."""
    with pytest.raises(ValueError, match="steps_per_execution: expected a number of optimizer steps, or auto"):
        Executions(steps)


@given(intervals=st.lists(st.integers(1, 300), min_size=1, max_size=3))
@settings(max_examples=30, deadline=None)
def test_auto_is_the_largest_number_that_fits(intervals):
    """At most 64."""
    savers: Any = [
        ModelCheckpoint(f"/{number}", every_n_train_steps=number, monitor=str(i)) for i, number in enumerate(intervals)
    ]
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, callbacks=savers)
    number = Executions("auto").number(trainer)
    common = math.gcd(*intervals)
    assert number <= 64 and common % number == 0
    assert not any(common % more == 0 for more in range(number + 1, 65))


def test_the_progress_bar_shows_every_execution(monkeypatch):
    """Also where its rate is no multiple of theirs."""
    shown: list[int] = []
    bar = StepProgressBar(refresh_rate=10)
    monkeypatch.setattr(
        StepProgressBar, "get_metrics", lambda self, trainer, module: shown.append(trainer.global_step) or {}
    )
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=24, logger=False, enable_checkpointing=False, enable_model_summary=False,
        callbacks=[bar], limit_val_batches=0,
    )  # fmt: skip
    module = MaskedDiffusion(Backbone(), MASK, scheduler=None, steps_per_execution=6)
    trainer.fit(module, DataLoader(ROWS, 4))
    # An epoch has 11 batches.
    assert set(shown) == {11, 22, 24}

"""Exact resume: a run that was stopped anywhere goes on as if it had not been."""

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, GradientAccumulationScheduler, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from puma_lightning.chain.teacher import ForwardProcess, ProgressiveUnmasking, RandomMasking
from puma_lightning.models import TransformerBackbone
from puma_lightning.modules import BlockDiffusion, MaskedDiffusion, generative
from puma_lightning.modules.generative import GenerativeModule
from puma_lightning.training.checkpoints import load_checkpoint
from puma_lightning.training.optim import WarmupCosine
from puma_lightning.training.resume import ExactResume

V = 6
MASK = V - 1


class Rows(Dataset):
    def __init__(self, size: int = 51, length: int = 10) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x0 = torch.randint(MASK, (size, 10), generator=generator)
        self.x0[:, :2] = torch.stack([torch.arange(size) // MASK % MASK, torch.arange(size) % MASK], dim=1)
        self.x0[:, 2] = torch.arange(size) // MASK**2
        self.x0 = self.x0[:, :length]
        self.prompt = torch.arange(length) < 3  # says which sequence it is

    def __len__(self) -> int:
        return len(self.x0)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.x0[i], "prompt_mask": self.prompt}


class Backbone(nn.Module):
    """Small, and with dropout."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.vocab_size = V
        self.embed = nn.Embedding(V, width)
        self.drop = nn.Dropout(0.2)
        self.out = nn.Linear(width, V)

    def forward(self, xt: Tensor) -> Tensor:
        h = self.embed(xt)
        return self.out(self.drop(torch.tanh(h + h.mean(1, keepdim=True) + h.roll(1, 1))))


class Record(pl.Callback):
    """What a run computed, by micro-batch; and checkpoints wherever they are asked for."""

    def __init__(self, folder: Path, save_at: tuple[int, ...], say: bool = False) -> None:
        self.folder, self.save_at, self.say = folder, save_at, say
        self.losses: dict[int, float] = {}
        self.sequences: dict[int, list[list[int]]] = {}
        self.validations: dict[int, float] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        index = trainer.fit_loop.epoch_loop.total_batch_idx
        assert index not in self.losses
        self.losses[index] = outputs["loss"].item()
        self.sequences[index] = batch["input_ids"][:, :3].tolist()
        if index in self.save_at:
            trainer.save_checkpoint(self.folder / f"batch{index}.ckpt")
        if self.say:
            print(index, flush=True)
            time.sleep(0.02)

    def on_validation_end(self, trainer, pl_module) -> None:
        if not trainer.sanity_checking:
            self.validations[trainer.fit_loop.epoch_loop.total_batch_idx] = trainer.callback_metrics["val/loss"].item()


def run(
    folder: Path,
    ckpt: str | Path | None = None,
    process: ForwardProcess | None = None,
    save_at: tuple[int, ...] = (),
    ema: bool = False,
    batch_size: int = 4,
    accumulate: int | dict[int, int] = 2,
    workers: int = 0,
    seed: int = 3,
    size: int = 51,
    length: int = 10,
    say: bool = False,
    init_from: str | None = None,
    callbacks: tuple[pl.Callback, ...] = (),
    backbone: nn.Module | None = None,
    block_size: Any = None,
    total_steps: int | None = None,
    **options: Any,
) -> tuple[Record, dict[str, Tensor], pl.Trainer]:
    """Train; 12 micro-batches an epoch, 20 optimizer steps in all."""
    torch.set_num_threads(1)
    pl.seed_everything(seed)
    record = Record(folder, save_at, say)
    kind: Any = MaskedDiffusion
    if block_size is not None:
        kind = partial(BlockDiffusion, block_size=block_size)
        backbone = TransformerBackbone(V, 16, 24, num_layers=2, num_heads=2, dropout=0.2)
    module = kind(
        backbone or Backbone(),
        MASK,
        forward_process=process or ProgressiveUnmasking(3),
        optimizer=partial(torch.optim.AdamW, lr=0.02),
        scheduler=partial(WarmupCosine, warmup_steps=3, total_steps=total_steps),
        init_from=init_from,
    )
    if isinstance(accumulate, dict):
        callbacks = (*callbacks, GradientAccumulationScheduler(dict(accumulate)))
    average = [EMAWeightAveraging(use_buffers=False, decay=0.8)] if ema else []
    trainer = pl.Trainer(
        **{
            "accelerator": "cpu",
            "max_steps": 20,
            "accumulate_grad_batches": 1 if isinstance(accumulate, dict) else accumulate,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            "callbacks": [*average, record, *callbacks],
            **options,
        }
    )
    rows = Rows(size, length)
    train = DataLoader(rows, batch_size=batch_size, shuffle=True, num_workers=workers)
    trainer.fit(module, train, DataLoader(rows, batch_size=16), ckpt_path=ckpt)
    return record, {name: value.clone() for name, value in module.state_dict().items()}, trainer


def stop_workers(trainer: pl.Trainer) -> None:
    """Now, not when the garbage collector comes: that waits five seconds for each."""
    trainer.lightning_module.stream.sequences._batches = iter(())


def assert_goes_on(full: tuple, resumed: tuple, after: int, validated: bool = False) -> None:
    """From the micro-batch after the checkpoint on, every loss and the final weights are bit-identical.

    So is every validation, with the one after that very micro-batch, unless the checkpoint was saved when it was over.
    """
    (whole, weights, _), (rest, resumed_weights, _) = full, resumed
    assert rest.losses == {index: loss for index, loss in whole.losses.items() if index > after}
    assert rest.validations == {i: loss for i, loss in whole.validations.items() if i >= after + validated}
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "puma": {},
    "ema": {"ema": True},
    "threshold": {"process": ProgressiveUnmasking(4, threshold=0.3)},
    "K grows": {"process": ProgressiveUnmasking([(0, 2), (7, 3), (13, 5)])},
    "baseline": {"process": RandomMasking()},
    "workers": {"workers": 2},
    "no accumulation": {"accumulate": 1},
    "accumulation 3": {"accumulate": 3, "ema": True, "process": ProgressiveUnmasking(3, threshold=0.5)},
    "validation inside": {"val_check_interval": 4, "ema": True},
    "half precision": {"precision": "bf16-mixed"},
    "double precision": {"precision": "64-true", "ema": True, "val_check_interval": 4},
    "accumulation by epoch": {"accumulate": {0: 1, 1: 3}},
    "blocks": {"block_size": 5, "process": ProgressiveUnmasking(3, threshold=0.5)},
    "curriculum": {
        "block_size": [(0, 2), (7, 5), (13, 10)],
        "process": ProgressiveUnmasking([(0, 2), (9, 4)]),
        "ema": True,
    },
    "a pool": {"process": ProgressiveUnmasking([(0, 2), (7, 3)], threshold=0.3, pool=16), "workers": 2},
    "a pool of all": {"process": ProgressiveUnmasking(3, pool="all"), "val_check_interval": 4, "ema": True},
    "a pool of all, in blocks": {
        "block_size": [(0, 2), (7, 5)],
        "process": ProgressiveUnmasking(3, threshold=0.3, pool="all"),
        "workers": 2,
    },
}


@pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, options):
    """After the first batch, mid-epoch, mid-accumulation, at an epoch's end, beside validation, after a K switch."""
    # 12 micro-batches an epoch: 11 is the last of the first. 3 and 7 precede a validation inside the epoch.
    accumulate = options.get("accumulate", 2)
    last = 35 if isinstance(accumulate, dict) else 20 * accumulate - 1
    points = (4, 11) if options.get("workers") else (0, 3, 4, 7, 10, 11, 12, 15, last - 3)
    full = run(tmp_path, save_at=points, **options)
    stop_workers(full[2])
    assert [*full[0].losses] == list(range(len(full[0].losses)))
    assert full[2].global_step == 20
    for point in points:
        resumed = run(tmp_path, tmp_path / f"batch{point}.ckpt", seed=99, **options)
        stop_workers(resumed[2])
        assert_goes_on(full, resumed, point)


@pytest.mark.parametrize("interval", [None, 4, 3])
def test_a_checkpoint_of_the_best_validation_resumes(tmp_path, interval):
    """Saved at validation's end, inside an epoch or an accumulation window or at an end, EMA weights swapped."""

    def saver(name: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / name, filename="{step}", monitor="val/loss", save_top_k=-1)

    options = {"ema": True, "val_check_interval": interval}
    full = run(tmp_path, callbacks=(saver("a"),), **options)
    saved = [path for path in (tmp_path / "a").glob("*.ckpt") if path.stem != "step=20"]  # that one is finished
    assert len(saved) >= 3
    for path in saved:
        resumed = run(tmp_path, path, seed=99, callbacks=(saver("b"),), **options)
        batches = torch.load(path, weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
        assert_goes_on(full, resumed, batches["ready"] - 1, validated=True)


def test_a_checkpoint_every_n_steps_resumes(tmp_path):
    """Lightning's own ModelCheckpoint, with step and epoch triggers and last.ckpt."""
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1, save_last=True)
    full = run(tmp_path, callbacks=(save,), ema=True)
    for step in (3, 6, 9, 12, 18):
        resumed = run(tmp_path, tmp_path / f"step={step}.ckpt", seed=99, ema=True)
        assert_goes_on(full, resumed, min(resumed[0].losses) - 1)
        assert resumed[2].global_step == 20


def test_a_resumed_run_can_be_resumed_and_prolonged(tmp_path):
    """Two stops are as good as none; max_epochs works as max_steps does; more steps can be asked for."""
    options = {"max_steps": -1, "max_epochs": 3}
    full = run(tmp_path, save_at=(5,), **options)
    first = run(tmp_path, tmp_path / "batch5.ckpt", save_at=(19,), **options)
    assert_goes_on(full, first, 5)
    assert_goes_on(full, run(tmp_path, tmp_path / "batch19.ckpt", **options), 19)
    assert run(tmp_path, tmp_path / "batch19.ckpt", max_steps=23)[2].global_step == 23


@pytest.mark.parametrize("last_of_first", [11, 23])
def test_a_run_counted_in_epochs_can_be_stopped_after_each(tmp_path, last_of_first):
    """From the last batch of an epoch, and again from within the next: no epoch is counted twice, or not at all."""
    options = {"max_steps": -1, "max_epochs": 3, "val_check_interval": None, "limit_val_batches": 0}
    full = run(tmp_path, **options)
    again = last_of_first + 4
    run(tmp_path, save_at=(last_of_first,), **options)
    first = run(tmp_path, tmp_path / f"batch{last_of_first}.ckpt", save_at=(again,), **options)
    assert_goes_on(full, first, last_of_first)
    assert_goes_on(full, run(tmp_path, tmp_path / f"batch{again}.ckpt", **options), again)


def test_a_checkpoint_from_between_two_epochs_goes_on_with_the_next(tmp_path):
    """As a run that has ended does when more steps are asked for."""
    full = run(tmp_path, total_steps=20)
    _, _, trainer = run(tmp_path, max_epochs=1, total_steps=20)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    resumed = run(tmp_path, tmp_path / "end.ckpt", total_steps=20, num_sanity_val_steps=0)
    assert_goes_on(full, resumed, 11, validated=True)
    assert resumed[2].current_epoch == full[2].current_epoch


def test_a_checkpoint_is_tensors_and_plain_types(tmp_path):
    """It loads without running any code in it, and gives the weights to a new module."""
    _, weights, trainer = run(tmp_path, save_at=(5,), max_steps=3)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert torch.load(tmp_path / "batch5.ckpt", weights_only=True)["puma_lightning"]["world_size"] == 1
    module = MaskedDiffusion.load_from_checkpoint(tmp_path / "end.ckpt", backbone=Backbone(), mask_id=MASK)
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())


# --- mistakes ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 50}, "training sequences: expected 51.* got 50.*init_from"),
        ({"length": 9}, "sequence length: expected 10.* got 9.*init_from"),
        ({"backbone": Backbone(width=16)}, r"embed.weight is \(6, 12\) instead of \(6, 16\)"),
    ],
    ids=["data", "length", "model"],
)
def test_resuming_another_run_is_refused(tmp_path, options, message):
    """The error says what was, what is, and what to do instead."""
    run(tmp_path, save_at=(3,), max_steps=2)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, tmp_path / "batch3.ckpt", **options)


@pytest.mark.parametrize(
    "options", [{"batch_size": 3}, {"batch_size": 6}, {"accumulate": 1}, {"accumulate": 3}], ids=str
)
def test_a_run_goes_on_with_another_batch_size_or_accumulation(tmp_path, options):
    """It says so, takes every other sequence of the pass once, and ends its epoch where the data end."""
    full = run(tmp_path, save_at=(7,), max_steps=-1, max_epochs=1)
    before = {tuple(row) for index in range(8) for row in full[0].sequences[index]}
    with pytest.warns(UserWarning, match="are dealt to .* not the same to the last bit"):
        rest, _, trainer = run(tmp_path, tmp_path / "batch7.ckpt", max_steps=-1, max_epochs=1, **options)
    batch_size, accumulate = options.get("batch_size", 4), options.get("accumulate", 2)
    batches = 51 // batch_size
    done = 8 * batches // 12 // accumulate * accumulate
    assert len(rest.losses) == batches - done
    held = [tuple(row) for rows in rest.sequences.values() for row in rows]
    new = [row for i, row in enumerate(held) if row not in held[:i] and row not in before]
    assert len(new) + len(before) <= 51 and len(new) > 0
    assert trainer.current_epoch == 1


def test_an_update_that_was_begun_is_ended_with_the_accumulation_it_was_begun_with(tmp_path):
    run(tmp_path, save_at=(4,), max_steps=4)
    with pytest.raises(ValueError, match=r"accumulate_grad_batches: expected 2.* got 3.*init_from"):
        run(tmp_path, tmp_path / "batch4.ckpt", accumulate=3)
    record = run(tmp_path, tmp_path / "batch4.ckpt", batch_size=3, max_steps=4)[0]
    assert [*record.losses] == [5, 6, 7]


def test_what_is_no_checkpoint_is_refused_by_name(tmp_path):
    """Missing, empty, text, cut short, another program's, another model's."""
    run(tmp_path, save_at=(3,), max_steps=2)
    good = (tmp_path / "batch3.ckpt").read_bytes()
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("hello")
    (tmp_path / "cut").write_bytes(good[: len(good) // 2])
    (tmp_path / "damaged").write_bytes(good[:500] + b"?" * 200 + good[700:])
    torch.save({"model": torch.zeros(2)}, tmp_path / "foreign")
    torch.save([1, 2], tmp_path / "list")
    torch.save(Backbone(), tmp_path / "module")
    for name in ("missing", "empty", "text", "cut", "damaged", "foreign", "list", "module"):
        with pytest.raises(ValueError, match=str(tmp_path / name)):
            load_checkpoint(tmp_path / name)
    with pytest.raises(ValueError, match=r"batch3.ckpt: expected weights of this model.*embed.weight"):
        run(tmp_path, init_from=str(tmp_path / "batch3.ckpt"), backbone=Backbone(width=16))


def test_init_from_takes_the_weights_and_nothing_else(tmp_path):
    """A new run from step 0 with its own chains, data order and learning rate."""
    run(tmp_path, save_at=(15,))
    path = tmp_path / "batch15.ckpt"
    with pytest.MonkeyPatch.context() as patch:
        start = {}
        patch.setattr(generative, "preflight", lambda module: start.update(copy_of(module), step=module.global_step))
        record, _, trainer = run(tmp_path, init_from=str(path), batch_size=5, accumulate=1, max_steps=4)
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert start.pop("step") == 0 and trainer.global_step == 4
    assert all(torch.equal(value, saved[name]) for name, value in start.items())
    assert [*record.losses] == [0, 1, 2, 3]


def test_a_resume_does_not_go_back_to_init_from(tmp_path):
    """init_from stays in the settings; the checkpoint being resumed wins."""
    run(tmp_path, save_at=(5,), max_steps=3)
    options = {"init_from": str(tmp_path / "batch5.ckpt")}
    full = run(tmp_path, save_at=(7,), **options)
    assert_goes_on(full, run(tmp_path, tmp_path / "batch7.ckpt", **options), 7)


def test_a_second_fit_does_not_go_back_to_init_from(tmp_path):
    """Training a little more goes on from where the first fit left the module."""
    run(tmp_path, save_at=(5,), max_steps=3)
    _, trained, trainer = run(tmp_path, init_from=str(tmp_path / "batch5.ckpt"), max_steps=4)
    start = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generative, "preflight", lambda module: start.update(copy_of(module)))
        again = pl.Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False)
        again.fit(trainer.lightning_module, DataLoader(Rows(), batch_size=4))
    assert all(torch.equal(value, trained[name]) for name, value in start.items())


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_judging_starts_from_init_from_too_unless_there_is_something_better(tmp_path, command):
    """A checkpoint given to the trainer, or weights that were loaded before; its file need not be there then."""
    run(tmp_path, save_at=(5, 15))
    start, later = (torch.load(tmp_path / f"batch{n}.ckpt", weights_only=True)["state_dict"] for n in (5, 15))

    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_model_summary=False, enable_progress_bar=False)

    def judged(ckpt_path: str | None = None, loaded: bool = False) -> dict[str, Tensor]:
        module = MaskedDiffusion(Backbone(), MASK, init_from=str(tmp_path / "batch5.ckpt"), scheduler=None)
        if loaded:
            module.load_state_dict(later)
        getattr(trainer, command)(module, DataLoader(Rows(), batch_size=16), ckpt_path=ckpt_path)
        return module.state_dict()

    # With one trainer, which keeps the path of the checkpoint before.
    assert_same(judged(), start)
    (tmp_path / "batch5.ckpt").rename(tmp_path / "elsewhere.ckpt")
    assert_same(judged(str(tmp_path / "batch15.ckpt")), later)
    assert_same(judged(loaded=True), later)
    (tmp_path / "elsewhere.ckpt").rename(tmp_path / "batch5.ckpt")
    assert_same(judged(), start)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_weights_that_were_loaded_are_trained_on_whatever_init_from_says(tmp_path):
    """As ``load_from_checkpoint`` leaves them."""
    run(tmp_path, save_at=(5, 15))
    later = torch.load(tmp_path / "batch15.ckpt", weights_only=True)["state_dict"]
    module = MaskedDiffusion(Backbone(), MASK, init_from=str(tmp_path / "batch5.ckpt"), scheduler=None)
    module.load_state_dict(later)
    start = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generative, "preflight", lambda module: start.update(copy_of(module)))
        again = pl.Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False)
        again.fit(module, DataLoader(Rows(), batch_size=4))
    assert all(torch.equal(value, later[name]) for name, value in start.items())


def copy_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_an_update_that_several_processes_began_is_ended_by_others_as_theirs_would_have_been():
    """It is made of the mean over the processes, whatever their number."""
    grads = [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 6.0])}]
    resume = ExactResume()
    resume._waiting = [{"gradients": each} for each in grads]
    assert [resume._waiting_gradients(rank, 2) for rank in (0, 1)] == grads
    for ranks in (1, 3):
        for rank in range(ranks):
            assert resume._waiting_gradients(rank, ranks)["w"].tolist() == [2.0, 4.0]
    resume._waiting = [{"gradients": None}, {"gradients": None}]
    assert resume._waiting_gradients(0, 1) is None


# --- a killed process, and two processes ---

SCRIPT = """
import importlib.util, sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("runs", {file!r})
runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runs)
runs.{function}(Path({folder!r}))
"""


def script(folder: Path, function: str) -> list[str]:
    path = folder / f"{function}.py"
    path.write_text(SCRIPT.format(file=__file__, folder=str(folder), function=function))
    return [sys.executable, "-W", "ignore", str(path)]


def slow_run(folder: Path) -> None:
    save = ModelCheckpoint(folder, every_n_train_steps=2, save_last=True)
    run(folder, ema=True, say=True, callbacks=(save,))


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path):
    """SIGKILL gives no chance to clean up; last.ckpt is enough."""
    process = subprocess.Popen(script(tmp_path, "slow_run"), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.strip() == "17":
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    full = run(tmp_path / "full", ema=True)
    resumed = run(tmp_path, tmp_path / "last.ckpt", ema=True)
    assert 0 < min(resumed[0].losses) <= 18
    assert_goes_on(full, resumed, min(resumed[0].losses) - 1)


def two_processes(folder: Path, **more: Any) -> None:
    """Train to the end, then again from two checkpoints, on two ranks; each writes down what it saw."""
    process = ProgressiveUnmasking(3, threshold=0.3)
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp", "process": process, "max_steps": 12, **more}
    full = run(folder, save_at=(4, 13), **options)
    seen = {"losses": [*full[0].losses.values()], "sequences": [*full[0].sequences.values()]}
    seen["weights"] = {name: weight.tolist() for name, weight in full[1].items()}
    seen["lengths"] = [full[2].global_step, full[2].num_training_batches]
    for point in (4, 13):
        assert_goes_on(full, run(folder, folder / f"batch{point}.ckpt", **options), point)
    (folder / f"rank{full[2].global_rank}.json").write_text(json.dumps(seen))


def two_processes_in_blocks(folder: Path) -> None:
    """The blocks of a sequence end at different times, and other ones on another rank."""
    two_processes(folder, block_size=[(0, 2), (5, 5)])


def two_processes_with_pools(folder: Path) -> None:
    """Each has a chain for every sequence of its share."""
    two_processes(folder, process=ProgressiveUnmasking(3, threshold=0.3, pool="all"))


def two_processes_of_a_large_vocabulary(folder: Path) -> None:
    """The output layer is not called as a module then: its gradients must be averaged all the same."""
    GenerativeModule.large_vocabulary = 1
    two_processes(folder, backbone=TransformerBackbone(V, 16, 24, num_layers=2, num_heads=2, dropout=0.2))


class BadOnOne(Backbone):
    """NaN on the second process, from the fourth batch on."""

    def forward(self, xt: Tensor) -> Tensor:
        self.batches = getattr(self, "batches", 0) + self.training
        bad = self.batches > 3 and os.environ.get("LOCAL_RANK") == "1"
        return super().forward(xt) * (float("nan") if bad else 1.0)


def one_of_two_turns_bad(folder: Path) -> None:
    with pytest.raises(ValueError, match="not finite"):
        run(folder, devices=2, strategy="ddp", max_steps=12, backbone=BadOnOne())
    (folder / f"rank{os.environ.get('LOCAL_RANK', '0')}.json").write_text("{}")


def on_two_ranks(folder: Path, function: str) -> tuple[dict[str, Any], dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PL_", "LOCAL_RANK"))}
    done = subprocess.run(
        script(folder, function), capture_output=True, text=True, timeout=240, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return tuple(json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1))


@pytest.mark.slow
def test_two_processes_of_a_block_model(tmp_path):
    """Same number of steps, other sequences, bit-identical resume across a switch of the block size."""
    a, b = on_two_ranks(tmp_path, "two_processes_in_blocks")
    assert a["lengths"] == b["lengths"] == [12, 51 // 8]
    assert len(a["losses"]) == len(b["losses"]) and a["losses"] != b["losses"]
    held = [set(map(tuple, itertools.chain(*rank["sequences"][:6]))) for rank in (a, b)]
    assert held[0].isdisjoint(held[1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the checkpoint of")
def test_two_processes_with_a_pool_of_all(tmp_path):
    """Each goes through its own share again and again; one process goes on with the chains of both."""
    a, b = on_two_ranks(tmp_path, "two_processes_with_pools")
    assert a["losses"] != b["losses"] and a["weights"] == b["weights"]
    held = [set(map(tuple, itertools.chain(*rank["sequences"]))) for rank in (a, b)]
    assert held[0].isdisjoint(held[1]) and [len(each) for each in held] == [26, 25]
    process = ProgressiveUnmasking(3, threshold=0.3, pool="all")
    _, _, trainer = run(tmp_path, tmp_path / "batch4.ckpt", process=process, max_steps=12)
    assert trainer.global_step == 12


@pytest.mark.slow
def test_two_processes_stop_together(tmp_path):
    """The one whose loss is good is told, and does not wait for the other."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PL_", "LOCAL_RANK"))}
    subprocess.run(script(tmp_path, "one_of_two_turns_bad"), timeout=120, env=environment, check=True)
    assert (tmp_path / "rank0.json").exists()


@pytest.mark.slow
def test_two_processes_of_a_large_vocabulary(tmp_path):
    a, b = on_two_ranks(tmp_path, "two_processes_of_a_large_vocabulary")
    assert a["lengths"] == b["lengths"] == [12, 51 // 8]
    assert a["losses"] != b["losses"] and a["weights"] == b["weights"]


def test_two_processes(tmp_path):
    """Same number of steps, disjoint sequences, bit-identical resume; and one process goes on from their checkpoint."""
    a, b = on_two_ranks(tmp_path, "two_processes")
    assert a["lengths"] == b["lengths"] == [12, 51 // 8]
    assert len(a["losses"]) == len(b["losses"]) and a["losses"] != b["losses"]

    first_pass = [set(map(tuple, itertools.chain(*rank["sequences"][:12]))) for rank in (a, b)]
    assert all(len(held) > 8 for held in first_pass)
    assert first_pass[0].isdisjoint(first_pass[1])

    with pytest.warns(UserWarning, match=r"checkpoint of 2 process\(es\) x 2 x 4 .* goes on on 1 x 2 x 4"):
        record, _, trainer = run(tmp_path, tmp_path / "batch4.ckpt", max_steps=12)
    assert trainer.global_step == 12
    taken = {tuple(row) for rank in (a, b) for rows in rank["sequences"][:5] for row in rows}
    began = {tuple(row) for rows in [*record.sequences.values()][:2] for row in rows}
    later = [tuple(row) for rows in [*record.sequences.values()][2:] for row in rows]
    new = [row for i, row in enumerate(later) if row not in later[:i] and row not in began]
    assert len(new) > 12 and taken.isdisjoint(new)
    run(tmp_path, init_from=str(tmp_path / "batch4.ckpt"), max_steps=1)


# --- points that are easy to get wrong ---


def test_resume_inside_an_accumulation_window_of_a_run_of_epochs(tmp_path):
    """max_epochs instead of max_steps: half the gradient of the first update must not be lost."""
    options = {"max_steps": -1, "max_epochs": 2}
    full = run(tmp_path, save_at=(4,), **options)
    assert_goes_on(full, run(tmp_path, tmp_path / "batch4.ckpt", **options), 4)


def test_a_resume_does_not_need_the_file_of_init_from(tmp_path):
    """The checkpoint being resumed has all the weights."""
    run(tmp_path, save_at=(5,), max_steps=3)
    options = {"init_from": str(tmp_path / "batch5.ckpt")}
    run(tmp_path, save_at=(3,), max_steps=2, **options)
    (tmp_path / "batch5.ckpt").unlink()
    run(tmp_path, tmp_path / "batch3.ckpt", **options)


@pytest.mark.parametrize("block_size", [4, [[0, 2], [4, 3], [8, 4]]])
def test_a_run_resumes_whose_blocks_do_not_divide_its_sequences(tmp_path, block_size):
    """Its slots are longer than all of them."""
    whole = run(tmp_path, save_at=(5,), block_size=block_size, length=10)[0]
    rest = run(tmp_path, tmp_path / "batch5.ckpt", block_size=block_size, length=10)[0]
    assert rest.losses == {index: loss for index, loss in whole.losses.items() if index > 5}
    with pytest.raises(ValueError, match=r"sequence length: expected 10, as in the checkpoint, got 9"):
        run(tmp_path, tmp_path / "batch5.ckpt", block_size=block_size, length=9)


def test_no_worker_outlives_fit(tmp_path):
    """Lightning stops the workers of the loaders that it knows."""
    trainer = run(tmp_path, workers=2, max_steps=2)[2]
    alive = len(multiprocessing.active_children())
    stop_workers(trainer)
    assert not alive


class Fail(pl.Callback):
    """As when memory runs out, or somebody presses Ctrl-C."""

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == 9:
            raise RuntimeError("out of memory")


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("pool", [None, 16, "all"])
def test_a_checkpoint_saved_on_an_exception_goes_on_too(tmp_path, accumulate, pool):
    """The batch that failed is trained on again, as if nothing had happened; also if it is not the last stop."""
    options: dict[str, Any] = {"accumulate": accumulate, "process": ProgressiveUnmasking(3, pool=pool)}
    full = run(tmp_path, **options)
    save = ModelCheckpoint(tmp_path, save_on_exception=True, every_n_train_steps=1000)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path, callbacks=(save, Fail()), **options)
    (path,) = tmp_path.glob("*.ckpt")
    assert_goes_on(full, run(tmp_path, path, save_at=(11, 12, 13), **options), 8)
    for after in (11, 12, 13):
        assert_goes_on(full, run(tmp_path, tmp_path / f"batch{after}.ckpt", **options), after)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_may_fail_before_it_begins(tmp_path, accumulate):
    """And a checkpoint of that moment is the one it was resumed from."""
    full = run(tmp_path, accumulate=accumulate)
    (tmp_path / "first").mkdir()
    save = ModelCheckpoint(tmp_path / "first", save_on_exception=True, every_n_train_steps=1000)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path, accumulate=accumulate, callbacks=(save, Fail()))
    (path,) = (tmp_path / "first").glob("*.ckpt")

    class FailAtOnce(pl.Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            trainer.save_checkpoint(tmp_path / "second.ckpt")
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path, path, accumulate=accumulate, callbacks=(FailAtOnce(),))
    assert_goes_on(full, run(tmp_path, tmp_path / "second.ckpt", accumulate=accumulate), 8)


class FailAfterBackward(pl.Callback):
    def on_after_backward(self, trainer, pl_module) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == 9:
            raise RuntimeError("out of memory")


def test_a_checkpoint_that_cannot_be_exact_says_so(tmp_path):
    """After a backward pass inside a window, gradients hold a batch that will be trained on again."""
    save = ModelCheckpoint(tmp_path, save_on_exception=True, every_n_train_steps=1000)
    with pytest.raises(RuntimeError, match="out of memory"), pytest.warns(UserWarning, match="will differ"):
        run(tmp_path, accumulate=2, callbacks=(save, FailAfterBackward()))
    (path,) = tmp_path.glob("*.ckpt")
    assert torch.load(path, weights_only=True)["puma_lightning"]["ranks"][0]["gradients"] is None

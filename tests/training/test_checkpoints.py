"""Checkpoint files: a good one is never lost, a damaged one never read, and none holds what is no number."""

import fcntl
import os
import random
import resource
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from puma_lightning.files import UNFINISHED, replacing
from puma_lightning.modules import MaskedDiffusion
from puma_lightning.training.checkpoints import CheckpointFiles, check_sums, load_checkpoint

V, MASK, LENGTH = 6, 5, 8


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vocab_size = V
        self.embed = nn.Embedding(V, 8)
        self.out = nn.Linear(8, V)

    def forward(self, xt: Tensor) -> Tensor:
        h = self.embed(xt)
        return self.out(torch.tanh(h + h.mean(1, keepdim=True)))


def loader(batch_size: int = 4) -> DataLoader:
    x0 = torch.randint(MASK, (24, LENGTH), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "prompt_mask": torch.zeros(LENGTH, dtype=torch.bool)} for row in x0]
    return DataLoader(rows, batch_size=batch_size)


def module() -> MaskedDiffusion:
    pl.seed_everything(0, verbose=False)
    return MaskedDiffusion(Backbone(), MASK, optimizer=partial(torch.optim.AdamW, lr=0.01), scheduler=None)


def trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    return pl.Trainer(
        **quiet, callbacks=[*callbacks], **{"enable_checkpointing": checkpoints, "max_steps": 5, **options}
    )


def everything_in(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A checkpoint of a run, with moments and chains."""
    folder = tmp_path_factory.mktemp("good")
    run = trainer(ModelCheckpoint(folder, save_last=True, every_n_train_steps=2))
    run.fit(module(), loader())
    return folder / "last.ckpt"


# --- written whole or not at all ---


def test_the_earlier_file_stays_until_the_new_one_is_whole(tmp_path):
    """An exception at any moment leaves what was there, and nothing beside it."""
    path = tmp_path / "file"
    path.write_text("old")
    for cut in (0, 3, 10):
        with pytest.raises(RuntimeError), replacing(path) as temporary:
            temporary.write_text("newer text"[:cut])
            assert path.read_text() == "old"
            raise RuntimeError("killed")
        assert [*tmp_path.iterdir()] == [path] and path.read_text() == "old"
    with replacing(path) as temporary:
        assert temporary.parent == path.parent  # another file system would make a copy of the move
        temporary.write_text("new")
    assert [*tmp_path.iterdir()] == [path] and path.read_text() == "new"


def test_a_file_may_be_read_by_whom_the_user_lets(tmp_path):
    """As any new file: a temporary one is private."""
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "file") as temporary:
            temporary.write_text("text")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_what_the_dead_leave_is_cleared_away_and_what_the_living_write_is_not(tmp_path):
    """The living hold a lock, whatever their process id is in their own container."""
    dead = tmp_path / f".last.ckpt.0123456789ab{UNFINISHED}"
    living = tmp_path / f".last.ckpt.ba9876543210{UNFINISHED}"
    dead.write_text("half")
    living.write_text("half")
    with living.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with replacing(tmp_path / "last.ckpt") as temporary:
            temporary.write_text("whole")
        assert sorted(tmp_path.iterdir()) == [living, tmp_path / "last.ckpt"]


def save_again_and_again(folder: Path) -> None:
    content = {"state_dict": {"weight": torch.ones(300_000)}, "number": 0}
    for number in range(10_000):
        CheckpointFiles().save_checkpoint({**content, "number": number}, folder / "last.ckpt")


@pytest.mark.parametrize("kills", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_a_kill_inside_a_save_costs_that_save_alone(tmp_path, kills, monkeypatch):
    """Whole checkpoints alone bear the name; the next process clears the rest away. TMPDIR plays no part."""
    monkeypatch.setenv("TMPDIR", "/dev/shm")
    rng, inside, newest = random.Random(0), 0, -1
    for _ in range(kills):
        child = os.fork()
        if not child:
            save_again_and_again(tmp_path)
        time.sleep(rng.uniform(0.05, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        inside += any(path.name.endswith(UNFINISHED) for path in tmp_path.iterdir())
        if (tmp_path / "last.ckpt").exists():
            newest = load_checkpoint(tmp_path / "last.ckpt")["number"]
            assert everything_in(tmp_path / "last.ckpt")["state_dict"]["weight"].sum() == 300_000
    assert inside >= kills // 4 and newest >= 0
    CheckpointFiles().load_checkpoint(tmp_path / "last.ckpt")
    assert [*tmp_path.iterdir()] == [tmp_path / "last.ckpt"]


def test_a_full_disk_costs_the_new_checkpoint_alone(tmp_path, good):
    """The error says why, that the old one is whole, and what to do; nothing half-written is left."""
    checkpoint = everything_in(good)
    path = tmp_path / "last.ckpt"
    CheckpointFiles().save_checkpoint(checkpoint, path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r"last.ckpt, which failed \(.*too large.*whole.*--ckpt_path"):
            CheckpointFiles().save_checkpoint(checkpoint, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [*tmp_path.iterdir()] == [path]


def test_a_trainer_gets_safe_files_unless_it_has_others(tmp_path):
    """A plug-in that the user has chosen stays."""

    class Own(CheckpointFiles):
        pass

    run = trainer(max_steps=1)
    run.fit(module(), loader())
    assert type(run.strategy.checkpoint_io) is CheckpointFiles
    own = trainer(max_steps=1, plugins=[Own()])
    own.fit(module(), loader())
    assert type(own.strategy.checkpoint_io) is Own


# --- damaged ---


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def damaged(path: Path) -> bytes:
    """Return a checkpoint with a bit of a weight flipped."""
    data = bytearray(path.read_bytes())
    data[data.index(everything_in(path)["state_dict"]["backbone.embed.weight"].numpy().tobytes())] ^= 1
    return bytes(data)


@pytest.mark.parametrize("trials", [60, pytest.param(400, marks=pytest.mark.slow)])
def test_a_flipped_bit_is_never_trained_on(tmp_path, good, trials):
    """Refused by name; or it is where nothing is kept, and what is read is what was written."""
    whole, data, rng, refused = everything_in(good), good.read_bytes(), random.Random(trials), 0
    for number in range(trials):
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path = tmp_path / f"{number}.ckpt"
        path.write_bytes(flipped)
        for load in (load_checkpoint, CheckpointFiles().load_checkpoint):
            try:
                read = load(path)
            except ValueError as error:
                assert str(path) in str(error)
                refused += 1
            else:
                assert same(read, whole)
    assert refused > trials  # of twice as many reads


def test_every_bit_of_the_end_of_a_file_may_be_flipped(tmp_path, good):
    """The directory of an archive is there, which tells all readers apart: none raises anything of its own."""
    whole, data, path = everything_in(good), good.read_bytes(), tmp_path / "flipped.ckpt"
    for bit in range(8 * (len(data) - 130), 8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            read = load_checkpoint(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert same(read, whole)


def test_a_cut_or_zeroed_file_is_refused_by_name(tmp_path, good):
    """Wherever it is cut, and whichever block is lost."""
    data, rng = good.read_bytes(), random.Random(0)
    for number in range(20):
        cut, zeroed = rng.randrange(len(data)), rng.randrange(len(data) - 512)
        for kind, rest in (("cut", data[:cut]), ("zeroed", data[:zeroed] + bytes(512) + data[zeroed + 512 :])):
            path = tmp_path / f"{kind}{number}.ckpt"
            path.write_bytes(rest)
            with pytest.raises(ValueError, match=path.name):
                load_checkpoint(path)
            with pytest.raises(ValueError, match=path.name):
                CheckpointFiles().load_checkpoint(path)


def test_a_damaged_checkpoint_is_refused_wherever_one_is_read(tmp_path, good):
    """To resume from, to judge, to start from, and to make a module of."""
    path = tmp_path / "damaged.ckpt"
    path.write_bytes(damaged(good))
    message = r"damaged.ckpt: expected a whole checkpoint, got a damaged one"
    with pytest.raises(ValueError, match=message):
        trainer().fit(module(), loader(), ckpt_path=path)
    for command in ("validate", "test", "predict"):
        with pytest.raises(ValueError, match=message):
            getattr(trainer(), command)(module(), loader(), ckpt_path=path)
    with pytest.raises(ValueError, match=message):
        MaskedDiffusion.load_from_checkpoint(path, backbone=Backbone(), mask_id=MASK)
    start = MaskedDiffusion(Backbone(), MASK, init_from=str(path))
    with pytest.raises(ValueError, match=message):
        trainer().fit(start, loader())


def test_a_file_that_changes_is_checked_again(tmp_path, good):
    """One look is kept, but only of the file as it was."""
    path = tmp_path / "last.ckpt"
    data = good.read_bytes()
    path.write_bytes(data)
    check_sums(path)
    path.write_bytes(damaged(good))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    with pytest.raises(ValueError, match="damaged"):
        check_sums(path)


# --- not a number ---


class Poison(pl.Callback):
    """Makes a gradient infinite in one optimizer step, whose loss is finite."""

    def __init__(self, step: int, value: float = float("inf")) -> None:
        self.step, self.value = step, value

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == self.step:
            next(pl_module.parameters()).grad[0, 0] = self.value


OPTIONS = {
    "plain": {},
    "clipped": {"gradient_clip_val": 1.0},
    "bf16": {"precision": "bf16-mixed"},
    "accumulated": {"accumulate_grad_batches": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("step", [0, 3, 4])
def test_a_gradient_that_is_no_number_reaches_no_checkpoint(tmp_path, options, ema, step):
    """In the first step, in one that is saved, in the last: the run stops, and the last checkpoint is a good one."""
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1, save_last=True)
    average = [EMAWeightAveraging(use_buffers=False, decay=0.9)] if ema else []
    run = trainer(Poison(step), *average, save, **options)
    last = rf"{tmp_path}/last\.ckpt" if step > 1 else "none yet"
    with pytest.raises(ValueError, match=f"not finite.*last good checkpoint, .*{last}"):
        run.fit(module(), loader(batch_size=2))
    for path in tmp_path.glob("*.ckpt"):
        checkpoint = everything_in(path)
        assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
        assert all(
            value.isfinite().all()
            for each in checkpoint["optimizer_states"][0]["state"].values()
            for value in each.values()
        )


def test_accumulated_gradients_that_are_no_numbers_reach_no_checkpoint(tmp_path):
    """Saved within an accumulation window they would spoil the step that a resumed run goes on with."""
    save = ModelCheckpoint(tmp_path, filename="{step}", save_on_train_epoch_end=False, save_top_k=-1)
    with pytest.raises(ValueError, match=r"gradients\.\S+: expected numbers, got one that is not finite"):
        trainer(Poison(1), save, accumulate_grad_batches=2, val_check_interval=3).fit(module(), loader(), loader())
    assert not list(tmp_path.glob("*.ckpt"))


def test_a_run_that_ends_without_a_checkpoint_does_not_end_well_with_nan():
    """The last step is as bad as any."""
    with pytest.raises(ValueError, match=r"embed.weight: expected numbers.*none yet"):
        trainer(Poison(4)).fit(module(), loader())


def test_after_a_resume_the_checkpoint_it_came_from_is_named(good):
    """There is one to go on from, though this run has saved none."""
    with pytest.raises(ValueError, match=rf"last good checkpoint, {good}"):
        trainer(Poison(5), max_steps=7).fit(module(), loader(), ckpt_path=good)


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_weights_that_are_no_numbers_are_refused(tmp_path, good, command):
    """From a checkpoint, whoever wrote it; from init_from; or as they are."""
    checkpoint = everything_in(good)
    checkpoint["state_dict"]["backbone.out.bias"][2] = float("nan")
    torch.save(checkpoint, tmp_path / "nan.ckpt")
    with pytest.raises(ValueError, match=r"the checkpoint: expected numbers.*backbone.out.bias.*earlier"):
        getattr(trainer(), command)(module(), loader(), ckpt_path=tmp_path / "nan.ckpt")
    with pytest.raises(ValueError, match=r"nan.ckpt: expected numbers.*backbone.out.bias"):
        getattr(trainer(), command)(MaskedDiffusion(Backbone(), MASK, init_from=str(tmp_path / "nan.ckpt")), loader())
    bad = module()
    with torch.no_grad():
        bad.backbone.out.bias[2] = float("inf")
    with pytest.raises(ValueError, match=r"backbone.out.bias"):
        getattr(trainer(), command)(bad, loader())


# --- after an exception ---


class Fail(pl.Callback):
    """Raises within the optimizer's step, when the weights have changed."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        def fail(*_: Any) -> None:
            if trainer.global_step == 3:
                raise RuntimeError("out of memory")

        trainer.optimizers[0].register_step_post_hook(fail)


def test_an_inexact_checkpoint_does_not_take_the_place_of_an_exact_one(tmp_path):
    """Saved within the optimizer's step it would be trained on with some weights changed twice."""
    save = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_last=True, save_on_exception=True)
    with pytest.warns(UserWarning, match="no checkpoint saved.*optimizer's step"), pytest.raises(RuntimeError):
        trainer(Fail(), save).fit(module(), loader())
    assert everything_in(tmp_path / "last.ckpt")["global_step"] == 2


@pytest.mark.parametrize("function", ["fit", "validate"])
def test_a_last_checkpoint_that_is_not_there_is_refused(tmp_path, function):
    """Lightning would begin at step 0, or judge the weights that there are."""
    save = ModelCheckpoint(tmp_path / "saved", save_last=True, every_n_train_steps=2)
    run = trainer(save, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match=r"ckpt_path: expected a last checkpoint in .*, found none; give the path"):
        getattr(run, function)(module(), loader(), ckpt_path="last")
    assert run.global_step == 0
    run.fit(module(), loader())
    again = trainer(save, default_root_dir=tmp_path, max_steps=7)
    again.fit(module(), loader(), ckpt_path="last")
    assert again.global_step == 7 and torch.load(tmp_path / "saved/last.ckpt", weights_only=True)["global_step"] == 6

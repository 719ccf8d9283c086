"""A run that is asked to end: saved after a batch, 128 + the signal's number, and gone on with exactly."""

import copy
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
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, get_worker_info

from puma_lightning.cli import newest_checkpoint, resume_command
from puma_lightning.modules import MaskedDiffusion
from puma_lightning.training.stopping import GracefulStop, LoaderWorker, Stopped, loader_context

V, MASK, LENGTH = 6, 5, 8


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vocab_size = V
        self.embed = nn.Embedding(V, 8)
        self.drop = nn.Dropout(0.1)
        self.out = nn.Linear(8, V)

    def forward(self, xt: Tensor) -> Tensor:
        h = self.embed(xt)
        return self.out(self.drop(torch.tanh(h + h.mean(1, keepdim=True))))


class Signal(pl.Callback):
    """Sends this process a signal: in a training batch, or in a batch of a validation."""

    def __init__(self, number: int, at: int, validation: bool = False) -> None:
        self.number, self.at, self.validation = number, at, validation

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.validation and trainer.fit_loop.epoch_loop.total_batch_idx == self.at:
            os.kill(os.getpid(), self.number)

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.validation and trainer.fit_loop.epoch_loop.total_batch_idx == self.at:
            os.kill(os.getpid(), self.number)


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.train: dict[int, float] = {}
        self.validation: dict[int, float] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.train[trainer.fit_loop.epoch_loop.total_batch_idx] = outputs["loss"].item()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        index = trainer.fit_loop.epoch_loop.total_batch_idx
        self.validation[index] = trainer.callback_metrics["val/loss"].item()


def run(folder: Path | None, *callbacks: pl.Callback, ckpt: Path | None = None, ema: bool = True) -> tuple[Losses, Any]:
    """Train 16 batches, 8 an epoch, with an update every 2 and a validation every 4."""
    pl.seed_everything(0, verbose=False)
    x0 = torch.randint(MASK, (32, LENGTH), generator=torch.Generator().manual_seed(0))
    loader = DataLoader([{"input_ids": row, "prompt_mask": torch.zeros(LENGTH, dtype=torch.bool)} for row in x0], 4)
    module = MaskedDiffusion(Backbone(), MASK, optimizer=partial(torch.optim.AdamW, lr=0.01), scheduler=None)
    losses = Losses()
    average = [EMAWeightAveraging(use_buffers=False, decay=0.8)] if ema else []
    save = [ModelCheckpoint(folder, save_last=True, every_n_train_steps=100)] if folder else []
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=8,
        accumulate_grad_batches=2,
        val_check_interval=4,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(folder or any(isinstance(each, ModelCheckpoint) for each in callbacks)),
        callbacks=[*average, losses, *callbacks, *save],
    )
    trainer.fit(module, loader, loader, ckpt_path=ckpt)
    return losses, {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("at", "validation"), [(0, False), (4, False), (7, False), (3, True), (7, True)])
def test_a_signal_saves_after_the_batch_and_a_resumed_run_is_the_undisturbed_one(tmp_path, number, at, validation):
    """Within an accumulation window, at an epoch's end, and in the midst of a validation, averaged weights in place."""
    whole, weights = run(tmp_path / "whole")
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped:
        run(tmp_path, Signal(number, at, validation))
    assert stopped.value.code == 128 + number
    assert stopped.value.checkpoint == tmp_path / "last.ckpt"
    assert signal.getsignal(number) == before
    rest, resumed = run(tmp_path, ckpt=tmp_path / "last.ckpt")
    assert rest.train == {index: loss for index, loss in whole.train.items() if index > at}
    assert rest.validation == {index: loss for index, loss in whole.validation.items() if index >= at}
    assert all(torch.equal(value, weights[name]) for name, value in resumed.items())


class Early(Signal):
    """Sends it before the first batch."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        os.kill(os.getpid(), self.number)


def test_a_signal_before_the_first_batch_acts_after_it(tmp_path):
    """Lightning's own handler would wait for other processes, which read their first batches."""
    whole, weights = run(None)
    with pytest.raises(Stopped) as stopped:
        run(tmp_path, Early(signal.SIGTERM, -1))
    assert stopped.value.checkpoint == tmp_path / "last.ckpt"
    rest, resumed = run(tmp_path, ckpt=tmp_path / "last.ckpt")
    assert rest.train == {index: loss for index, loss in whole.train.items() if index > 0}
    assert all(torch.equal(value, weights[name]) for name, value in resumed.items())


class Fails(pl.Callback):
    """Raises in a validation, once a checkpoint has been saved."""

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == 7:
            raise RuntimeError("worker gone")


def test_an_exception_in_a_validation_saves_no_averaged_weights_as_the_others(tmp_path):
    """The checkpoint before it stays the one to go on from."""
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_last=True)
    whole, _ = run(None)
    with pytest.raises(RuntimeError, match="worker gone"):
        run(None, Fails(), save, OnExceptionCheckpoint(tmp_path))
    saved = sorted(path.name for path in tmp_path.glob("*.ckpt"))
    rest, _ = run(None, ckpt=tmp_path / "last.ckpt")
    assert rest.train == {index: loss for index, loss in whole.train.items() if index in rest.train}
    assert 8 in rest.train and saved == ["last.ckpt", "step=4.ckpt"]


class Struck(Dataset):
    """Rows, at two of which the worker that reads them gets a signal, as all processes of a run do on a cluster."""

    def __init__(self, rows: list, number: int, times: int = 1) -> None:
        self.rows, self.number, self.times = rows, number, times

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        for _ in range(self.times if index in (9, 22) and get_worker_info() else 0):
            os.kill(os.getpid(), self.number)
        return self.rows[index]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_workers_of_a_loader_go_on_after_a_signal(tmp_path, number):
    """Of which the second one ends them."""
    rows = [{"input_ids": torch.full((LENGTH,), i % MASK)} for i in range(32)]
    for times in (1, 2):
        loader = DataLoader(Struck(rows, number, times), 4, num_workers=2)
        module = MaskedDiffusion(Backbone(), MASK, scheduler=None)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = pl.Trainer(accelerator="cpu", max_epochs=1, enable_checkpointing=False, **quiet)
        if times == 1:
            trainer.fit(module, loader)
            assert trainer.global_step == 8
        else:
            # As it was waited for, or while it handed something over.
            with pytest.raises((RuntimeError, OSError, EOFError)):
                trainer.fit(module, loader)


def test_the_workers_of_validation_loaders_go_on_too(tmp_path):
    """Whatever a validation is made of: a loader, or several."""
    rows = [{"input_ids": torch.full((LENGTH,), i % MASK)} for i in range(32)]
    struck = DataLoader(Struck(rows, signal.SIGTERM), 4, num_workers=2)
    for loaders in (struck, [struck, DataLoader(rows, 4)]):
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = pl.Trainer(accelerator="cpu", max_epochs=1, enable_checkpointing=False, **quiet)
        trainer.fit(MaskedDiffusion(Backbone(), MASK, scheduler=None), DataLoader(rows, 4), loaders)
        assert trainer.global_step == 8


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_that_is_just_being_started_goes_on_too(monkeypatch, number):
    """The signal waits until the worker has learned to live with it."""
    mine, set_num_threads = os.getpid(), torch.set_num_threads

    def struck(threads: int) -> None:  # the first that a worker does, before it calls any function of its loader
        if os.getpid() != mine:
            os.kill(os.getpid(), number)
        set_num_threads(threads)

    monkeypatch.setattr(torch, "set_num_threads", struck)
    rows = [{"input_ids": torch.full((LENGTH,), i % MASK)} for i in range(32)]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, enable_checkpointing=False, **quiet)
    loaders = [DataLoader(rows, 4, num_workers=2, multiprocessing_context=name) for name in (None, "fork")]
    trainer.fit(MaskedDiffusion(Backbone(), MASK, scheduler=None), loaders[0], loaders)
    assert trainer.global_step == 8
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGTERM, signal.SIGINT}
    # The loaders are the user's own again.
    assert all(loader.worker_init_fn is None for loader in loaders)
    assert loaders[0].multiprocessing_context is None


def test_a_key_that_is_pressed_while_a_worker_starts_blocks_nothing(monkeypatch):
    """A handler may run, and raise, in the very call that holds signals back, which must be undone all the same."""
    set_mask = signal.pthread_sigmask

    def pressed(how: int, numbers: Any) -> Any:
        before = set_mask(how, numbers)
        if how == signal.SIG_BLOCK and numbers:
            raise KeyboardInterrupt
        return before

    process = loader_context(multiprocessing.get_context("fork")).Process(target=time.sleep, args=(0,))
    monkeypatch.setattr(signal, "pthread_sigmask", pressed)
    with pytest.raises(KeyboardInterrupt):
        process.start()
    assert not set_mask(signal.SIG_BLOCK, ()) & {signal.SIGTERM, signal.SIGINT}


def test_a_fork_server_is_left_alone():
    """It would hold signals back for ever, from all that it starts later."""
    assert type(loader_context(multiprocessing.get_context("forkserver")).Process) is type


def test_a_spawned_worker_is_given_what_starts_it():
    """Which is pickled."""
    loader = DataLoader(
        torch.arange(4),
        2,
        num_workers=1,
        worker_init_fn=LoaderWorker(None),
        multiprocessing_context=loader_context(loader_context(multiprocessing.get_context("spawn"))),
    )
    assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3]]


def test_a_worker_whose_loader_is_done_ends_at_the_first_signal():
    """Which its loader sends to one that takes too long to end by itself."""
    over = multiprocessing.get_context("fork").Event()

    def work() -> None:
        done_event = over  # noqa: F841  # as the loop of PyTorch's workers calls it
        LoaderWorker(None)(0)
        started.set()
        time.sleep(60)

    started = multiprocessing.get_context("fork").Event()
    worker = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    worker.start()
    assert started.wait(20)
    worker.terminate()
    worker.join(0.5)
    assert worker.is_alive()
    worker.kill()
    worker.join()
    over.set()
    started.clear()
    worker = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    worker.start()
    assert started.wait(20)
    worker.terminate()
    worker.join(20)
    assert not worker.is_alive()


STUCK = """
import signal, time
import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from puma_lightning import MaskedDiffusion, RandomMasking

class Rows(Dataset):
    def __len__(self): return 32
    def __getitem__(self, index):
        if index > 9:  # as one that waits for ever in native code
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            time.sleep(1000)
        return {"input_ids": torch.zeros(8, dtype=torch.int64)}

class Backbone(nn.Module):
    vocab_size = 6
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(6, 8), nn.Linear(8, 6)
    def forward(self, xt): return self.out(self.embed(xt))

quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
pl.Trainer(accelerator="cpu", max_steps=8, **quiet).fit(
    MaskedDiffusion(Backbone(), 5, RandomMasking(), scheduler=None), DataLoader(Rows(), 4, num_workers=1, timeout=2)
)
"""


@pytest.mark.slow
def test_a_worker_that_sees_no_signal_keeps_no_run_from_ending(tmp_path):
    """It is killed at the exit, for which multiprocessing would wait."""
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "timed out" in done.stderr


def test_a_worker_begins_as_its_user_has_it_begin():
    """Their ``worker_init_fn`` is called with the worker's number."""
    begun: list[int] = []
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    LoaderWorker(begun.append)(3)
    for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
        signal.signal(number, handler)
    assert begun == [3]


def test_a_run_that_saves_nothing_says_so_and_ends(capfd):
    """There is nothing to go on from."""
    with pytest.raises(Stopped) as stopped:
        run(None, Signal(signal.SIGTERM, 2))
    assert stopped.value.checkpoint is None


def test_a_signal_in_the_last_batch_changes_nothing(tmp_path):
    """The run is over with it."""
    losses, _ = run(tmp_path, Signal(signal.SIGTERM, 15))
    assert len(losses.train) == 16


def test_a_second_signal_ends_at_once(tmp_path):
    """By what was there before: for Ctrl-C an exception, which Lightning turns into an exit."""

    class Twice(Signal):
        def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            super().on_after_backward(trainer, pl_module)
            super().on_after_backward(trainer, pl_module)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which what starts the tests may have ignored
    try:
        with pytest.raises(SystemExit) as ended:
            run(tmp_path, Twice(signal.SIGINT, 2))
    finally:
        signal.signal(signal.SIGINT, before)
    assert not isinstance(ended.value, Stopped)
    assert not (tmp_path / "last.ckpt").exists()


TWICE = """
import os, signal, sys
from functools import partial
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from puma_lightning import MaskedDiffusion, TransformerBackbone

class Twice(pl.Callback):
    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            print("went on", flush=True)

rows = [{"input_ids": torch.zeros(8, dtype=torch.int64)} for _ in range(64)]
module = MaskedDiffusion(TransformerBackbone(6, 16, 16, num_layers=1, num_heads=2), 5)
quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
pl.Trainer(accelerator="cpu", max_steps=8, callbacks=[Twice()], **quiet).fit(module, DataLoader(rows, 4))
"""


def test_a_second_sigterm_ends_at_once_too():
    """Lightning's own handler would let the run go on."""
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGTERM and "went on" not in done.stdout, done.stderr


def test_a_run_after_a_stopped_one_runs(tmp_path):
    """In the same process, with the same module."""
    with pytest.raises(Stopped):
        run(tmp_path, Signal(signal.SIGTERM, 2))
    assert len(run(tmp_path)[0].train) == 16


@pytest.mark.parametrize("at", ["preflight", "on_train_batch_end", "setup"])
def test_a_run_that_fails_listens_no_more(monkeypatch, at):
    """Wherever it does: a Ctrl-C after it is for somebody else."""

    def fail(*_: Any) -> None:
        raise RuntimeError(at)

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    if at == "setup":
        monkeypatch.setattr("puma_lightning.training.loading.StreamLoading.begin", fail)
    else:
        monkeypatch.setattr(MaskedDiffusion, at, fail)
    with pytest.raises(RuntimeError, match=at):
        run(None)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_run_that_fails_leaves_the_users_loaders_as_they_were():
    """And the random state."""

    class Fails(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            assert val.worker_init_fn is not None
            raise RuntimeError("in a batch")

    rows = [{"input_ids": torch.full((LENGTH,), i % MASK)} for i in range(32)]
    val, module = DataLoader(rows, 4, num_workers=1), MaskedDiffusion(Backbone(), MASK, scheduler=None)
    random = torch.get_rng_state()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", max_steps=4, enable_checkpointing=False, callbacks=[Fails()], **quiet)
    with pytest.raises(RuntimeError, match="in a batch"):
        trainer.fit(module, DataLoader(rows, 4), val)
    assert val.worker_init_fn is None and val.multiprocessing_context is None
    assert torch.equal(torch.get_rng_state(), random)


def test_copies_of_a_module_do_not_listen():
    """An average of the weights is one."""
    stop = GracefulStop()
    stop.received, stop._before = 15, {15: signal.SIG_DFL}
    assert copy.deepcopy(stop).received == 0 and copy.deepcopy(stop)._before == {}


# --- going on ---


def test_the_newest_version_of_a_run_that_has_a_checkpoint_is_gone_on_with(tmp_path):
    """By time, not by number; ``last`` before others; a version that was killed at its start has none."""
    run = tmp_path / "sudoku" / "puma"
    with pytest.raises(ValueError, match=rf"ckpt_path: expected a run with a checkpoint in {run}.*got none; give"):
        newest_checkpoint(run)
    for number, name in enumerate(["version_0/checkpoints/last.ckpt", "version_10/checkpoints/last.ckpt"]):
        (run / name).parent.mkdir(parents=True)
        (run / name).touch()
        os.utime(run / name, (number, number))
    (run / "version_11" / "checkpoints").mkdir(parents=True)
    assert newest_checkpoint(run) == run / "version_10/checkpoints/last.ckpt"
    other = run / "version_11" / "checkpoints" / "best.ckpt"
    other.touch()
    assert newest_checkpoint(run) == run / "version_10/checkpoints/last.ckpt"


def test_a_checkpoint_that_a_kill_left_aside_is_put_back(tmp_path):
    """The folder of shards of a run that died while it replaced it."""
    aside = tmp_path / "version_0" / "checkpoints" / ".last.ckpt.0123456789ab.old"
    aside.mkdir(parents=True)
    (aside / "meta.pt").write_text("")
    assert newest_checkpoint(tmp_path) == aside.with_name("last.ckpt")


@pytest.mark.parametrize("given", [[], ["--ckpt_path", "old one.ckpt"], ["--ckpt_path=old.ckpt"]])
def test_the_command_that_goes_on_is_the_one_that_began(given):
    """With another checkpoint, and quoted for a shell."""
    command = resume_command(["fit", *given, "--config", "my runs/a.yaml"], Path("runs/a b/last.ckpt"))
    assert command == "puma fit --config 'my runs/a.yaml' --ckpt_path 'runs/a b/last.ckpt'"


# --- several processes, however they are started ---

SCRIPT = """
import sys
import time
from functools import partial
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from puma_lightning import MaskedDiffusion, TransformerBackbone

class Data(pl.LightningDataModule):
    def setup(self, stage):
        (torch.randn(700, 700) + 1).sum()  # as threads share it
        x0 = torch.randint(5, (24, 8), generator=torch.Generator().manual_seed(0))
        self.loader = DataLoader([{"input_ids": row} for row in x0], 2)

    def train_dataloader(self):
        return self.loader

    val_dataloader = train_dataloader


if __name__ == "__main__":
    pl.seed_everything(0)
    optimizer = {} if sys.argv[2:] else {"optimizer": partial(torch.optim.AdamW, lr=1e-3)}
    module = MaskedDiffusion(TransformerBackbone(6, 16, 16, num_layers=1, num_heads=2), 5, **optimizer)
    Data().setup("")
    for times in range(2):  # a second fit prepares the exchange anew
        trainer = pl.Trainer(
            accelerator="cpu", devices=2, strategy=sys.argv[1], max_steps=6, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )
        trainer.fit(module, Data())
    if trainer.is_global_zero:
        print("weights", sum(weight.double().sum().item() for weight in module.state_dict().values()))
"""


@pytest.mark.slow
def test_processes_may_be_started_in_any_way(tmp_path):
    """By a launcher, spawned, or forked: the exchange of signals is over before any of them ends."""
    (tmp_path / "run.py").write_text(SCRIPT)
    said = {}
    threads = os.environ | {"OMP_NUM_THREADS": "2"}  # of which forked processes have none
    for strategy in ("ddp", "ddp_spawn", "ddp_notebook"):
        command = [sys.executable, str(tmp_path / "run.py"), strategy]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path, env=threads)
        assert done.returncode == 0, f"{strategy}: {done.stderr[-3000:]}"
        said[strategy] = [line for line in done.stdout.splitlines() if line.startswith("weights")]
    assert said["ddp_spawn"] == said["ddp_notebook"] and len(said["ddp"]) == 1


@pytest.mark.slow
def test_an_optimizer_that_cannot_be_sent_to_a_spawned_process_is_refused(tmp_path):
    """Such as the default one, a lambda; the error says what can."""
    (tmp_path / "run.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "run.py"), "ddp_spawn", "default"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert "ValueError: optimizer: expected one that spawned processes can be given" in done.stderr, done.stderr

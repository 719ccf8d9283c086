"""A run that is asked to end saves where it is, says how to go on, and ends."""

import atexit
import copy
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from multiprocessing.context import BaseContext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import rank_zero_info
from lightning.pytorch.callbacks import ModelCheckpoint

from puma_lightning.training.lightning_internals import (
    cluster_environment,
    forget_sigterm,
    let_children_end,
    validate_again_after_resume,
)

if TYPE_CHECKING:
    from puma_lightning.modules.base import StreamedModule


ENDING = (signal.SIGINT, signal.SIGTERM)


class Stopped(SystemExit):
    """Ends a run that was asked to end; uncaught it ends the process with 128 + the signal's number.

    Attributes:
        checkpoint: What to go on from; None if nothing was saved.
    """

    def __init__(self, number: int, checkpoint: Path | None) -> None:
        super().__init__(128 + number)
        self.checkpoint = checkpoint


class LoaderWorker:
    """Starts a worker process of a loader, as its ``worker_init_fn``.

    Schedulers and terminals send a signal to all processes of a run. Its workers must go on then: the run still needs
    what they read, and ends them when it has saved. A second signal ends one at once.

    Args:
        start: What the user's own ``worker_init_fn`` does.
    """

    def __init__(self, start: Callable[[int], None] | None) -> None:
        self._start = start
        self._asked = False
        self._over: Any = None
        _end_workers_at_exit()

    def __call__(self, worker: int) -> None:
        # By this event its loader tells a worker to end; only the loop that calls this has it.
        self._over = sys._getframe(1).f_locals.get("done_event")
        for number in ENDING:
            signal.signal(number, self._note)
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)  # see ``loader_context``
        if self._start is not None:
            self._start(worker)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._asked or (self._over is not None and self._over.is_set()):
            os._exit(0)  # a worker has nothing to lose
        self._asked = True


def loader_context(context: BaseContext | None = None) -> BaseContext:
    """Return how a loader starts its workers: with the signals held back that ``LoaderWorker`` learns to live with.

    One that came before that would end the worker. It reaches the worker then, and this process a moment later. Only a
    worker that this process starts itself can be protected: not those of a fork server.

    Args:
        context: How they are started otherwise; as everywhere in this process by default.
    """
    held: Any = copy.copy(context or multiprocessing.get_context())
    starts_itself = held.get_start_method() in ("fork", "spawn") and hasattr(signal, "pthread_sigmask")
    if starts_itself and not isinstance(held.Process, _HeldBack):
        held.Process = _HeldBack(held.Process)
    return held  # type: ignore[no-any-return]


class _HeldBack:
    """Makes processes that are started with signals held back."""

    def __init__(self, process: Callable[..., Any]) -> None:
        self._process = process

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        process = self._process(*arguments, **options)

        def start() -> None:
            del process.start  # a spawned process gets a copy of all that this one has
            before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
            try:
                # A handler may run in here, and raise.
                signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

        process.start = start
        return process


@lru_cache(maxsize=1)
def _end_workers_at_exit() -> None:
    # multiprocessing would wait for ever for one that is stuck where Python does not see the signal.
    atexit.register(_end_workers)


def _end_workers() -> None:
    workers = [process for process in multiprocessing.active_children() if process.daemon]
    for _ in range(2):
        for worker in workers:
            worker.terminate()
        time.sleep(0.05 if workers else 0)
    end = time.monotonic() + 1
    for worker in workers:
        worker.join(max(0.0, end - time.monotonic()))
        if worker.is_alive():
            worker.kill()


class GracefulStop:
    """Waits for SIGTERM or SIGINT (Ctrl-C), and ends the run after the batch in which one comes.

    A handler of signals may run anywhere, so it notes the signal and no more. With several processes a signal to one of
    them ends all: after each batch they exchange what they have noted, and act on it a batch later, when the answer is
    there without waiting for it. A second signal ends a process at once.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}
        self._group: Any = None
        self._pending: tuple[Any, torch.Tensor] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return GracefulStop, ()  # signals come to a process, not to copies of a module

    def begin(self, trainer: pl.Trainer) -> None:
        """Listen from now on. Lightning's own handler of SIGTERM waits for other processes, which may never answer."""
        if threading.current_thread() is not threading.main_thread():
            return
        numbers = [signal.SIGINT]
        # On SLURM it may follow the signal on which Lightning has saved the run and queued it again.
        if not getattr(cluster_environment(trainer), "auto_requeue", False):
            numbers.append(signal.SIGTERM)
            forget_sigterm(trainer)  # what came so far has been noted here too
        for number in numbers:
            handler = signal.getsignal(number)
            if handler != self._note:
                self._before.setdefault(number, handler)
                signal.signal(number, self._note)

    def connect(self, trainer: pl.Trainer) -> None:
        """Prepare the exchange between processes. To be called on all of them, at the start of training."""
        self._pending = None
        if trainer.world_size > 1 and self._group is None:
            self._group = torch.distributed.new_group(backend="gloo")

    def disconnect(self) -> None:
        """Take the last answer, and end the exchange. To be called on all processes, where training ends.

        A process that left the answer to its exit could abort, or have another one abort, which waits for it.
        """
        if self._pending is not None:
            self._pending[0].wait()
        if self._group is not None:
            torch.distributed.destroy_process_group(self._group)
        self._group = self._pending = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            self.end()
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)  # Lightning's handler, which was there, ends nothing at once
            os.kill(os.getpid(), number)
            return
        self.received = number
        name = signal.Signals(number).name
        # What print or a logger does may be what the signal interrupts.
        os.write(2, f"\n{name}: saving after this batch, then ending; a second signal ends at once\n".encode())

    def end(self) -> None:
        """Listen no more."""
        for number, handler in self._before.items():
            if handler is not None:
                signal.signal(number, handler)
        self._before, self.received = {}, 0

    def _agreed(self, trainer: pl.Trainer) -> int:
        """Return the signal on which all processes act after this batch; 0 for none."""
        if self._group is None:
            return self.received
        last, mine = self._pending, torch.tensor(self.received)
        work = torch.distributed.all_reduce(mine, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = (work, mine)
        if last is None:
            return 0
        last[0].wait()
        return int(last[1])

    def stop_if_asked(self, module: "StreamedModule") -> None:
        """Save and end, if that has been asked for. To be called after each training batch, on all processes.

        Raises:
            Stopped: Then, on all processes.
        """
        number = self._agreed(module.trainer)
        if number and not _is_over(module.trainer):
            self._stop(module, number)

    def stop_validation_if_asked(self, module: "StreamedModule") -> None:
        """Do the same within a validation, which a resumed run then does as a whole; several processes finish it.

        Raises:
            Stopped: Then.
        """
        trainer = module.trainer
        in_training = trainer.state.fn == "fit" and not trainer.sanity_checking and not _is_over(trainer)
        if self.received and in_training and trainer.world_size == 1:
            validate_again_after_resume(trainer, module)
            self._stop(module, self.received)

    def _stop(self, module: "StreamedModule", number: int) -> None:
        trainer = module.trainer
        path = checkpoint_path(trainer)
        if path is not None:
            trainer.save_checkpoint(path)
        let_children_end(trainer)
        name, steps = signal.Signals(number).name, f"{trainer.global_step:,} optimizer steps"
        if path is None:
            rank_zero_info(f"Ended by {name} after {steps}. Nothing was saved: the run saves no checkpoints.")
        else:
            rank_zero_info(f"Ended by {name} after {steps}. Go on with --ckpt_path {path} (fit(..., ckpt_path=...)).")
        self.end()
        self.disconnect()
        raise Stopped(number, path)


def _is_over(trainer: pl.Trainer) -> bool:
    """Tell whether the last step is done: the run ends by itself then, and nothing is left to go on with."""
    return trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps


def checkpoint_path(trainer: pl.Trainer) -> Path | None:
    """Return where a run that is asked to end saves: its ``last.ckpt``, or where that would be; None if nowhere."""
    savers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    if not savers or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    saver = next((each for each in savers if each.save_last and not each.save_weights_only), savers[0])
    saver.last_model_path = saver.last_model_path or saver.format_checkpoint_name({}, saver.CHECKPOINT_NAME_LAST)
    return Path(saver.last_model_path)

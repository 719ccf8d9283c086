"""Every name of Lightning's insides that training depends on, as seen in lightning 2.6.4 to 2.6.6.

Nothing else in this package touches them. If a new version of Lightning breaks something, it is here.
"""

import signal
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint, WeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loops.evaluation_loop import RestartStage as EvaluationStage
from lightning.pytorch.loops.fit_loop import RestartStage as FitStage
from lightning.pytorch.loops.training_epoch_loop import RestartStage as TrainingStage
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from torch.optim.swa_utils import AveragedModel


def is_made_by_command_line() -> bool:
    """Tell whether a module is just being made by LightningCLI, which then knows its arguments as plain values."""
    return _given_hyperparameters.get() is not None


def trainer_of(module: pl.LightningModule) -> pl.Trainer | None:
    """Return the Trainer of a module; None without one, where ``module.trainer`` raises."""
    return module._trainer


def refuse_missing_last(trainer: pl.Trainer) -> None:
    """Have a Trainer that is asked to go on from the last checkpoint refuse to begin at step 0 if there is none."""
    connector = trainer._checkpoint_connector
    select = connector._select_ckpt_path

    def selected(fn: Any, ckpt_path: Any, *more: Any, **options: Any) -> Any:
        found = select(fn, ckpt_path, *more, **options)
        if ckpt_path == "last" and found is None:
            raise ValueError(
                f"ckpt_path: expected a last checkpoint in {trainer.default_root_dir} or the folder of a "
                "ModelCheckpoint, found none; give the path of one, or leave it out to begin a new run"
            )
        return found

    if not hasattr(select, "refuses"):
        selected.refuses = True  # type: ignore[attr-defined]
        connector._select_ckpt_path = selected  # type: ignore[method-assign, assignment]


def wrap_loaders(trainer: pl.Trainer, train: Callable[[Any], Any], val: Callable[[Any], Any]) -> None:
    """Put functions between Lightning and the loaders of a fit, wherever these come from.

    Args:
        trainer: The Trainer, in its ``setup`` phase.
        train: From what the user's ``train_dataloader`` returns to what Lightning is to iterate.
        val: The same of ``val_dataloader``.
    """
    for loop, wrap in ((trainer.fit_loop, train), (trainer.fit_loop.epoch_loop.val_loop, val)):
        source = loop._data_source
        loop._data_source = _WrappedSource(source.instance, source.name, wrap)


def is_in_step(trainer: pl.Trainer) -> bool:
    """Tell whether a training step has been started and not finished."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(progress.ready > progress.processed)


def is_in_accumulation_window(trainer: pl.Trainer, in_step: bool) -> bool:
    """Tell whether gradients of earlier batches wait for the optimizer step that they are part of."""
    if not in_step:
        return bool(trainer.fit_loop._should_accumulate())
    ready: int = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return bool((ready - 1) % trainer.accumulate_grad_batches)


def count_step_once(trainer: pl.Trainer) -> None:
    """Correct the count of steps, at the start of one.

    After a resume from within a step Lightning has counted that step twice, and by these numbers it tells where in a
    step a later checkpoint was saved.
    """
    total: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    total.ready, total.started = total.completed + 1, total.completed


def set_accumulation(trainer: pl.Trainer) -> None:
    """Set the accumulation of the present epoch, at the start of a run.

    Lightning's scheduler sets it when an epoch starts, and so not if a run is resumed within one.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            trainer.accumulate_grad_batches = callback.get_accumulate_grad_batches(trainer.current_epoch)


def correct_place(trainer: pl.Trainer) -> None:
    """Put a resumed run where its checkpoint was saved, at the end of a batch or of an epoch.

    After a batch Lightning skips the validation that was due. Of an epoch that begins right after a resume it keeps no
    count, so that after a second resume within that epoch it trains longer than it should. And after the very end of an
    epoch it goes on in that epoch.
    """
    fit, epoch = trainer.fit_loop, trainer.fit_loop.epoch_loop
    seen: Any = epoch.val_loop.batch_progress.total
    seen.ready = seen.started = seen.processed = seen.completed  # or every later checkpoint seems to fall into one
    if not epoch.restarted_on_train_batch_end:
        epochs: Any = fit.epoch_progress.total
        if epochs.ready == epochs.completed and epoch.batch_progress.current.ready >= trainer.num_training_batches:
            epoch.restarting = False  # so that the next epoch begins at its first batch
        return
    was_last = fit.restarted_mid_epoch and epoch.batch_progress.is_last_batch
    if epoch._should_check_val_fx(fit._data_fetcher):  # type: ignore[arg-type]
        if was_last:
            # Lightning has just counted the epoch as done.
            progress: Any
            for progress in (fit.epoch_progress.total, fit.epoch_progress.current):
                progress.processed, progress.completed = progress.processed - 1, progress.completed - 1
        epoch.batch_progress.increment_completed()
        epoch._restart_stage = TrainingStage.RESTARTED_ON_LAST
        epoch.val_loop._restart_stage = EvaluationStage.RESTARTED_MID_EVALUATION
        epoch.val_loop.batch_progress.current.reset()
    elif was_last:
        fit._restart_stage = FitStage.NONE


def validate_again_after_resume(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Prepare a checkpoint within a validation, for a run that ends: one resumed from it does the whole validation."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            callback._swap_models(module)  # the averaged weights are in the module during validation
    progress: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    progress.total.ready = progress.total.started = progress.total.completed + 1
    progress.total.processed = progress.total.completed
    progress.current.reset()


def unlogged_metrics(trainer: pl.Trainer) -> dict[str, Any] | None:
    """Return what Lightning will log of the batch that has just ended, but has not when a checkpoint is saved then."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    connector = trainer._logger_connector
    at_batch_end = trainer.training and progress.processed == progress.completed + 1
    if not at_batch_end or trainer.fit_loop._should_accumulate() or not connector.should_update_logs:
        return None
    metrics: dict[str, Any] = convert_tensors_to_scalars(dict(connector.metrics["log"]))
    return {"epoch": trainer.current_epoch, **metrics} if metrics else None


def log_metrics(trainer: pl.Trainer, metrics: dict[str, Any]) -> None:
    """Log as Lightning would have done, when a run is resumed."""
    trainer._logger_connector.log_metrics(metrics)


def scales_gradients(trainer: pl.Trainer) -> bool:
    """Tell whether gradients are scaled against underflow, so that one may be infinite without harm."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def shares_weights_out(trainer: pl.Trainer) -> bool:
    """Tell whether no process has all weights, and checkpoints are folders to which each adds its own."""
    strategy: Any = trainer.strategy
    return bool(
        (isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint)
        or (isinstance(strategy, FSDPStrategy) and strategy._state_dict_type == "sharded")
    )


def loads_weights_in_place(trainer: pl.Trainer) -> bool:
    """Tell whether the strategy has put the weights of a checkpoint into the module when a module is told of it."""
    return isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy))


def let_children_end(trainer: pl.Trainer) -> None:
    """Have the process that started the others not be killed because one of them has ended before it."""
    # The thread that watches them shares this list, and ends when no process is left in it.
    getattr(trainer.strategy.launcher, "procs", []).clear()


def is_csv_open(logger: CSVLogger) -> bool:
    """Tell whether a logger has begun its file; it deletes an older one when it does."""
    return logger._experiment is not None


def csv_columns(logger: CSVLogger) -> list[str]:
    """Return the columns of a logger's file, as the logger knows them."""
    columns: list[str] = logger.experiment.metrics_keys
    return columns


def next_logged_step(trainer: pl.Trainer) -> int:
    """Return the step that the next row of a log has."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def listen_too(trainer: pl.Trainer, begin: Callable[[], None], end: Callable[[], None]) -> None:
    """Have functions called when Lightning has set its handlers of signals, and before it takes them back.

    On SIGTERM Lightning's own handler waits for other processes, which may be waiting for this one. It takes handlers
    back also after an exception, when modules are told nothing.

    Args:
        trainer: The Trainer of a fit that is being set up.
        begin: Called as soon as Lightning listens.
        end: Called at the end of the fit, whatever that is.
    """
    connector = trainer._signal_connector

    def register() -> None:
        type(connector).register_signal_handlers(connector)
        begin()

    def teardown() -> None:
        for name in ("register_signal_handlers", "teardown"):
            vars(connector).pop(name, None)
        end()
        connector.teardown()

    connector.register_signal_handlers = register  # type: ignore[method-assign]
    connector.teardown = teardown  # type: ignore[method-assign]


def forget_sigterm(trainer: pl.Trainer) -> None:
    """Have Lightning not end a run on a SIGTERM that its own handler has seen."""
    trainer._signal_connector.received_sigterm = False


def cluster_environment(trainer: pl.Trainer) -> Any:
    """Return what started the processes of a run; None if nothing did."""
    return trainer._accelerator_connector.cluster_environment


def end_launched_processes(trainer: pl.Trainer) -> None:
    """End the processes that a Trainer has started to train with, which would wait for this one."""
    if isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
        trainer.strategy.launcher.kill(getattr(signal, "SIGKILL", signal.SIGTERM))


def trains_elsewhere(trainer: pl.Trainer) -> bool:
    """Tell whether a run is in spawned or forked processes, which bring back weights and no counts."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def compute_alone_after_fork(trainer: pl.Trainer) -> None:
    """Have a forked process (``ddp_notebook``) compute with one thread.

    The threads of OpenMP are not in it, and it waits for them for ever if the process it comes from had used them.
    """
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _MultiProcessingLauncher) and launcher._start_method == "fork":
        torch.set_num_threads(1)


def keep_double_precision(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Give a module and its average the precision of ``64-true`` before a checkpoint is loaded into them.

    Lightning does so after that, when float32 has rounded what was loaded, and never to the average, which then rounds
    the weights in every evaluation.
    """
    if not isinstance(trainer.precision_plugin, DoublePrecision):
        return
    module.double()
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            callback._average_model.double()


def rescale_epoch(trainer: pl.Trainer, before: int, now: int, same_windows: bool) -> None:
    """Have an epoch go on as far along as it was, when it has another number of batches than in the checkpoint.

    Args:
        trainer: The Trainer, whose loops have been restored.
        before: Batches in the data of an epoch when the checkpoint was saved.
        now: Batches in the data of an epoch.
        same_windows: Whether as many batches make an optimizer step as before; otherwise the next one begins a step.
    """
    limit = trainer.limit_train_batches
    before, now = (min(size, limit) if isinstance(limit, int) else int(size * limit) for size in (before, now))
    if before == now and same_windows:
        return
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    ready, window = progress.ready, trainer.accumulate_grad_batches
    there = now
    if ready < before:
        part = ready % window if same_windows else 0
        windows = min(ready * now // before, now - 1 - part) // window
        there = max(0, windows) * window + part
    for name in ("ready", "started", "processed", "completed"):
        setattr(progress, name, max(0, getattr(progress, name) + there - ready))


def saving_intervals(trainer: pl.Trainer) -> dict[str, int]:
    """Return after how many optimizer steps checkpoints are saved, by what that is set with."""
    every = {saver._every_n_train_steps for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)}
    return {f"every_n_train_steps {number}": number for number in sorted(every) if number > 0}


class StepsBetween:
    """Has Lightning's training loop take steps before each of its own, without a turn for callbacks and loggers.

    Args:
        trainer: The Trainer of a run that begins.
        steps: Callbacks have their turn when the number of optimizer steps is a multiple of this.
        on_device: Whether batches are on the device, and as they are to be.

    Attributes:
        within: Whether the step that is being taken is one of them.
    """

    def __init__(self, trainer: pl.Trainer, steps: int, on_device: bool = False) -> None:
        self.within = False
        self._trainer, self._steps, self._on_device = trainer, steps, on_device
        self._epoch = trainer.fit_loop.epoch_loop
        self._advance = self._epoch.advance
        self._epoch.advance = self._several  # type: ignore[method-assign]

    def remove(self) -> None:
        """Leave the loop as it was."""
        if "advance" in vars(self._epoch):
            del self._epoch.advance

    def _several(self, data_fetcher: Any) -> None:
        # A resumed run may have to validate first.
        while not self._epoch.restarting and not self._is_turn(data_fetcher):
            self.within = True
            try:
                self._step(data_fetcher)
            finally:
                self.within = False
        self._advance(data_fetcher)

    def _is_turn(self, data_fetcher: Any) -> bool:
        """Tell whether callbacks have their turn after the next batch."""
        trainer, epoch = self._trainer, self._epoch
        if trainer.should_stop:
            return True
        batch = epoch.batch_progress.current.ready + 1
        in_data = data_fetcher.length is not None and data_fetcher.fetched + 1 >= data_fetcher.length
        if in_data or batch >= trainer.num_training_batches:
            return True
        every = trainer.val_check_batch
        if trainer.enable_validation and every not in (None, float("inf")):
            counted = epoch.total_batch_idx + 2 if trainer.check_val_every_n_epoch is None else batch
            if counted % every == 0:
                return True
        if batch % trainer.accumulate_grad_batches:
            return False
        step = epoch.global_step + 1
        return step % self._steps == 0 or step == trainer.max_steps

    def _step(self, data_fetcher: Any) -> None:
        """Do with a batch what Lightning does, all but the turn of callbacks and loggers."""
        trainer, epoch = self._trainer, self._epoch
        module, progress = trainer.lightning_module, epoch.batch_progress
        batch, _, _ = next(data_fetcher)
        index = epoch.batch_idx + 1
        progress.is_last_batch = data_fetcher.done
        if not self._on_device:
            batch = trainer.precision_plugin.convert_input(batch)
            batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
            batch = call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)
        progress.increment_ready()
        trainer._logger_connector.on_batch_start(batch)
        if call._call_lightning_module_hook(trainer, "on_train_batch_start", batch, index) == -1:
            progress.increment_by(0, is_last_batch=True)
            progress.increment_processed()
            raise StopIteration
        call._call_strategy_hook(trainer, "on_train_batch_start", batch, index)
        progress.increment_started()
        if self._on_device:
            arguments: Any = OrderedDict(batch=batch, batch_idx=index)
        else:
            arguments = epoch._build_kwargs(OrderedDict(), batch, index)
        outputs = epoch.automatic_optimization.run(trainer.optimizers[0], index, arguments)
        progress.increment_processed()
        epoch.update_lr_schedulers("step", update_plateau_schedulers=False)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if getattr(callback, "every_step", isinstance(callback, WeightAveraging)):
                module._current_fx_name = "on_train_batch_end"  # so that it may log
                try:
                    callback.on_train_batch_end(trainer, module, outputs, batch, index)
                finally:
                    module._current_fx_name = None
        call._call_lightning_module_hook(trainer, "on_train_batch_end", outputs, batch, index)
        progress.increment_completed()
        epoch.update_lr_schedulers("step", update_plateau_schedulers=True)
        if not epoch._should_accumulate():
            epoch._batches_that_stepped += 1


class OwnStep:
    """Has Lightning's training loop take steps of our own in place of closure, backward pass and optimizer.

    Args:
        trainer: The Trainer of a run that begins.
        step: Called with the batch, and whether it is the first and the last one of an optimizer step; returns the
            loss.
    """

    def __init__(self, trainer: pl.Trainer, step: Callable[[Any, bool, bool], torch.Tensor]) -> None:
        self._trainer, self._step = trainer, step
        self._optimization = trainer.fit_loop.epoch_loop.automatic_optimization
        self._optimization.run = self._run  # type: ignore[method-assign]

    def remove(self) -> None:
        """Leave the loop as it was."""
        vars(self._optimization).pop("run", None)

    def _run(self, optimizer: Any, batch_idx: int, kwargs: Any) -> dict[str, Any]:
        trainer, progress = self._trainer, self._optimization.optim_progress.optimizer
        first = batch_idx % trainer.accumulate_grad_batches == 0
        last = not trainer.fit_loop._should_accumulate()
        if first:
            progress.zero_grad.increment_ready()
            progress.zero_grad.increment_started()
            progress.zero_grad.increment_completed()
        if last:
            progress.step.increment_ready()
        loss = self._step(kwargs["batch"], first, last)
        if last:
            progress.step.increment_completed()
        parts = trainer.accumulate_grad_batches
        return {"loss": loss / parts if parts > 1 else loss}  # as Lightning has it


def average_of(callback: WeightAveraging) -> AveragedModel | None:
    """Return the average of a callback; None outside a fit."""
    return callback._average_model


def has_own_device(callback: WeightAveraging) -> bool:
    """Tell whether a callback was told where its average is to lie."""
    return callback._device is not None


def is_average_due(callback: WeightAveraging, step: int) -> bool:
    """Tell whether a callback updates its average when so many optimizer steps have been taken."""
    return step > callback._latest_update_step and callback.should_update(step_idx=step - 1)


def note_average(callback: WeightAveraging, step: int) -> None:
    """Have a callback know that its average has been updated when so many optimizer steps had been taken."""
    callback._latest_update_step = step


@contextmanager
def within_training_step(module: pl.LightningModule) -> Iterator[None]:
    """Let a module log as it does in its ``training_step``."""
    module._current_fx_name = "training_step"
    try:
        yield
    finally:
        module._current_fx_name = None


def is_on_one_device(trainer: pl.Trainer) -> bool:
    """Tell whether a run is one process that trains on one device, without a strategy of its own kind."""
    return type(trainer.strategy) is SingleDeviceStrategy


class ConfigWinsCLI(LightningCLI):
    """LightningCLI in which the config always wins over a checkpoint.

    Lightning would let the hyperparameters in a checkpoint override the given ones unseen.
    """

    def _parse_ckpt_path(self) -> None:
        """Do nothing."""


class _WrappedSource(_DataLoaderSource):
    """Lightning's source of loaders (a DataModule, a module or a loader), with a function around it."""

    def __init__(self, instance: Any, name: str, wrap: Callable[[Any], Any]) -> None:
        super().__init__(instance, name)
        self.wrap = wrap

    def dataloader(self) -> Any:
        return self.wrap(super().dataloader())

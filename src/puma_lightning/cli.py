"""The command line: ``puma fit|validate|test|predict --config FILE``."""

import os
import re
import shlex
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

import puma_lightning
from puma_lightning.callbacks import GenerationEvaluation, PredictionWriter, StepProgressBar, UnmaskingTrajectory
from puma_lightning.data.base import DataOffer
from puma_lightning.errors import sentence_of
from puma_lightning.files import clear_unfinished
from puma_lightning.modules.base import StreamedModule
from puma_lightning.training.checkpoints import is_sharded, load_checkpoint
from puma_lightning.training.lightning_internals import ConfigWinsCLI, end_launched_processes, trains_elsewhere
from puma_lightning.training.stopping import Stopped

# Lightning's own command line calls these; its users can do nothing about it.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

SPECIAL_CHECKPOINTS = ("best", "last", "hpc", "registry")
LIGHTNING = os.path.join(Path(lightning.__file__).parent, "")
RUNS = "runs"  # the folder of all runs
TRACEBACK = "PUMA_TRACEBACK"  # an environment variable: 1 shows where an error comes from
_GRACE = 3.0  # seconds in which the first process says what all would say, and ends the others


class PumaArgumentParser(LightningArgumentParser):
    """A parser that takes null for an argument of a class within a class."""

    def parse_args(self, args: Any = None, *more: Any, **options: Any) -> Any:
        """Parse arguments; see jsonargparse."""
        if args is not None and not self.exit_on_error:
            # The parser of a class within a class. jsonargparse (4.51 to 4.53) has read the null, and hands it on as
            # Python prints it, which is a text.
            args = [re.sub(r"=None\Z", "=null", each) for each in args]
        return super().parse_args(args, *more, **options)


class PumaCLI(ConfigWinsCLI):
    """LightningCLI with the links between data and model, a name for every run, and errors in a sentence."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Run the command. What this package or the Trainer refuses ends it in a sentence; other errors are tracebacks.

        Raises:
            SystemExit: Then: with 2 if an argument is at fault, as for an unknown one, and with 1 later.
        """
        try:
            super().__init__(*args, **kwargs)
        except Exception as error:
            sentence = sentence_of(error)
            if sentence is None and isinstance(error, ValueError | MisconfigurationException):
                sentence = sentence_of(error, LIGHTNING)  # the Trainer refuses settings by these two
            if sentence is None:
                raise
            _show_traceback()
            _say(sentence.strip())
            if hasattr(self, "trainer"):
                end_launched_processes(self.trainer)
            raise SystemExit(1) from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's name; take the vocabulary and the mask token from the DataModule."""
        parser.add_argument(
            "--name",
            type=str | None,
            default=None,
            help=f"The run's name: it is logged to {RUNS}/NAME/version_N, for TensorBoard and as CSV, unless "
            "trainer.logger says otherwise. By default the path of the first --config, from its folder `configs` on.",
        )
        for target, offered in (
            ("model.init_args.mask_id", _mask_id),
            ("model.init_args.backbone.init_args.vocab_size", _vocab_size),
            ("model.init_args.eos_id", _eos_id),
        ):
            parser.link_arguments("data", target, compute_fn=self._linked(target, offered), apply_on="instantiate")

    def _linked(self, target: str, offered: Callable[[LightningDataModule], int | None]) -> Callable[[Any], int | None]:
        """Return a function that takes a value from the DataModule, and refuses another one that was given as well."""

        def taken(data: LightningDataModule) -> int | None:
            value, run = offered(data), self.config[self.subcommand] if self.subcommand else self.config
            given = run.get(target)
            if given not in (None, value):
                raise ValueError(
                    f"{target}: expected {value}, which is what the data has, got {given}, which would not be used; "
                    "leave it out"
                )
            return value

        return taken

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Refuse a seed that no generator takes, which would be a traceback from numpy."""
        super().parse_arguments(parser, args)
        run = self.config[self.config.subcommand] if "subcommand" in self.config else self.config
        seed = run.get("seed_everything")
        if not isinstance(seed, bool | None) and not 0 <= seed < 2**32:
            parser.error(f"seed_everything: expected 0..{2**32 - 1}, got {seed}; choose another")

    def before_instantiate_classes(self) -> None:
        """Name the run; refuse an unreadable checkpoint before anything is built."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        if config.name is None and config.trainer.logger is None:
            # Into the config, so that a saved one says whose it is.
            config.name = default_name(config.get("config"))
        if config.name is not None:
            try:
                check_name(config.name)
            except ValueError as error:
                self.parser.error(str(error))
        path = config.get("ckpt_path") if self.subcommand else None
        if path == "last" and config.name is not None and config.trainer.logger is None:
            # Lightning would look into the folder of the run that is about to begin, and begin at step 0.
            try:
                path = config.ckpt_path = str(newest_checkpoint(_runs(config) / config.name))
            except ValueError as error:
                self.parser.error(str(error))
            rank_zero_info(f"{self.subcommand} from {path}")
        if path and path not in SPECIAL_CHECKPOINTS and not str(path).startswith("registry"):
            load_checkpoint(path)
        start = (config.model.get("init_args") or {}).get("init_from") if self.subcommand and config.model else None
        if start and not path and str(start).endswith(".ckpt"):
            load_checkpoint(start)  # before a large data set is prepared for nothing
        if self.subcommand in ("validate", "test", "predict") and not path and not start:
            rank_zero_warn(
                f"{self.subcommand} without --ckpt_path or init_from: the weights are random, unless the backbone "
                "brings its own"
            )

    def instantiate_classes(self) -> None:
        """Report an impossible value as an unknown key is reported: in a sentence, not in a traceback."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            _show_traceback()
            self.parser.error(str(cause))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add loggers, the step progress bar and, for ``predict``, the writer, unless the config brings its own."""
        run = self.config_init[self.subcommand] if self.subcommand else self.config_init
        config = run.get("trainer") or {}
        given = config.get("callbacks") or []
        callbacks = list(given) if isinstance(given, list) else [given]
        if config.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(StepProgressBar())
        if self.subcommand == "predict" and not any(isinstance(c, PredictionWriter) for c in callbacks):
            callbacks.append(PredictionWriter())
        if config.get("logger") is None and "logger" not in kwargs and not config.get("barebones"):
            folder = _runs(run)
            kwargs["logger"] = [TensorBoardLogger(folder, run.name), CSVLogger(folder, run.name)]
        trainer = super().instantiate_trainer(callbacks=callbacks, **kwargs)
        for logger in trainer.loggers:
            # All loggers settle on a version before the first of them makes its folder.
            _ = logger.version
        return trainer

    def after_fit(self) -> None:
        """Print how the run went and where everything is."""
        trainer = self.trainer
        folder = trainer.log_dir  # asks all ranks, so it must not be left to rank 0
        if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        steps = "" if trains_elsewhere(trainer) else f" for {trainer.global_step:,} optimizer steps"
        lines = [f"\nTrained{steps}."]
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GenerationEvaluation):
                lines += [f"  {line}" for line in callback.summary]
        places: list[tuple[str, str | Path | None]] = [("logs", folder)]
        for checkpoint in trainer.checkpoint_callbacks:
            name = "best checkpoint" if getattr(checkpoint, "monitor", None) else "last checkpoint"
            places.append((name, getattr(checkpoint, "best_model_path", None)))
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, UnmaskingTrajectory) and callback.path is not None:
                places.append(("unmasking order", callback.path))
        lines += [f"  {name:<20} {_relative(place)}" for name, place in places if place]
        print("\n".join(lines))

    @rank_zero_only
    def after_predict(self) -> None:
        """Print where the predictions are."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, PredictionWriter) and callback.output is not None:
                print(f"Predictions: {_relative(callback.output)}")


def _show_traceback() -> None:
    """Print where the error that is handled comes from, if that has been asked for."""
    if os.environ.get(TRACEBACK, "0") not in ("", "0"):
        traceback.print_exc()


def _say(sentence: str) -> None:
    """Print why a run ends: once, if it is the same in all processes."""
    rank = getattr(rank_zero_only, "rank", None) or 0
    if rank:
        # If the first process says it as well, it ends this one meanwhile; so does whatever else started them.
        time.sleep(_GRACE)
    print(f"puma: error{f' (process {rank})' if rank else ''}: {sentence}", file=sys.stderr, flush=True)


def _mask_id(data: LightningDataModule) -> int:
    return DataOffer(data).required("mask_id")


def _vocab_size(data: LightningDataModule) -> int:
    return DataOffer(data).required("vocab_size")


def _eos_id(data: LightningDataModule) -> int | None:
    return DataOffer(data).eos_id


def default_name(configs: list[Any] | None) -> str:
    """Return the path of the first config file, without its ending, below the nearest folder ``configs``.

    Args:
        configs: The values of ``--config`` as jsonargparse keeps them: paths, or None for YAML given as text.

    Returns:
        The name of the file alone if it is in no such folder; ``unnamed`` if there is no file.
    """
    files = [config for config in configs or [] if config is not None]
    if not files:
        return "unnamed"
    path = Path(os.path.normpath(files[0].absolute))
    folder = next((folder for folder in path.parents if folder.name == "configs"), path.parent)
    return path.relative_to(folder).with_suffix("").as_posix()


def check_name(name: str) -> None:
    """Check that a name is a folder below that of all runs.

    Raises:
        ValueError: If it is empty or absolute, or has ``.`` or ``..`` in it.
    """
    if any(part.strip() in ("", ".", "..") for part in re.split(r"[/\\]", name)):
        raise ValueError(
            f"name: expected a path below {RUNS}/ such as sudoku/puma, without '.' and '..', got {name!r}; give another"
        )


def _runs(config: Any) -> Path:
    return Path((config.get("trainer") or {}).get("default_root_dir") or ".") / RUNS


def _relative(path: str | Path) -> str:
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def newest_checkpoint(folder: Path) -> Path:
    """Return the checkpoint to go on from of a run's newest version that has one.

    Args:
        folder: That of the run's versions.

    Raises:
        ValueError: If none has one.
    """
    for part in folder.glob("version_*/**/"):
        clear_unfinished(part)
    found = [path for path in folder.glob("version_*/**/*.ckpt") if path.is_file() or is_sharded(path)]
    if not found:
        raise ValueError(
            f"ckpt_path: expected a run with a checkpoint in {folder}, to go on from its last, got none; give the "
            "path of a checkpoint, or the --name of the run, or leave --ckpt_path out to begin a new one"
        )
    last = [path for path in found if path.stem.startswith("last")]
    return max(last or found, key=lambda path: path.stat().st_mtime_ns)


def resume_command(arguments: list[str], checkpoint: Path) -> str:
    """Return the command that goes on with a run from a checkpoint, given the arguments that began it."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and not argument.startswith("--ckpt_path"):
            kept.append(argument)
        skip = argument == "--ckpt_path"
    return shlex.join(["puma", *kept, "--ckpt_path", _relative(checkpoint)])


def main(args: ArgsType = None) -> None:
    """Run the command line.

    Args:
        args: Arguments instead of ``sys.argv[1:]``.
    """
    try:
        PumaCLI(
            StreamedModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_class=PumaArgumentParser,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"version": puma_lightning.__version__},
            args=args,
        )
        if torch.distributed.is_initialized():
            # Threads of PyTorch's that outlive Python abort the process now and then.
            torch.distributed.destroy_process_group()
    except Stopped as stopped:
        if stopped.checkpoint is not None and not getattr(rank_zero_only, "rank", 0):
            given = list(args) if isinstance(args, list) else sys.argv[1:]
            print(f"Go on with:\n  {resume_command(given, stopped.checkpoint)}")
        raise

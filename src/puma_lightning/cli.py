"""The command line: ``puma fit|validate|test|predict --config FILE``."""

import os
from pathlib import Path
from typing import Any

from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

import puma_lightning
from puma_lightning.callbacks import GenerationEvaluation, PredictionWriter, StepProgressBar, UnmaskingTrajectory
from puma_lightning.modules.base import StreamedModule
from puma_lightning.training.weights import load_checkpoint

# Lightning's own command line calls these; its users can do nothing about it.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

SPECIAL_CHECKPOINTS = ("best", "last", "hpc", "registry")


class PumaCLI(LightningCLI):
    """LightningCLI with the links between data and model, and with the config always winning over a checkpoint."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Take the vocabulary and the mask token from the DataModule."""
        parser.link_arguments("data.mask_id", "model.init_args.mask_id", apply_on="instantiate")
        parser.link_arguments(
            "data.vocab_size", "model.init_args.backbone.init_args.vocab_size", apply_on="instantiate"
        )
        parser.link_arguments("data", "model.init_args.eos_id", compute_fn=_eos_id, apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would let the checkpoint's hyperparameters override the given ones unseen."""

    def before_instantiate_classes(self) -> None:
        """Refuse an unreadable checkpoint before anything is built."""
        path = self.config[self.subcommand].get("ckpt_path") if self.subcommand else None
        if path and path not in SPECIAL_CHECKPOINTS and not str(path).startswith("registry"):
            load_checkpoint(path)
        model = self.config[self.subcommand].model if self.subcommand else None
        start = (model.get("init_args") or {}).get("init_from") if model else None
        if start and not path and str(start).endswith(".ckpt"):
            load_checkpoint(start)  # before a large data set is prepared for nothing
        if self.subcommand in ("validate", "test", "predict") and not path and not start:
            rank_zero_warn(
                f"{self.subcommand} without --ckpt_path or init_from: the weights are random, unless the backbone "
                "brings its own"
            )

    def instantiate_classes(self) -> None:
        """Report an impossible value as the command line reports an unknown key: in a sentence, not a traceback."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            self.parser.error(str(cause))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the step progress bar and, for ``predict``, the writer, unless the config brings its own."""
        config = self._get(self.config_init, "trainer", default={})
        given = config.get("callbacks") or []
        callbacks = list(given) if isinstance(given, list) else [given]
        if config.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(StepProgressBar())
        if self.subcommand == "predict" and not any(isinstance(c, PredictionWriter) for c in callbacks):
            callbacks.append(PredictionWriter())
        trainer = super().instantiate_trainer(callbacks=callbacks, **kwargs)
        for logger in trainer.loggers:
            # All loggers settle on a version before the first of them makes its folder.
            _ = logger.version
        return trainer

    def after_fit(self) -> None:
        """Say how it went and where everything is."""
        trainer = self.trainer
        folder = trainer.log_dir  # asks all ranks, so it must not be left to rank 0
        if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        lines = [f"\nTrained for {trainer.global_step:,} optimizer steps."]
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
        """Say where the predictions are."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, PredictionWriter) and callback.output is not None:
                print(f"Predictions: {_relative(callback.output)}")


def _eos_id(data: LightningDataModule) -> int | None:
    eos_id: int | None = getattr(data, "eos_id", None)
    return eos_id


def _relative(path: str | Path) -> str:
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def main(args: ArgsType = None) -> None:
    """Run the command line.

    Args:
        args: Arguments instead of ``sys.argv[1:]``.
    """
    PumaCLI(
        StreamedModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"version": puma_lightning.__version__},
        args=args,
    )

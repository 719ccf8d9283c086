"""The stream between Lightning and the user's train loader."""

import os
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader

from puma_lightning.training.lightning_internals import wrap_loaders
from puma_lightning.training.pooled import PooledStream
from puma_lightning.training.sequences import CleanSequences, derived_seed
from puma_lightning.training.stopping import LoaderWorker, loader_context
from puma_lightning.training.stream import Stream

if TYPE_CHECKING:
    from puma_lightning.modules.base import StreamedModule


PoolSize = int | Literal["all"] | None


class StreamLoading:
    """Builds a module's stream over any train DataLoader when a fit begins, and takes it down when the fit ends."""

    def __init__(self) -> None:
        self._fits = 0
        self._random_before: torch.Tensor | None = None
        self._changed: list[tuple[DataLoader[Any], Any, Any]] = []  # the user's loaders of validations, as they were

    def __getstate__(self) -> dict[str, Any]:
        """Leave loaders out of copies of a module."""
        return {**vars(self), "_changed": []}

    def begin(self, module: "StreamedModule") -> None:
        """Have Lightning iterate a stream instead of the user's train loader.

        Raises:
            ValueError: If an option of the Trainer works on loaders only, or would be divided by and is 0.
        """
        trainer = module.trainer
        if value := trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
            raise ValueError(
                "reload_dataloaders_every_n_epochs: expected 0, as it works on loaders, which the stream of chains "
                f"replaces, got {value}; leave it out and choose the sequences in the DataModule"
            )
        for option, instead in (
            ("accumulate_grad_batches", "leave it out for an update after every batch"),
            ("val_check_interval", "leave it out, or set limit_val_batches to 0 for no validation"),
        ):
            if getattr(trainer, option, None) == 0:
                raise ValueError(f"{option}: expected at least one batch, got 0; {instead}")
        self._random_before = torch.get_rng_state()
        # The stream is resumable: its state is in the module's part of the checkpoint.
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
        # Lightning infers the right size: that of the clean sequences, which come first in the batch.
        warnings.filterwarnings("ignore", message=".*infer the `batch_size` from an ambiguous collection.*")
        seed = derived_seed(shared_seed(trainer), self._fits) if self._fits else shared_seed(trainer)
        self._fits += 1
        wrap_loaders(trainer, partial(self.build, module, seed), partial(self._outliving_signals, trainer.global_rank))

    def build(self, module: "StreamedModule", seed: int, loader: Any) -> Any:
        """Build the stream over the user's train loader.

        Raises:
            ValueError: If it is no DataLoader, has too few sequences for one batch, or nothing says where a run ends.
        """
        if not isinstance(loader, DataLoader):
            raise ValueError(
                f"train_dataloader: expected one torch.utils.data.DataLoader, got {type(loader).__name__}; return a "
                "DataLoader"
            )
        trainer = module.trainer
        overfit: int | float = trainer.overfit_batches  # type: ignore[attr-defined]
        sequences = CleanSequences(
            loader,
            module.mask_id,
            module.vocab_size,
            trainer.global_rank,
            trainer.world_size,
            seed,
            module.shifted,
            overfit,
            module.forward_process.pool == "all",
        )
        groups = max(
            [trainer.accumulate_grad_batches]
            + [
                max(callback.scheduling.values())
                for callback in trainer.callbacks  # type: ignore[attr-defined]
                if isinstance(callback, GradientAccumulationScheduler)
            ]
        )
        if overfit and sequences.num_sequences is not None:
            # Lightning would take a share of what is a share already. No update has more batches than an epoch.
            trainer.limit_train_batches = steps_in_an_epoch(trainer, sequences)
            groups = max(1, min(groups, trainer.limit_train_batches))
        needed = sequences.batch_size * groups
        if sequences.num_sequences is not None and sequences.num_sequences // trainer.world_size < needed:
            raise ValueError(
                f"batch_size: expected at least {needed} training sequences for each of {trainer.world_size} "
                f"process(es) (batch size {sequences.batch_size} x accumulation {groups}), got "
                f"{sequences.num_sequences} in all; lower the batch size or bring more sequences"
            )
        settings: dict[str, Any] = {
            "sequences": sequences,
            "process": module.forward_process,
            "mask_id": module.mask_id,
            "batch_size": sequences.batch_size,
            "num_groups": groups,
            "num_steps": steps_in_an_epoch(trainer, sequences),
            "seed": seed,
            "device": trainer.strategy.root_device,
            "block_size": module.block_size,
        }
        pool = checked_pool(module.forward_process.pool, needed, sequences)
        if pool is None:
            module.stream = Stream(**settings)
        else:
            module.stream = PooledStream(None if pool == "all" else pool, **settings)
        module.resume.restore_stream(module.stream)
        return module.stream

    def end(self, module: "StreamedModule") -> None:
        """Let the loader's worker processes end, and leave all else as it was; also after an exception."""
        if hasattr(module, "stream"):
            module.stream.sequences.close()
        for loader, start, context in self._changed:
            loader.worker_init_fn, loader.multiprocessing_context = start, context
        self._changed = []
        if self._random_before is not None:
            # The seed of the last step is not to be that of what comes next in this process.
            torch.set_rng_state(self._random_before)
            self._random_before = None

    def _outliving_signals(self, rank: int, loaders: Any) -> Any:
        """Have the workers of validation loaders go on when all processes get a signal, see ``LoaderWorker``."""
        flat = [] if loaders is None else CombinedLoader(loaders).flattened
        for loader in flat:
            start = getattr(loader, "worker_init_fn", None)
            if not isinstance(loader, DataLoader) or not loader.num_workers or isinstance(start, LoaderWorker):
                continue
            self._changed.append((loader, start, loader.multiprocessing_context))
            if start is None and int(os.environ.get("PL_SEED_WORKERS", 0)):
                start = partial(pl_worker_init_function, rank=rank)  # as Lightning does where there is none
            loader.worker_init_fn = LoaderWorker(start)
            loader.multiprocessing_context = loader_context(loader.multiprocessing_context)
        return loaders


def checked_pool(pool: PoolSize, needed: int, sequences: CleanSequences) -> PoolSize:
    """Return the pool of a run; None where it has as many chains as are trained on before any comes again.

    Args:
        pool: Of the forward process.
        needed: How many sequences are trained on in an update, by each process.
        sequences: The supply.

    Raises:
        ValueError: If it does not fit the batches or the data.
    """
    if pool is None or pool == "all" or pool == needed:
        return None if pool == needed else pool
    if pool % needed:
        nearest = max(1, round(pool / needed)) * needed
        raise ValueError(
            f"pool: expected a multiple of {needed}, the sequences of a process in an update (batch size x "
            f"accumulation), got {pool}; give {nearest}"
        )
    if sequences.num_sequences is not None and pool > (most := sequences.num_sequences // sequences.world_size):
        raise ValueError(
            f"pool: expected at most {most}, the training sequences of a process, got {pool}; give all for a chain for "
            "each of them"
        )
    return pool


def steps_in_an_epoch(trainer: pl.Trainer, sequences: CleanSequences) -> int:
    """Return the number of batches after which an epoch ends.

    Without a number of sequences an epoch is as long as the Trainer says: ``limit_train_batches``, or the whole run.

    Raises:
        ValueError: If the Trainer does not say.
    """
    if sequences.num_sequences is not None:
        return sequences.num_sequences // (sequences.batch_size * trainer.world_size)
    if isinstance(trainer.limit_train_batches, int):
        return trainer.limit_train_batches
    if trainer.max_steps > 0:
        return trainer.max_steps * trainer.accumulate_grad_batches
    raise ValueError(
        "max_steps: expected a number of steps, as the training data have no length and so no end, got none; set "
        "max_steps, or limit_train_batches and max_epochs, of the Trainer, or give the data set a length (__len__; "
        "num_sequences of the TextDataModule): the number of sequences that count as an epoch"
    )


def shared_seed(trainer: pl.Trainer) -> int:
    """Return the seed of the run, the same on all ranks."""
    # Without seed_everything each process has another initial seed.
    return int(trainer.strategy.broadcast(torch.initial_seed())) & (2**63 - 1)

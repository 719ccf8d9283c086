"""Rows of CSV logs that a run goes on with, where it is resumed into the folder that it logged to before."""

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities import rank_zero_warn
from lightning.pytorch.loggers import CSVLogger

from puma_lightning.files import replacing
from puma_lightning.training.lightning_internals import csv_columns, is_csv_open

ASIDE = ".before"  # added to the name of a file for the moment in which Lightning would delete it


class KeptRows:
    """Keeps what a ``CSVLogger`` wrote before a run is resumed, which it deletes, and none of what comes twice.

    A checkpoint says how many rows there were.
    """

    def __init__(self) -> None:
        self._opened: list[tuple[CSVLogger, Path]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return KeptRows, ()  # files belong to a run, not to copies of a module, as EMA makes one

    def open(self, trainer: pl.Trainer) -> None:
        """Open the files of a run before Lightning does, which may be resumed; they stay as they are for now."""
        self._opened = [(log, path) for log, path in _files(trainer) if path.is_file() and not is_csv_open(log)]
        for logger, path in self._opened:
            aside = path.with_name(path.name + ASIDE)
            path.rename(aside)
            try:
                _ = logger.experiment
            finally:
                aside.rename(path)
            csv_columns(logger)[:] = _read(path)[0]

    def begin_anew(self) -> None:
        """Delete the files that were there, as Lightning does, if the run is not resumed."""
        for logger, path in self._opened:
            path.unlink(missing_ok=True)
            csv_columns(logger).clear()
        self._opened = []

    def count(self, trainer: pl.Trainer) -> list[int]:
        """Return how many rows each file has, once all that was logged is written."""
        for logger in trainer.loggers:
            logger.save()  # what was logged before a checkpoint is not lost by a kill after it
        return [_count_rows(path) for _, path in _files(trainer)]

    def cut(self, trainer: pl.Trainer, counts: list[int] | None, step: int) -> None:
        """Leave in each file what was logged before the checkpoint that a run is resumed from.

        Args:
            trainer: The Trainer, at the start of training.
            counts: What ``count`` returned then; None in checkpoints of version 0.2.0 and before.
            step: The step of the next row.

        Raises:
            ValueError: If a file is not of this run.
        """
        self._opened = []
        files = _files(trainer)
        for index, (logger, path) in enumerate(files):
            if not path.is_file():
                continue
            logger.save()
            columns, rows = _read(path)
            if counts is None or len(counts) != len(files):
                kept = [row for row in rows if _step(row) < step]
            else:
                kept = rows[: counts[index]]
                if len(kept) < counts[index]:
                    rank_zero_warn(
                        f"{path}: expected the {counts[index]} rows of this run, got {len(kept)}; some are lost"
                    )
                if any(_step(row) > step for row in kept):
                    raise ValueError(
                        f"logger: expected {path} to have what this run logged up to step {step}, got the rows of "
                        "another; log to another version, or move the file away"
                    )
            with replacing(path) as temporary, temporary.open("w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=columns)
                writer.writeheader()
                writer.writerows(kept)


def _files(trainer: pl.Trainer) -> list[tuple[CSVLogger, Path]]:
    """Return the CSV loggers of the process that writes, and their files."""
    if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return []
    loggers = [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)]
    return [(logger, Path(logger.log_dir, "metrics.csv")) for logger in loggers if "://" not in logger.log_dir]


def _count_rows(path: Path) -> int:
    if not path.is_file():
        return 0
    with path.open() as file:
        return sum(1 for _ in file) - 1


def _step(row: dict[str, Any]) -> float:
    return float(row.get("step") or 0)


def _read(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    return list(reader.fieldnames or []), rows

"""Predictions as JSON lines."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter


class PredictionWriter(BasePredictionWriter):
    """Writes one JSON object a sequence, in the order of the data set.

    Keys: ``index``, ``tokens``, ``reveal_step``, ``nfe``; ``dataloader`` where there are several; ``text`` where the
    DataModule has ``decode(tokens) -> str``. Every rank writes a part, and rank 0 joins them.

    Args:
        path: The file; null for ``predictions.jsonl`` in the log directory.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.path = path
        self.output: Path | None = None
        self._rows: Counter[int] = Counter()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open this rank's part."""
        folder = trainer.log_dir or trainer.default_root_dir
        self.output = Path(trainer.strategy.broadcast(self.path or str(Path(folder) / "predictions.jsonl")))
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self._part(trainer.global_rank).write_text("")
        self._rows.clear()

    def _part(self, rank: int) -> Path:
        assert self.output is not None
        return self.output.with_name(f"{self.output.name}.part{rank}")

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append a batch to this rank's part."""
        decode = getattr(trainer.datamodule, "decode", None)  # type: ignore[attr-defined]
        columns = {name: tensor.tolist() for name, tensor in prediction.items()}
        size = len(next(iter(columns.values())))
        several = isinstance(trainer.predict_dataloaders, list | tuple) and len(trainer.predict_dataloaders) > 1
        with self._part(trainer.global_rank).open("a") as part:
            for row in range(size):
                # An iterable data set has no indices: count.
                index = batch_indices[row] if batch_indices else self._rows[dataloader_idx]
                self._rows[dataloader_idx] += 1
                record = {"index": index, **{name: column[row] for name, column in columns.items()}}
                if several:
                    record = {"dataloader": dataloader_idx, **record}
                if decode is not None:
                    record["text"] = decode(prediction["tokens"][row])
                part.write(json.dumps(record) + "\n")

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Join the parts, by index."""
        trainer.strategy.barrier("predictions")
        if trainer.global_rank:
            return
        assert self.output is not None
        parts = [self._part(rank) for rank in range(trainer.world_size)]
        records = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
        records.sort(key=lambda record: (record.get("dataloader", 0), record["index"]))
        self.output.write_text("".join(json.dumps(record) + "\n" for record in records))
        for part in parts:
            part.unlink()

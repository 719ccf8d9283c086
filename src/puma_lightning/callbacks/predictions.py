"""Predictions as JSON lines."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter


class PredictionWriter(BasePredictionWriter):
    """Writes one JSON object a sequence, in the order of the data set.

    Keys: ``index``, ``tokens``, ``reveal_step``, ``nfe`` and, where the DataModule has ``decode(tokens) -> str``,
    ``text``. Every rank writes a part, and rank 0 joins them.

    Args:
        path: The file; null for ``predictions.jsonl`` in the log directory.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.path = path
        self.output: Path | None = None

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open this rank's part."""
        folder = trainer.log_dir or trainer.default_root_dir
        self.output = Path(trainer.strategy.broadcast(self.path or str(Path(folder) / "predictions.jsonl")))
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self._part(trainer.global_rank).write_text("")

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
        start = batch_idx * size
        with self._part(trainer.global_rank).open("a") as part:
            for row in range(size):
                index = batch_indices[row] if batch_indices else start + row
                record = {"index": index, **{name: column[row] for name, column in columns.items()}}
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
        lines = [line for part in parts for line in part.read_text().splitlines()]
        lines.sort(key=lambda line: json.loads(line)["index"])
        self.output.write_text("".join(line + "\n" for line in lines))
        for part in parts:
            part.unlink()

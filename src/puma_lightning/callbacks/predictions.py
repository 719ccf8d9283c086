"""Predictions as JSON lines."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from puma_lightning.callbacks.generation import GenerationEvaluation, decoded
from puma_lightning.data.base import offer_of


class PredictionWriter(BasePredictionWriter):
    """Write one JSON object for each sequence, in the order of the data set.

    Keys: ``index``, ``tokens``, ``reveal_step``, ``nfe``; ``dataloader`` where there are several; the texts of
    the DataModule's ``decode`` (see ``DataOffer``), such as ``prompt`` and ``completion``; ``answer`` where the
    batch has one; and what the metrics of a ``GenerationEvaluation`` say about a row, if they have
    ``judge(completions, answers) -> list[dict]``. Every rank writes a part, and rank 0 joins them.

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
        prediction = dict(prediction)
        real = prediction.pop("attention_mask", None)
        columns = {name: _without_padding(tensor, real) for name, tensor in prediction.items()}
        size = len(next(iter(columns.values())))
        described = self._described(trainer, prediction["tokens"], batch, real)
        several = isinstance(trainer.predict_dataloaders, list | tuple) and len(trainer.predict_dataloaders) > 1
        with self._part(trainer.global_rank).open("a") as part:
            for row in range(size):
                # An iterable data set has no indices: count.
                index = batch_indices[row] if batch_indices else self._rows[dataloader_idx]
                self._rows[dataloader_idx] += 1
                record = {"index": index, **{name: column[row] for name, column in columns.items()}}
                if several:
                    record = {"dataloader": dataloader_idx, **record}
                part.write(json.dumps({**record, **described[row]}) + "\n")

    def _described(self, trainer: pl.Trainer, tokens: Tensor, batch: Any, real: Tensor | None) -> list[dict[str, Any]]:
        """Return what can be said about each row beyond its tokens."""
        given = batch if isinstance(batch, Mapping) else {}
        rows: list[dict[str, Any]] = list(decoded(tokens, given.get("prompt_mask"), offer_of(trainer).decode, real))
        answers = given.get("answer")
        if answers is not None:
            rows = [{**row, "answer": answer} for row, answer in zip(rows, answers, strict=True)]
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            for metric in callback.metrics.values() if isinstance(callback, GenerationEvaluation) else ():
                judge: Any = getattr(metric, "judge", None)
                if judge is not None and all("completion" in row for row in rows):
                    judged = judge([row["completion"] for row in rows], answers)
                    rows = [{**row, **verdict} for row, verdict in zip(rows, judged, strict=True)]
        return rows

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


def _without_padding(column: Tensor, real: Tensor | None) -> list[Any]:
    """Return a column of predictions as lists, of the positions that are not padding."""
    if real is None or column.shape != real.shape:
        return list(column.tolist())
    return [row[kept].tolist() for row, kept in zip(column, real, strict=True)]

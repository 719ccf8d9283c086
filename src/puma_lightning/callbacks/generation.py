"""Evaluation by generating: complete held-out sequences and judge the result."""

import inspect
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities import rank_zero_warn
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric, SumMetric

from puma_lightning.chain.student import AnySampler, Sample
from puma_lightning.data.base import Decode, offer_of
from puma_lightning.data.batch import Batch
from puma_lightning.modules.generative import GenerativeModule, loader_suffix

# What a metric's update can ask for, by name.
GIVEN = ("tokens", "input_ids", "prompt_mask", "attention_mask", "completions", "answers")


class GenerationEvaluation(Callback):
    """Complete the prompts of the validation (or test) set with each sampler, and log each metric.

    Logged are ``val/<metric>/<sampler>``, such as ``val/solved/confidence_1``, or, for a metric with several results,
    ``val/<metric>_<result>/<sampler>``, such as ``val/program_accuracy/confidence_1``; and ``val/nfe/<sampler>``, the
    mean number of forward passes. Each rank completes its own share of the set.

    Metrics get what the arguments of their ``update`` ask for: ``tokens``, ``input_ids``, ``prompt_mask``, all (B, L),
    ``attention_mask``, which is None where nothing is padding, ``completions`` and ``answers``, lists of text. Padding
    comes last, and is no part of a completion. For ``completions`` the DataModule must offer
    ``decode`` (see ``DataOffer``), for ``answers`` the batches must have an ``answer``. A metric that asks for answers
    ignores sets without them, and warns if no set has any.

    Args:
        metrics: By name.
        samplers: The samplers to compare.
        num_examples: Complete at most this many sequences of each set (all ranks together); null for all.
        num_shown: Log the text of this many completions at every validation, to ``samples.md`` in the log directory and
            to TensorBoard; the DataModule must offer ``decode``.

    Raises:
        ValueError: If an argument is out of range, or two samplers have the same name.
    """

    def __init__(
        self,
        metrics: dict[str, Metric],
        samplers: list[AnySampler],
        num_examples: int | None = None,
        num_shown: int = 0,
    ) -> None:
        if not metrics or not samplers:
            raise ValueError(
                f"GenerationEvaluation: expected at least one metric and one sampler, got {len(metrics)} and "
                f"{len(samplers)}; name some, or leave the callback out"
            )
        if reserved := {"nfe", "examples"} & set(metrics):
            raise ValueError(
                f"metrics: expected names other than nfe and examples, which GenerationEvaluation counts itself, got "
                f"{reserved.pop()!r}; name the metric otherwise"
            )
        for name, metric in metrics.items():
            if unknown := set(arguments(metric)) - set(GIVEN):
                raise ValueError(
                    f"metrics: expected an update that takes some of {', '.join(GIVEN)}, got {sorted(unknown)} in "
                    f"metric {name!r}; rename its arguments"
                )
        names = [sampler.name for sampler in samplers]
        if len(set(names)) < len(names):
            raise ValueError(f"samplers: expected different names, got {names}; leave out one of those alike")
        if num_examples is not None and num_examples < 1:
            raise ValueError(f"num_examples: expected at least 1 or null, got {num_examples}; raise it")
        if num_shown < 0:
            raise ValueError(f"num_shown: expected at least 0, got {num_shown}; raise it")
        self.metrics = metrics
        self.samplers = samplers
        self.num_examples = num_examples
        self.num_shown = num_shown
        self.summary: list[str] = []
        self._results: dict[str, Metric] = {}
        self._seen: dict[int, int] = {}
        self._shown: list[str] = []
        self._warned = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start a run, which has not been warned yet."""
        self._warned = False

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start counting from 0."""
        self._results = {}
        self._seen = {}
        self._shown = []

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Complete this batch's prompts with every sampler."""
        if trainer.sanity_checking:
            return
        assert isinstance(pl_module, GenerativeModule)
        checked = pl_module.checked(batch)
        batch = {**{name: column for name, column in batch.items() if name == "answer"}, **checked}
        seen = self._seen.get(dataloader_idx, 0)
        wanted = len(batch["input_ids"])
        if self.num_examples is not None:
            wanted = min(wanted, -(-self.num_examples // trainer.world_size) - seen)
        metrics = {
            name: metric
            for name, metric in self.metrics.items()
            if "answer" in batch or "answers" not in arguments(metric)
        }
        if wanted <= 0 or not metrics:
            return
        self._seen[dataloader_idx] = seen + wanted
        batch = {name: column[:wanted] for name, column in batch.items()}
        decode = offer_of(trainer).decode
        if decode is None and any("completions" in arguments(metric) for metric in metrics.values()):
            raise ValueError(
                "decode: expected a function (tokens, prompt_mask) -> dict[str, str] of the DataModule, as a metric "
                "asks for completions, which are text, got none; define it, or leave the metric out"
            )
        suffix = loader_suffix(trainer, dataloader_idx)
        for sampler in self.samplers:
            generator = pl_module.evaluation_generator(dataloader_idx, batch_idx)
            # Lightning runs callbacks outside of autocast.
            with trainer.precision_plugin.forward_context():
                sample = pl_module.sample(
                    batch["input_ids"], batch["prompt_mask"], sampler, generator, batch.get("attention_mask")
                )
            texts = decoded(sample.tokens, batch["prompt_mask"], decode, sample.attention_mask)
            judged = {
                "tokens": sample.tokens,
                "input_ids": batch["input_ids"],
                "prompt_mask": batch["prompt_mask"],
                "attention_mask": batch.get("attention_mask"),
                "completions": [text.get("completion") for text in texts],
                "answers": batch.get("answer"),
            }
            for name, metric in metrics.items():
                result = self._result(f"{name}/{sampler.name}{suffix}", metric, pl_module)
                result.update(**{argument: judged[argument] for argument in arguments(metric)})
            self._result(f"nfe/{sampler.name}{suffix}", MeanMetric(), pl_module).update(sample.nfe.float())
            self._result(f"examples/{sampler.name}{suffix}", SumMetric(), pl_module).update(wanted)
            self._show(sampler.name + suffix, sample, texts, batch)

    def _show(self, name: str, sample: Sample, texts: list[dict[str, str]], batch: Batch) -> None:
        """Keep the first completions as text."""
        done = sum(shown.startswith(f"### {name} ") for shown in self._shown)
        for row in range(min(self.num_shown - done, len(texts))):
            text = "\n\n".join(f"```\n{part}\n```" for part in texts[row].values())
            answer = f"\n\nanswer: {batch['answer'][row]}" if "answer" in batch else ""
            self._shown.append(f"### {name} {done + row + 1}, {int(sample.nfe[row])} passes\n\n{text}{answer}\n")

    def _result(self, name: str, metric: Metric, pl_module: pl.LightningModule) -> Metric:
        if name not in self._results:
            self._results[name] = metric.clone().to(pl_module.device)
            self._results[name].reset()
        return self._results[name]

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what was counted, over all ranks."""
        stage = "test" if trainer.testing else "val"
        self._warn_of_idle_metrics(trainer, stage)
        values = {name: metric.compute() for name, metric in self._results.items()}
        if values:
            self.summary = []
        for name, results in values.items():
            metric, of = name.split("/", 1)
            if metric == "examples":
                continue
            several = isinstance(results, dict)
            named = {f"{metric}_{key}": v for key, v in results.items()} if several else {metric: results}
            pl_module.log_dict({f"{stage}/{kind}/{of}": value for kind, value in named.items()})
            if metric in self.metrics:
                shown = ", ".join(f"{k} {v:.1%}" if 0 <= v <= 1 else f"{k} {v:.4g}" for k, v in named.items())
                number, passes = int(values[f"examples/{of}"]), float(values[f"nfe/{of}"])
                self.summary.append(f"{of:<20} {shown} ({number:,} sequences, {passes:.1f} passes each)")
        self._log_text(trainer)

    def _warn_of_idle_metrics(self, trainer: pl.Trainer, stage: str) -> None:
        """Say once what no set has answers for; such a metric is missing from the logs and nothing else shows it."""
        applied = {name.split("/")[0] for name in self._results}
        idle = [n for n, metric in self.metrics.items() if "answers" in arguments(metric) and n not in applied]
        if not idle or self._warned or trainer.sanity_checking:
            return
        self._warned = True
        rank_zero_warn(
            f"GenerationEvaluation logs nothing of {', '.join(map(repr, idle))}: expected a set whose batches have an "
            f"'answer', got none among the {stage} sets; give one with gold answers, or leave the metric out"
        )

    def _log_text(self, trainer: pl.Trainer) -> None:
        folder = trainer.log_dir  # asks all ranks, so it must not be left to rank 0
        if not self._shown or not trainer.is_global_zero or folder is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        text = "\n".join(self._shown)
        path = Path(folder) / "samples.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(f"## Step {trainer.global_step:,}\n\n{text}\n")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("samples", text, trainer.global_step)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do as in validation."""
        self.on_validation_start(trainer, pl_module)

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Do as in validation."""
        self.on_validation_batch_end(trainer, pl_module, *args)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do as in validation."""
        self.on_validation_epoch_end(trainer, pl_module)


def arguments(metric: Metric) -> list[str]:
    """Return the names of what a metric asks for at every update."""
    return list(inspect.signature(metric.update).parameters)


def decoded(
    tokens: Tensor, prompt_mask: Tensor | None, decode: Decode | None, attention_mask: Tensor | None = None
) -> list[dict[str, str]]:
    """Return the texts of every row, by the ``decode`` of a DataModule; no texts without it.

    Args:
        tokens: Token ids (B, L).
        prompt_mask: True where a position is given (B, L); None if nothing is. It may be shorter than the tokens.
        decode: See ``DataOffer``.
        attention_mask: False where a position is padding, which is left out (B, L); None if nothing is.
    """
    if decode is None:
        return [{} for _ in tokens]
    if prompt_mask is not None:
        # What was generated beyond the batch's length is answer.
        prompt_mask = F.pad(prompt_mask, (0, tokens.shape[1] - prompt_mask.shape[1])).cpu()
    given = [None] * len(tokens) if prompt_mask is None else prompt_mask
    if attention_mask is None:
        return [decode(row, mask) for row, mask in zip(tokens.cpu(), given, strict=True)]
    texts = []
    for row, mask, real in zip(tokens.cpu(), given, attention_mask.cpu(), strict=True):
        texts.append(decode(row[real], None if mask is None else mask[real]))
    return texts

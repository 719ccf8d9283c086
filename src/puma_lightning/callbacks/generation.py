"""Evaluation by generating: complete held-out sequences and judge the result."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torchmetrics import MeanMetric, Metric, SumMetric

from puma_lightning.modules.masked_diffusion import MaskedDiffusion, loader_suffix
from puma_lightning.sampling import Sampler


class GenerationEvaluation(Callback):
    """Completes the prompts of the validation (or test) set with each sampler and logs each metric.

    Logs ``val/<metric>/<sampler>``, such as ``val/solved/confidence_1``, and ``val/nfe/<sampler>``, the mean
    number of forward passes. Each rank completes its own share of the set.

    Args:
        metrics: By name; each is updated with ``(tokens, input_ids, prompt_mask)``, all (B, L).
        samplers: The samplers to compare.
        num_examples: Complete at most this many sequences of each set (all ranks together); null for all.

    Raises:
        ValueError: If an argument is out of range, or two samplers have the same name.
    """

    def __init__(self, metrics: dict[str, Metric], samplers: list[Sampler], num_examples: int | None = None) -> None:
        if not metrics or not samplers:
            raise ValueError("GenerationEvaluation needs at least one metric and one sampler")
        if reserved := {"nfe", "examples"} & set(metrics):
            raise ValueError(f"a metric cannot be called {reserved.pop()!r}: GenerationEvaluation counts that itself")
        names = [sampler.name for sampler in samplers]
        if len(set(names)) < len(names):
            raise ValueError(f"samplers must differ in name, got {names}")
        if num_examples is not None and num_examples < 1:
            raise ValueError(f"num_examples must be at least 1 or null, got {num_examples}")
        self.metrics = metrics
        self.samplers = samplers
        self.num_examples = num_examples
        self.summary: list[str] = []
        self._results: dict[str, Metric] = {}
        self._seen: dict[int, int] = {}

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start counting anew."""
        self._results = {}
        self._seen = {}

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
        assert isinstance(pl_module, MaskedDiffusion)
        seen = self._seen.get(dataloader_idx, 0)
        wanted = len(batch["input_ids"])
        if self.num_examples is not None:
            wanted = min(wanted, -(-self.num_examples // trainer.world_size) - seen)
        if wanted <= 0:
            return
        self._seen[dataloader_idx] = seen + wanted
        input_ids, prompt_mask = batch["input_ids"][:wanted], batch["prompt_mask"][:wanted]
        suffix = loader_suffix(trainer, dataloader_idx)
        for sampler in self.samplers:
            generator = pl_module.evaluation_generator(dataloader_idx, batch_idx)
            sample = pl_module.sample(input_ids, prompt_mask, sampler, generator)
            for name, metric in self.metrics.items():
                self._result(f"{name}/{sampler.name}{suffix}", metric, pl_module).update(
                    sample.tokens, input_ids, prompt_mask
                )
            self._result(f"nfe/{sampler.name}{suffix}", MeanMetric(), pl_module).update(sample.nfe.float())
            self._result(f"examples/{sampler.name}{suffix}", SumMetric(), pl_module).update(wanted)

    def _result(self, name: str, metric: Metric, pl_module: pl.LightningModule) -> Metric:
        if name not in self._results:
            self._results[name] = metric.clone().to(pl_module.device)
            self._results[name].reset()
        return self._results[name]

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what was counted, over all ranks."""
        stage = "test" if trainer.testing else "val"
        values = {name: metric.compute() for name, metric in self._results.items()}
        if values:
            self.summary = []
        for name, value in values.items():
            kind, of = name.split("/", 1)
            if kind == "examples":
                continue
            pl_module.log(f"{stage}/{name}", value)
            if kind in self.metrics:
                shown = f"{value:.1%}" if 0 <= value <= 1 else f"{value:.4g}"
                number, passes = int(values[f"examples/{of}"]), float(values[f"nfe/{of}"])
                self.summary.append(f"{of:<20} {kind} {shown} ({number:,} sequences, {passes:.1f} passes each)")

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As in validation."""
        self.on_validation_start(trainer, pl_module)

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """As in validation."""
        self.on_validation_batch_end(trainer, pl_module, *args)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As in validation."""
        self.on_validation_epoch_end(trainer, pl_module)

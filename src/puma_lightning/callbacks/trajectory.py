"""Pictures of the order in which the model fills fixed validation sequences, as training goes on."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT
from matplotlib.figure import Figure

from puma_lightning.callbacks.pictures import draw_reveal_order, save_picture
from puma_lightning.chain.student import AnySampler
from puma_lightning.data.base import Picture, offer_of
from puma_lightning.modules.generative import GenerativeModule


class UnmaskingTrajectory(Callback):
    """Draw, for fixed validation sequences, the step at which each position is filled (Figure 3 of arXiv 2602.10314).

    The picture has one row for each sequence and one column for each validation. Every validation draws it again, as
    ``unmasking_order.png`` in the log directory and in TensorBoard. Sequences are strips, unless the DataModule offers
    a ``picture`` (see ``DataOffer``).

    Args:
        num_examples: Number of sequences to follow: the first of the first validation set.
        sampler: What fills them in; null for the model's own sampler.
        max_columns: Validations shown, spread evenly from the first to the latest.

    Raises:
        ValueError: If a number is below 1.
    """

    def __init__(self, num_examples: int = 2, sampler: AnySampler | None = None, max_columns: int = 5) -> None:
        for name, number in (("num_examples", num_examples), ("max_columns", max_columns)):
            if number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}; raise it")
        self.num_examples = num_examples
        self.sampler = sampler
        self.max_columns = max_columns
        self.path: Path | None = None
        self.history: list[dict[str, Any]] = []

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Fill in the sequences that are followed."""
        if batch_idx or dataloader_idx or trainer.sanity_checking or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, GenerativeModule)
        batch = pl_module.checked(batch)
        input_ids = batch["input_ids"][: self.num_examples]
        prompt_mask = batch["prompt_mask"][: self.num_examples]
        # Lightning runs callbacks outside of autocast.
        with trainer.precision_plugin.forward_context():
            padding = {name: mask[: self.num_examples] for name, mask in batch.items() if name == "attention_mask"}
            generator = pl_module.evaluation_generator(0, 0)
            sample = pl_module.sample(input_ids, prompt_mask, self.sampler, generator, **padding)
        self.history = [past for past in self.history if past["step"] < trainer.global_step]
        self.history.append(
            {
                "step": trainer.global_step,
                "tokens": sample.tokens[:, : input_ids.shape[1]].cpu(),
                "reveal_step": sample.reveal_step[:, : input_ids.shape[1]].cpu(),
                "target": input_ids.cpu(),
            }
        )

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw what has been seen so far."""
        drawing = self.history and not trainer.sanity_checking
        draw = partial(self.draw, offer_of(trainer).picture) if drawing else None
        path = save_picture(trainer, "unmasking_order", draw)
        self.path = path or self.path

    def draw(self, picture: Picture | None = None) -> Figure:
        """Draw the validations seen so far: sequences as ``picture`` says, or as strips."""
        last = len(self.history) - 1
        picked = torch.linspace(0, last, min(self.max_columns, last + 1)).round().long().tolist()
        columns = [self.history[index] for index in picked]
        rows = len(columns[0]["tokens"])
        panels = [
            [(column["tokens"][row], column["reveal_step"][row], column["target"][row]) for column in columns]
            for row in range(rows)
        ]
        return draw_reveal_order(panels, [f"step {column['step']:,}" for column in columns], picture)

    def state_dict(self) -> dict[str, Any]:
        """Return what has been seen, so that a resumed run goes on with the same picture."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the picture of a checkpoint."""
        self.history = state_dict["history"]

"""What the chains do while a model trains on them, and how far their masks are from those that sampling meets."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT
from matplotlib.figure import Figure
from torch import Tensor

from puma_lightning.callbacks.pictures import draw_chains, save_picture
from puma_lightning.chain.blocks import cut_blocks
from puma_lightning.chain.chains import Chains
from puma_lightning.chain.step import Unmasking
from puma_lightning.chain.student import AnySampler
from puma_lightning.modules.masked_diffusion import MaskedDiffusion
from puma_lightning.output.losses import negative_log_likelihood
from puma_lightning.output.prediction import Prediction


class ChainDiagnostics(Callback):
    """Log at every validation what the chains did since the last one, and draw ``chains.png`` in the log directory.

    - ``chain/mismatch``: how far the masks trained on are from those the sampler meets, see ``mismatch``: about 1 for
      random masks, 0 if they are the sampler's own. The sampler starts from the prompts of the next batch, with the
      weights that are validated: those of EMA, if it is used.
    - ``chain/loss_1``, ``chain/loss_2``, ...: the training loss in nats per token, where little to most of the answer
      is revealed.
    - ``chain/by_count``, ``chain/by_threshold``: positions revealed in a step after which a chain goes on, by the
      target count alone and because they are above the threshold.
    - ``chain/length``: training steps of the chains that ended, of those whose start was seen; not of those in a pool.
    - ``chain/sequences``: clean sequences taken since the start of training, all processes together.

    Args:
        sampler: Whose masks are compared with; null for the model's own sampler.
        num_sequences: At most so many sequences of the next batch have their masks compared, in each process.
        num_parts: Equal parts of the share revealed to tell the loss of.

    Attributes:
        in_place: That what it does in a step is work on tensors that stay where they are, so that it can be part of a
            recorded step.

    Raises:
        ValueError: If a number is below 1, or (when training starts) the model has no chains.
    """

    in_place = True

    def __init__(self, sampler: AnySampler | None = None, num_sequences: int = 64, num_parts: int = 4) -> None:
        for name, number in (("num_sequences", num_sequences), ("num_parts", num_parts)):
            if number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}; raise it")
        self.sampler = sampler
        self.num_sequences = num_sequences
        self.num_parts = num_parts
        self.path: Path | None = None
        self.history: list[dict[str, float]] = []
        self._sums: dict[str, Tensor] = {}  # since the last validation; they stay where they are
        self._agreed: tuple[Tensor, Tensor] | None = None
        self._ages: dict[int, tuple[int, Tensor]] = {}  # by group: block length, and steps so far, (B, blocks)
        self._unmasking: Unmasking | None = None
        self._waits = False  # whether chains wait in a pool, so that a row of a group holds another in every step

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch the stream."""
        if not isinstance(pl_module, MaskedDiffusion):
            raise ValueError(
                f"ChainDiagnostics: expected a diffusion model, got {type(pl_module).__name__}; leave the callback out"
            )
        self.history = [past for past in self.history if past["step"] <= trainer.global_step]
        self._sums, self._ages, self._agreed = {}, {}, None
        self._unmasking = pl_module.forward_process.unmasking
        self._waits = pl_module.stream.pool_name is not None
        pl_module.stream.observers.append(self._observe)

    def _observe(self, group: int, before: Chains, predictions: Tensor | Prediction, after: Chains) -> None:
        """Add up what a step did; sums stay on the device."""
        running = ~before.done
        masked = before.masked
        if isinstance(predictions, Tensor):
            nll = negative_log_likelihood(predictions, before.x0)
        else:
            assert predictions.nll is not None
            nll = predictions.nll
        loss = (nll * masked).sum(1) / masked.sum(1).clamp_min(1)
        length = before.answer_length
        part = (length - masked.sum(1)) * self.num_parts // length.clamp_min(1)
        part = part.clamp_max(self.num_parts - 1)  # of chains that are done, which don't count
        counted = running & masked.any(1)
        for name, values in (("loss", loss * counted), ("chains", counted.float())):
            self._add(name, values.new_zeros(self.num_parts).index_add(0, part, values))

        goes_on = running & ~after.done
        revealed = masked & ~after.masked & goes_on[:, None]
        above = None if self._unmasking is None else self._unmasking.above_threshold(predictions, before.xt)
        confident = torch.zeros_like(masked) if above is None else above
        self._add("by_count", (revealed & ~confident).sum().float())
        self._add("by_threshold", (revealed & confident).sum().float())
        self._add("steps", goes_on.sum().float())

        if not self._waits:
            self._add_lengths(group, before, after)

    def _add_lengths(self, group: int, before: Chains, after: Chains) -> None:
        """Add up how many steps the chains took that have ended."""
        running = ~before.done
        size, blocks = before.x0.shape[1], before.num_blocks
        size_before, age = self._ages.get(group, (0, None))
        if age is None or (age.shape[1] != blocks and size != size_before):
            # When these chains started was not seen.
            age = torch.full((len(running) // blocks, blocks), float("nan"), device=running.device)
        # Among sequences of other lengths a sequence has other blocks of padding, which are over.
        age = F.pad(age, (0, blocks - age.shape[1])).flatten()
        age = age + running
        ended = running & after.done
        self._add("length", age.masked_fill(~ended, 0).nansum())
        self._add("ended", (ended & ~age.isnan()).sum().float())
        age = age.masked_fill(after.done, 0).view(-1, blocks)
        if group in self._ages and self._ages[group][1].shape == age.shape:
            age = self._ages[group][1].copy_(age)
        self._ages[group] = size, age

    def _add(self, name: str, values: Tensor) -> None:
        if name in self._sums:
            self._sums[name].add_(values)
        else:
            self._sums[name] = values.clone()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Compare masks, while the weights are those that are validated."""
        begins = not batch_idx and not dataloader_idx and trainer.state.fn == "fit"
        if begins and self._sums and self._sums["chains"].any():
            assert isinstance(pl_module, MaskedDiffusion)
            self._agreed = self._agreement(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log, draw, and start adding up again."""
        if self._agreed is None:
            return
        assert isinstance(pl_module, MaskedDiffusion)
        taken = torch.tensor(float(pl_module.stream.num_taken), device=pl_module.device)
        sums = {name: values.clone() for name, values in self._sums.items()}
        sums |= {"kept": self._agreed[0], "possible": self._agreed[1], "sequences": taken}
        self._agreed = None
        for values in self._sums.values():
            values.zero_()
        sums = {name: trainer.strategy.reduce(value, reduce_op="sum") for name, value in sums.items()}
        entry = {f"loss_{i + 1}": loss for i, loss in enumerate((sums["loss"] / sums["chains"]).tolist())}
        entry["by_count"] = float(sums["by_count"] / sums["steps"])
        entry["by_threshold"] = float(sums["by_threshold"] / sums["steps"])
        if not self._waits:
            entry["length"] = float(sums["length"] / sums["ended"])
        entry["mismatch"] = float(1 - sums["kept"] / sums["possible"])
        entry["sequences"] = float(sums["sequences"])
        entry = {name: value for name, value in entry.items() if value == value}
        for name, value in entry.items():
            pl_module.log(f"chain/{name}", value, rank_zero_only=True)
        self.history.append({"step": trainer.global_step, **entry})
        self.path = save_picture(trainer, "chains", self.draw) or self.path

    def _agreement(self, trainer: pl.Trainer, module: MaskedDiffusion) -> tuple[Tensor, Tensor]:
        """Return the ``agreement`` for the sequences that are trained on next."""
        batch = module.stream.peek()
        # Spread evenly: neighbouring rows may be at the same stage for ever.
        size = len(batch["xt"])
        rows = torch.linspace(0, size - 1, min(size, self.num_sequences), device=module.device).long()
        x0, prompt_mask = batch["input_ids"][rows], batch["prompt_mask"][rows]
        padding = {name: mask[rows] for name, mask in batch.items() if name == "attention_mask"}
        with trainer.precision_plugin.forward_context():
            generator = module.evaluation_generator(0, 0)
            sample = module.sample(x0, prompt_mask, self.sampler, generator, **padding)
        cut = partial(cut_blocks, block_size=batch["chains"].x0.shape[1])
        masked, reveal_step = batch["xt"][rows] == module.mask_id, sample.reveal_step[:, : x0.shape[1]]
        return agreement(cut(masked), cut(prompt_mask), cut(reveal_step))

    def draw(self) -> Figure:
        """Draw the validations seen so far."""
        return draw_chains(self.history)

    def state_dict(self) -> dict[str, Any]:
        """Return what has been logged, so that a resumed run goes on with the same picture."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the picture of a checkpoint."""
        self.history = state_dict["history"]


def mismatch(masked: Tensor, prompt_mask: Tensor, reveal_step: Tensor) -> float:
    """Return how far masks are from those that a sampler meets on its way from the same prompts.

    A mask with n revealed positions is compared with the first n positions that the sampler reveals. How many
    positions the two share, beyond what n uniformly chosen positions would share on average, is divided by the most
    it could be, summed over all sequences; the mismatch is 1 minus that. It is 0 if the masks are the sampler's own,
    1 on average if they are random, and above 1 if they reveal first what the sampler reveals last. Sequences that
    the sampler fills in a single pass, such as blocks after an answer's end, have no order and are left out.

    Args:
        masked: True where a position is masked, (B, L) bool.
        prompt_mask: True where a position is given, (B, L) bool.
        reveal_step: When the sampler revealed each position, -1 where given, (B, L) int64.

    Returns:
        The mismatch; NaN if no sequence has an order.
    """
    kept, possible = agreement(masked, prompt_mask, reveal_step)
    return float(1 - kept / possible)


def agreement(masked: Tensor, prompt_mask: Tensor, reveal_step: Tensor) -> tuple[Tensor, Tensor]:
    """Return what ``mismatch`` divides: positions shared beyond chance, and the most there could be; sums, () float."""
    answer = ~prompt_mask
    revealed = answer & ~masked
    length, number = answer.sum(1).float(), revealed.sum(1).float()
    # How many are revealed in earlier passes, and in the same; of the pass that n falls into, each counts in part.
    step = reveal_step.masked_fill(prompt_mask, reveal_step.max() + 1)
    ordered = step.sort(dim=1).values
    earlier = torch.searchsorted(ordered, step).float()
    same = torch.searchsorted(ordered, step, right=True).float() - earlier
    share = ((number[:, None] - earlier) / same).clamp(0, 1)
    chance = number * number / length.clamp_min(1)
    kept = (share * revealed).sum(1) - chance
    has_order = ((step != reveal_step.masked_fill(prompt_mask, -1).amax(1, keepdim=True)) & answer).any(1)
    return (kept * has_order).sum(), ((number - chance) * has_order).sum()

"""Batch streaming: the slots of a training batch, refilled with clean sequences as their chains end.

``Stream`` is the train loader that Lightning iterates: a *sized* iterable whose length is a number of
steps, so that epochs, limits, accumulation and progress bars count steps. It yields the current slots; the
training step calls ``advance`` after its forward pass; the next step's batch has the retired slots refilled.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from puma_lightning.data.base import Batch
from puma_lightning.forward_process import ForwardProcess, Slots
from puma_lightning.sequences import CleanSequences, derived_seed


class Stream:
    """The slots of all accumulation groups of one rank, and the supply that refills them.

    Randomness is a function of (seed, rank, step), so it needs no saved generator state, and a resumed run
    draws what the uninterrupted one would have drawn.

    Args:
        sequences: The supply of clean sequences.
        process: The forward process.
        mask_id: The mask token.
        num_slots: B, the rows of a batch.
        num_steps: Batches in one pass over this iterable (a Lightning epoch).
        num_groups: M groups of slots are yielded in turn. With ``accumulate_grad_batches=M`` this keeps one
            sequence from being counted twice in an update.
        seed: The same on all ranks.
        device: Where the slots live; the CPU by default.
    """

    def __init__(
        self,
        sequences: CleanSequences,
        process: ForwardProcess,
        mask_id: int,
        num_slots: int,
        num_steps: int,
        num_groups: int = 1,
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self.sequences = sequences
        self.process = process
        self.mask_id = mask_id
        self.num_slots = num_slots
        self.num_steps = num_steps
        self.seed = seed
        self.device = device or torch.device("cpu")
        self.groups: list[Slots | None] = [None] * num_groups
        self.step = 0  # batches yielded in the life of this stream
        self._in_flight: Slots | None = None
        self._generator = torch.Generator(self.device)

    def _seeded(self, step: int, purpose: int) -> torch.Generator:
        return self._generator.manual_seed(derived_seed(self.seed, self.sequences.rank, step, purpose))

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self.num_steps):
            batch = self.peek()
            self._in_flight = self.groups[self.step % len(self.groups)]
            self.step += 1
            yield batch

    def peek(self) -> Batch:
        """The next batch, without counting it as yielded."""
        slots = self._refilled(self.step % len(self.groups))
        return {"input_ids": slots.x0, "prompt_mask": slots.prompt_mask, "xt": slots.xt, "stage": slots.stage}

    def advance(self, logits: Tensor, step: int) -> None:
        """Move the chains of the batch yielded last.

        Args:
            logits: The model's predictions for the batch's xt, aligned with positions, (B, L, V).
            step: The optimizer step, for schedules.
        """
        group = (self.step - 1) % len(self.groups)
        slots = self.groups[group]
        assert slots is not None, "advance before the first batch"
        generator = self._seeded(self.step - 1, purpose=1)
        self.groups[group] = self.process.advance(slots, logits, step, self.mask_id, generator)

    def _refilled(self, group: int) -> Slots:
        """The slots of a group with fresh sequences in those that are done."""
        slots = self.groups[group]
        if slots is None:
            slots = self._first_fill(group)
        elif len(rows := slots.done.nonzero().squeeze(1)):
            fresh = self._fresh(len(rows), torch.zeros(len(rows), dtype=torch.long), slots.num_stages)
            old, new = slots.tensors(), fresh.tensors()
            slots = replace(slots, **{name: old[name].index_copy(0, rows, new[name]) for name in old})
        self.groups[group] = slots
        return slots

    def _first_fill(self, group: int) -> Slots:
        """Staggered start: stages spread evenly, over all groups together, so each batch holds all stages."""
        num_stages = self.process.num_stages_at(0)
        index = torch.arange(self.num_slots) * len(self.groups) + group
        return self._fresh(self.num_slots, index * num_stages // (self.num_slots * len(self.groups)), num_stages)

    def _fresh(self, number: int, stage: Tensor, num_stages: int) -> Slots:
        clean = self.sequences.take(number)
        x0 = clean["input_ids"].to(self.device, non_blocking=True)
        prompt_mask = clean["prompt_mask"].to(self.device, non_blocking=True)
        stage = stage.to(self.device)
        generator = self._seeded(self.step, purpose=0)
        xt = self.process.start(x0, prompt_mask, stage, num_stages, self.mask_id, generator)
        return Slots(x0, prompt_mask, xt, stage, torch.zeros_like(stage, dtype=torch.bool), num_stages)

    def snapshot(self, in_flight: bool = False) -> dict[str, Any]:
        """Everything needed to go on exactly from here, as CPU tensors and plain types.

        Args:
            in_flight: Whether the training step of the batch yielded last is unfinished and will be done again.
        """
        cpu = torch.device("cpu")
        groups, step = list(self.groups), self.step
        if in_flight:
            step -= 1
            groups[step % len(groups)] = self._in_flight
        return {
            "seed": self.seed,
            "step": step,
            "position": self.sequences.position,
            "num_sequences": self.sequences.num_sequences,
            "groups": [slots and {**slots.to(cpu).tensors(), "num_stages": slots.num_stages} for slots in groups],
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Go on from a snapshot.

        Raises:
            ValueError: If the snapshot is of other slots or of another data set.
        """
        groups = [group and Slots(**group) for group in snapshot["groups"]]
        for what, saved, now in (
            ("accumulate_grad_batches", len(groups), len(self.groups)),
            ("training sequences", snapshot["num_sequences"], self.sequences.num_sequences),
            ("batch size", max((len(slots.x0) for slots in groups if slots), default=self.num_slots), self.num_slots),
        ):
            if saved != now:
                raise ValueError(
                    f"the checkpoint was saved with {what} = {saved}, this run has {now}; resume with the same, or "
                    "start a new run from its weights with init_from"
                )
        self.seed = snapshot["seed"]
        self.step = snapshot["step"]
        self.groups = [slots and slots.to(self.device) for slots in groups]
        self.sequences.seek(self.seed, snapshot["position"])

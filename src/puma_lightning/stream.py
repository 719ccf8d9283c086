"""Batch streaming: the slots of a training batch, refilled with clean sequences as their chains end.

``Stream`` is the train loader that Lightning iterates: a *sized* iterable whose length is a number of
steps, so that epochs, limits, accumulation and progress bars count steps. It yields the current slots; the
training step calls ``advance`` after its forward pass; the next step's batch has the retired slots refilled.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from puma_lightning.data.base import Batch
from puma_lightning.forward_process import ForwardProcess, Slots
from puma_lightning.schedule import StepSchedule
from puma_lightning.sequences import CleanSequences, derived_seed
from puma_lightning.unmasking import Prediction, check_block_size, cut_blocks, stage_of

# Is told of every advance: the accumulation group, its chains before, their predictions, and the chains after.
Observer = Callable[[int, Slots, Tensor | Prediction, Slots], None]


class Stream:
    """The slots of all accumulation groups of one rank, and the supply that refills them.

    A slot holds a chain, or, with a ``block_size``, a chain for each block of its sequence, all of which start when
    it takes the sequence; it retires when all of them are done. To the forward process every chain is a row.

    Randomness is a function of (seed, rank, step), so it needs no saved generator state, and a resumed run
    draws what the uninterrupted one would have drawn.

    Fresh sequences are masked on the CPU. What the host must know of the chains on the device it learns from a copy
    that is under way since ``advance``, so that a GPU has a backward pass to work on while the host waits.

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
        block_size: Length of the blocks at an optimizer step; None for one block, as long as the sequence. On a
            switch the boards stay and are cut anew; their stages are recomputed from what is revealed.
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
        block_size: StepSchedule | None = None,
    ) -> None:
        self.sequences = sequences
        self.process = process
        self.mask_id = mask_id
        self.num_slots = num_slots
        self.num_steps = num_steps
        self.seed = seed
        self.device = device or torch.device("cpu")
        self.block_size = block_size
        self.groups: list[Slots | None] = [None] * num_groups
        self._on_host: dict[int, Callable[[], Tensor]] = {}  # what ``_for_host`` says of each group that is filled
        self.step = 0  # batches yielded in the life of this stream
        self.observers: list[Observer] = []
        self.yielded: Slots | None = None  # the chains of the batch yielded last, as they were then
        self._generators = {"start": torch.Generator(), "advance": torch.Generator(self.device)}

    def _seeded(self, step: int, purpose: str) -> torch.Generator:
        seed = derived_seed(self.seed, self.sequences.rank, step, {"start": 0, "advance": 1}[purpose])
        return self._generators[purpose].manual_seed(seed)

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self.num_steps):
            batch = self.peek()
            self.yielded = self.groups[self.step % len(self.groups)]
            self.step += 1
            yield batch

    def peek(self) -> Batch:
        """The next batch, without counting it as yielded.

        Returns:
            ``{"input_ids", "prompt_mask", "xt"}``, (B, L) each, and ``"stage"``, (B, number of blocks).
        """
        chains = self._refilled(self.step % len(self.groups))
        shown = {"input_ids": chains.x0, "prompt_mask": chains.prompt_mask, "xt": chains.xt, "stage": chains.stage}
        return {name: tensor.view(self.num_slots, -1) for name, tensor in shown.items()}

    @property
    def num_masked(self) -> int:
        """Masked positions of the batch yielded last, all rows together; known without waiting for the device."""
        return int(self._on_host[(self.step - 1) % len(self.groups)]()[1].sum())

    def advance(self, predictions: Tensor | Prediction, step: int) -> None:
        """Move the chains of the batch yielded last.

        Args:
            predictions: The model's for the batch's xt, aligned with positions: logits, (B, L, V), or what the forward
                process ``reads``, (B, L) each.
            step: The optimizer step, for schedules.
        """
        group = (self.step - 1) % len(self.groups)
        chains = self.groups[group]
        assert chains is not None, "advance before the first batch"
        if self.block_size is not None:
            chains = self._cut_anew(chains, self.block_size.at(step))
            cut = partial(cut_blocks, block_size=self.block_size.at(step))
            predictions = cut(predictions) if isinstance(predictions, Tensor) else predictions.map(cut)
        generator = self._seeded(self.step - 1, "advance")
        moved = self.process.advance(chains, predictions, step, self.mask_id, generator)
        done = moved.done | chains.done
        # The chains of a slot end one by one; one that is over has nothing left to be trained on.
        after = replace(moved, done=done, xt=torch.where(done[:, None], moved.x0, moved.xt))
        self.groups[group] = after
        self._on_host[group] = copy_to_host(self._for_host(after))
        for observe in self.observers:
            observe(group, chains, predictions, after)

    def _for_host(self, chains: Slots) -> Tensor:
        """Of every chain whether it is done, and how many positions are masked, (2, number of chains) int64."""
        return torch.stack([chains.done.long(), (chains.xt == self.mask_id).sum(1)])

    def _cut_anew(self, chains: Slots, block_size: int) -> Slots:
        """The same boards in blocks of another size, each at the stage that its revealed positions belong to."""
        if chains.x0.shape[1] == block_size:
            return chains
        # The rows lie one behind the other, so that it does not matter where they were cut.
        x0, prompt_mask, xt = (t.reshape(-1, block_size) for t in (chains.x0, chains.prompt_mask, chains.xt))
        masked = (xt == self.mask_id).sum(1)
        answer_length = (~prompt_mask).sum(1)
        num_stages = self.process.chain_stages(chains.num_stages, answer_length)
        stage = stage_of(answer_length - masked, num_stages, answer_length)
        return Slots(x0, prompt_mask, xt, stage, masked == 0, chains.num_stages)

    def _refilled(self, group: int) -> Slots:
        """The chains of a group, with fresh sequences in the slots where all are done."""
        chains = self.groups[group]
        if chains is None:
            fresh = self._first_fill(group)
            known = self._for_host(fresh)
            chains = replace(fresh, **self._uploaded(fresh))
        else:
            known = self._on_host[group]()
            slots = known[0].bool().view(self.num_slots, -1).all(1).nonzero().squeeze(1)
            if not len(slots):
                return chains
            stage = torch.zeros(len(slots), dtype=torch.long)
            fresh = self._fresh(stage, chains.num_stages, chains.x0.shape[1])
            blocks = len(chains.x0) // self.num_slots
            rows = (slots[:, None] * blocks + torch.arange(blocks)).flatten()
            known = known.index_copy(1, rows, self._for_host(fresh))
            rows, old, new = self._upload(rows), chains.tensors(), self._uploaded(fresh)
            chains = replace(chains, **{name: old[name].index_copy(0, rows, new[name]) for name in old})
        self.groups[group], self._on_host[group] = chains, lambda: known
        return chains

    def _uploaded(self, chains: Slots) -> dict[str, Any]:
        return {name: self._upload(tensor) for name, tensor in chains.tensors().items()}

    def _upload(self, tensor: Tensor) -> Tensor:
        """A CPU tensor on the device; the copy overlaps with what a GPU is doing."""
        cuda = self.device.type == "cuda"
        return (tensor.pin_memory() if cuda else tensor).to(self.device, non_blocking=cuda)

    def _first_fill(self, group: int) -> Slots:
        """Staggered start: stages spread evenly, over all groups together, so each batch holds all stages."""
        num_stages = self.process.num_stages_at(0)
        index = torch.arange(self.num_slots) * len(self.groups) + group
        stage = index * num_stages // (self.num_slots * len(self.groups))
        return self._fresh(stage, num_stages, None if self.block_size is None else self.block_size.at(0))

    def _fresh(self, stage: Tensor, num_stages: int, block_size: int | None) -> Slots:
        """Chains of the next sequences on the CPU, one sequence for each of the given stages."""
        clean = self.sequences.take(len(stage))
        length = clean["input_ids"].shape[1]
        for coming in self.block_size.values if self.block_size is not None else ():
            check_block_size(coming, length)
        size = block_size or length
        x0, prompt_mask = (cut_blocks(clean[name].cpu(), size) for name in ("input_ids", "prompt_mask"))
        # With a threshold a chain that is shorter than K has fewer stages.
        stage = stage.repeat_interleave(length // size)
        stage = stage * self.process.chain_stages(num_stages, (~prompt_mask).sum(1)) // num_stages
        generator = self._seeded(self.step, "start")
        xt = self.process.start(x0, prompt_mask, stage, num_stages, self.mask_id, generator)
        return Slots(x0, prompt_mask, xt, stage, prompt_mask.all(1), num_stages)

    def snapshot(self, in_flight: bool = False) -> dict[str, Any]:
        """Everything needed to go on exactly from here, as CPU tensors and plain types.

        Args:
            in_flight: Whether the training step of the batch yielded last is unfinished and will be done again.
        """
        cpu = torch.device("cpu")
        groups, step = list(self.groups), self.step
        if in_flight:
            step -= 1
            groups[step % len(groups)] = self.yielded
        return {
            "seed": self.seed,
            "step": step,
            "position": self.sequences.position,
            "num_slots": self.num_slots,
            "num_sequences": self.sequences.num_sequences,
            "groups": [slots and {**slots.to(cpu).tensors(), "num_stages": slots.num_stages} for slots in groups],
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Go on from a snapshot.

        Raises:
            ValueError: If the snapshot is of other slots or of another data set.
        """
        groups = [group and Slots(**group) for group in snapshot["groups"]]
        check_same("accumulate_grad_batches", len(groups), len(self.groups))
        check_same("training sequences", snapshot["num_sequences"], self.sequences.num_sequences)
        check_same("batch size", snapshot["num_slots"], self.num_slots)
        self.sequences.seek(snapshot["seed"], snapshot["position"])
        length = self.sequences.length
        for chains in filter(None, groups):
            check_same("sequence length", chains.x0.numel() // self.num_slots, length)
        for size in self.block_size.values if self.block_size is not None else ():
            check_block_size(size, length)
        self.seed = snapshot["seed"]
        self.step = snapshot["step"]
        self.groups = [slots and slots.to(self.device) for slots in groups]
        self._on_host = {i: copy_to_host(self._for_host(slots)) for i, slots in enumerate(groups) if slots is not None}


def check_same(what: str, saved: int, now: int) -> None:
    """Check that a checkpoint is of such a run.

    Raises:
        ValueError: If not.
    """
    if saved != now:
        raise ValueError(
            f"the checkpoint was saved with {what} = {saved}, this run has {now}; resume with the same, or start a new "
            "run from its weights with init_from"
        )


def copy_to_host(tensor: Tensor) -> Callable[[], Tensor]:
    """Start copying a tensor to the CPU.

    Args:
        tensor: On any device.

    Returns:
        What returns the copy. On a GPU it waits for the copy, and so for what the GPU had been given before it, but not
        for anything it was given since.
    """
    copy = tensor.to("cpu", non_blocking=tensor.is_cuda)  # pinned where it does not block
    if not tensor.is_cuda:
        return lambda: copy
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record(torch.cuda.current_stream(tensor.device))

    def wait() -> Tensor:
        copied.synchronize()
        return copy

    return wait

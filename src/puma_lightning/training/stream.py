"""Batch streaming: the chains of a training batch, and the clean sequences that take the place of finished ones.

``Stream`` is the train loader that Lightning iterates: a *sized* iterable whose length is a number of steps, so that
epochs, limits, accumulation and progress bars count steps. It yields the current chains; the training step calls
``advance`` after its forward pass; in the next batch fresh sequences have taken the rows whose chains are over.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from lightning.fabric.utilities import rank_zero_warn
from torch import Tensor

from puma_lightning.chain.blocks import cut_blocks, join_blocks
from puma_lightning.chain.chains import Chains
from puma_lightning.chain.stages import StepSchedule
from puma_lightning.chain.teacher import ForwardProcess
from puma_lightning.data.batch import Batch, padded_to_multiple
from puma_lightning.output.prediction import Prediction, apply
from puma_lightning.training.host import copy_to_host, on_host
from puma_lightning.training.pool import stages_told
from puma_lightning.training.sequences import CleanSequences, derived_seed

if TYPE_CHECKING:
    from puma_lightning.training.captured import RowsOnDevice

# Is told of every advance: the accumulation group, its chains before, their predictions, and the chains after.
Observer = Callable[[int, Chains, Tensor | Prediction, Chains], None]


class Stream:
    """The chains of all accumulation groups of one rank, and the supply of sequences that enter them.

    A row of the batch holds a sequence, which runs one chain, or, with a ``block_size``, one for each of its blocks,
    all of which start when the sequence enters. It leaves when all of them are over. To the forward process every chain
    is a row.

    Sequences may have different lengths. They are padded at their ends to the longest that is in the batch at the time,
    rounded up to a multiple of all block sizes, and there is no ``attention_mask`` where that pads nothing.

    Randomness is a function of (seed, rank, step). No generator state has to be saved, and a resumed run draws what the
    uninterrupted one would have drawn.

    Fresh sequences are masked on the CPU. What the host must know of the chains on the device is copied there from
    ``advance`` on, in the background, so that a GPU has a backward pass to work on while the host waits.

    Args:
        sequences: The supply of clean sequences.
        process: The forward process.
        mask_id: The mask token.
        batch_size: B, the sequences of a batch.
        num_steps: Batches in one pass over this iterable (a Lightning epoch).
        num_groups: Yield M groups of chains in turn. With ``accumulate_grad_batches=M`` this keeps one sequence from
            being counted twice in an update.
        seed: The same on all ranks.
        device: Where the chains live; the CPU by default.
        block_size: Length of the blocks at an optimizer step; None for one block, as long as the sequence. When it
            changes, sequences stay as masked as they are and are cut into other blocks; the stages of these are told
            from what is revealed.
    """

    def __init__(
        self,
        sequences: CleanSequences,
        process: ForwardProcess,
        mask_id: int,
        batch_size: int,
        num_steps: int,
        num_groups: int = 1,
        seed: int = 0,
        device: torch.device | None = None,
        block_size: StepSchedule | None = None,
    ) -> None:
        self.sequences = sequences
        self.process = process
        self.mask_id = mask_id
        self.batch_size = batch_size
        self.num_steps = num_steps
        self.seed = seed
        self.device = device or torch.device("cpu")
        self.block_size = block_size
        self.groups: list[Chains | None] = [None] * num_groups
        # Whole sequences are as long as a multiple of this, so that every block size divides them.
        self._multiple = math.lcm(*block_size.values) if block_size is not None else 1
        self._lengths: dict[int, Tensor] = {}  # of the sequences in each group that is filled, without padding, (B,)
        self._on_host: dict[int, Callable[[], Tensor]] = {}  # what ``for_host`` says of each group that is filled
        self.step = 0  # batches yielded in the life of this stream
        # Whether what enters the batch takes its random numbers from those drawn for all rows, of which any number may
        # enter. Runs begun before version 0.3.0 draw for as many as enter.
        self.draws_for_all_rows = True
        self.observers: list[Observer] = []
        self.yielded: Chains | None = None  # the chains of the batch yielded last, as they were then
        self._generators = {"start": torch.Generator(), "advance": torch.Generator(self.device)}
        self.on_device: RowsOnDevice | None = None  # what takes care of the rows while steps are recorded

    def seed_of(self, step: int, purpose: str) -> int:
        """Return the seed of what is drawn for the rows of a batch that enter it, or as its chains advance.

        Args:
            step: The number of the batch; for the ``turn`` of chains in a pool, of the pass over it.
            purpose: What is drawn: ``start``, ``advance``, ``deal`` or ``turn``.
        """
        return derived_seed(
            self.seed, self.sequences.rank, step, {"start": 0, "advance": 1, "deal": 2, "turn": 3}[purpose]
        )

    def _seeded(self, step: int, purpose: str) -> torch.Generator:
        generator = self._generators["start" if purpose == "deal" else purpose]
        return generator.manual_seed(self.seed_of(step, purpose))

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _ in range(self.num_steps):
            batch = self.peek()
            self.yielded = batch["chains"]
            self.step += 1
            yield batch

    def peek(self) -> dict[str, Any]:
        """Return the next batch, without counting it as yielded.

        Returns:
            ``{"input_ids", "prompt_mask", "xt"}``, (B, L) each, of the whole sequences, with ``"attention_mask"`` if
            anything is padding; and ``"chains"``, the ``Chains`` that they run, one for each block.
        """
        group = self.step % len(self.groups)
        return self.batch_of(self.refilled_by_host(group) if self.on_device is None else self.on_device.refilled(group))

    def batch_of(self, chains: Chains) -> dict[str, Any]:
        """Return chains as a batch, see ``peek``."""
        shown = {"input_ids": chains.x0, "prompt_mask": chains.prompt_mask, "xt": chains.xt}
        if chains.attention_mask is not None:
            shown["attention_mask"] = chains.attention_mask
        return {**{name: join_blocks(rows, chains.num_blocks) for name, rows in shown.items()}, "chains": chains}

    @property
    @on_host
    def num_taken(self) -> float:
        """How many sequences were taken since the start of the run; to be added up over the ranks."""
        if self.on_device is not None:
            self.on_device.settle()
        return self.sequences.num_taken

    @property
    @on_host
    def num_masked(self) -> int | None:
        """Masked positions of the batch yielded last, all rows together; known without waiting for the device.

        At least so many in a step that is recorded; None where it makes no difference.
        """
        if self.on_device is not None:
            return self.on_device.num_masked
        return int(self._on_host[(self.step - 1) % len(self.groups)]()[1].sum())

    @on_host
    def advance(self, predictions: Tensor | Prediction, step: int) -> None:
        """Move the chains of the batch yielded last.

        Args:
            predictions: The model's for the xt of the chains, aligned with positions: logits, (N, L, V), or what the
                forward process ``reads``, (N, L) each.
            step: The optimizer step, for schedules.
        """
        group = (self.step - 1) % len(self.groups)
        after = self.moved(group, predictions, step, self._seeded(self.step - 1, "advance"))
        self.groups[group] = after
        self.note(group, after)

    def note(self, group: int, chains: Chains) -> None:
        """Have the host learn where the chains of a group have moved to."""
        self._on_host[group] = copy_to_host(for_host(chains))

    def moved(self, group: int, predictions: Tensor | Prediction, step: int, generator: torch.Generator) -> Chains:
        """Return the chains of an accumulation group as they are after a step, and tell all observers.

        Args:
            group: Its number.
            predictions: See ``advance``.
            step: The optimizer step.
            generator: Source of all randomness, on the device.
        """
        chains = self.groups[group]
        assert chains is not None, "advance before the first batch"
        if self.block_size is not None and (size := self.block_size.at(step)) != chains.x0.shape[1]:
            cut_now = chains.num_blocks
            chains = self._cut_into(chains, size)
            predictions = apply(lambda rows: cut_blocks(join_blocks(rows, cut_now), size), predictions)
        moved = self.process.advance(chains, predictions, step, generator)
        done = moved.done | chains.done
        # The chains of a sequence end one by one; one that is over has nothing left to be trained on.
        after = replace(moved, done=done, xt=torch.where(done[:, None], moved.x0, moved.xt))
        for observe in self.observers:
            observe(group, chains, predictions, after)
        return after

    def _cut_into(self, chains: Chains, block_size: int) -> Chains:
        """Cut the same sequences into blocks of another size, each at the stage that its revealed positions tell."""
        rows: dict[str, Any] = {"x0": chains.x0, "prompt_mask": chains.prompt_mask, "xt": chains.xt}
        if chains.attention_mask is not None:
            rows["attention_mask"] = chains.attention_mask
        rows = {name: cut_blocks(join_blocks(whole, chains.num_blocks), block_size) for name, whole in rows.items()}
        blocks = chains.num_blocks * chains.x0.shape[1] // block_size
        cut = replace(chains, **rows, num_blocks=blocks)
        return replace(cut, stage=stages_told(self.process, cut), done=~cut.masked.any(1))

    def by_host_again(self) -> None:
        """Take care of the rows again, which stay as they are."""
        self.on_device = None
        for group, chains in enumerate(self.groups):
            if chains is not None:
                self._on_host[group] = copy_to_host(for_host(chains))

    def refilled_by_host(self, group: int) -> Chains:
        """Return the chains of a group, with fresh sequences in place of those whose chains are all over."""
        chains = self.groups[group]
        if chains is None:
            fresh, lengths = self._first_fill(group)
            known = for_host(fresh)
            chains = fresh.map(self._upload)
        else:
            known = self._on_host[group]()
            over = known[0].bool().view(self.batch_size, -1).all(1).nonzero().squeeze(1)
            if not len(over):
                return chains
            block_size = None if self.block_size is None else chains.x0.shape[1]
            fresh, entering = self._fresh(torch.zeros(len(over), dtype=torch.long), chains.num_stages, block_size)
            lengths = self._lengths[group].index_copy(0, over, entering)
            # What follows the longest sequence is padding in all of them.
            length = _up_to(int(lengths.max()), self._multiple)
            chains, fresh = chains.with_length(length, block_size), fresh.with_length(length, block_size)
            blocks = chains.num_blocks
            rows = (over[:, None] * blocks + torch.arange(blocks)).flatten()
            known = _with_blocks(known, self.batch_size, blocks).index_copy(1, rows, for_host(fresh))
            chains = chains.with_rows(self._upload(rows), fresh.map(self._upload))
            if (lengths == length).all():
                chains = replace(chains, attention_mask=None)
        self.groups[group], self._on_host[group], self._lengths[group] = chains, lambda: known, lengths
        return chains

    def _upload(self, tensor: Tensor) -> Tensor:
        """Copy a CPU tensor to the device; the copy overlaps with what a GPU is doing."""
        cuda = self.device.type == "cuda"
        return (tensor.pin_memory() if cuda else tensor).to(self.device, non_blocking=cuda)

    def _first_fill(self, group: int) -> tuple[Chains, Tensor]:
        """Start with stages spread evenly, over all groups together, so that each batch holds all stages."""
        num_stages = self.process.num_stages_at(0)
        index = torch.arange(self.batch_size) * len(self.groups) + group
        stage = index * num_stages // (self.batch_size * len(self.groups))
        return self._fresh(stage, num_stages, None if self.block_size is None else self.block_size.at(0))

    def _fresh(
        self, stage: Tensor, num_stages: int, block_size: int | None, purpose: str = "start"
    ) -> tuple[Chains, Tensor]:
        """Start chains of the next sequences on the CPU, one sequence for each of the given stages.

        Returns:
            The chains, and the lengths of the sequences without padding, (n,) int64.
        """
        clean = {name: rows.cpu() for name, rows in self.sequences.take(len(stage)).items()}
        size, length = clean["input_ids"].shape
        lengths = clean["attention_mask"].sum(1) if "attention_mask" in clean else torch.full((size,), length)
        clean = self.with_whole_blocks(clean)
        generator = self._seeded(self.step, purpose)
        if purpose == "start" and self.draws_for_all_rows and size < self.batch_size:
            rows = torch.arange(self.batch_size).clamp_max(size - 1)
            clean, stage = {name: values[rows] for name, values in clean.items()}, stage[rows]
        fresh = begin(self.process, clean, self.mask_id, num_stages, stage, block_size, generator)
        return _chosen(fresh, torch.arange(size)), lengths

    def with_whole_blocks(self, clean: Batch) -> Batch:
        """Pad a checked batch so that every block size divides its length; warn if all of its sequences need it."""
        length = clean["input_ids"].shape[1]
        if length % self._multiple and not self.step and "attention_mask" not in clean:
            rank_zero_warn(
                f"block_size: blocks do not divide sequences of length {length}, which are padded to "
                f"{_up_to(length, self._multiple)}; choose sizes that do for less work"
            )
        return padded_to_multiple(clean, self._multiple, self.mask_id)

    def snapshot(self, in_flight: bool = False) -> dict[str, Any]:
        """Return everything needed to go on exactly from here, as CPU tensors and plain types.

        Args:
            in_flight: Whether the training step of the batch yielded last is unfinished and will be done again.
        """
        if self.on_device is not None:
            self.on_device.settle()
        groups, step = list(self.groups), self.step
        if in_flight:
            step -= 1
            groups[step % len(groups)] = self.yielded
        # Not said of runs whose sequences all have one length, which a resumed run is held to.
        vary = {"lengths_vary": True} if self.sequences.lengths_vary else {}
        draws = {"draws_for_all_rows": True} if self.draws_for_all_rows else {}
        return {
            "seed": self.seed,
            "step": step,
            "position": self.sequences.position,
            "num_slots": self.batch_size,
            "num_sequences": self.sequences.num_sequences,
            "groups": [g and {**g.to("cpu").tensors(), "num_stages": g.num_stages} for g in groups],
            "supply": self.sequences.supply(),
            **vary,
            **draws,
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Go on exactly from a snapshot of this rank, of as many ranks.

        Raises:
            ValueError: If the snapshot is of another batch size or of another data set.
        """
        check_same("accumulate_grad_batches", len(snapshot["groups"]), len(self.groups))
        check_same("batch_size", snapshot["num_slots"], self.batch_size)
        self.check(snapshot)
        self.sequences.restore(snapshot["seed"], snapshot["position"], snapshot.get("supply"))
        self.sequences.lengths_vary |= snapshot.get("lengths_vary", False)
        self._go_on(snapshot, self._saved_groups(snapshot))

    @property
    def pool_name(self) -> int | str | None:
        """What the pool is called that batches come from; None if chains never wait."""
        return None

    @property
    def num_slots(self) -> int:
        """How many sequences are in flight on a rank."""
        return self.batch_size * len(self.groups)

    def check(self, snapshot: dict[str, Any]) -> None:
        """Check that a snapshot is of such a run.

        Raises:
            ValueError: If it is of another data set or another kind of stream.
        """
        check_same("training sequences", snapshot["num_sequences"], self.sequences.num_sequences)
        check_same("pool", snapshot.get("pool", {}).get("name"), self.pool_name)

    def fits(self, snapshots: Sequence[dict[str, Any]]) -> bool:
        """Tell whether snapshots are of as many ranks, and batches of as many sequences, as there are now."""
        shapes = {(len(snapshot["groups"]), snapshot["num_slots"]) for snapshot in snapshots}
        return len(snapshots) == self.sequences.world_size and shapes == {(len(self.groups), self.batch_size)}

    def restore_from(self, snapshots: Sequence[dict[str, Any]]) -> None:
        """Go on from the snapshots of all ranks: exactly, if there are as many ranks and slots as there were.

        Otherwise the sequences in the slots are dealt to the slots that there are now, as masked as they are. Slots
        that remain take fresh sequences; sequences that remain, the least revealed, start again when slots are free.

        Raises:
            ValueError: If the snapshots are of another data set, or it cannot be dealt.
        """
        rank, ranks = self.sequences.rank, self.sequences.world_size
        if self.fits(snapshots):
            self.restore(snapshots[rank])
            return
        first = snapshots[0]
        self.check(first)
        positions = [snapshot["position"] for snapshot in snapshots]
        self.sequences.deal(first["seed"], positions, [snapshot.get("supply") for snapshot in snapshots])
        self.sequences.lengths_vary |= any(snapshot.get("lengths_vary", False) for snapshot in snapshots)
        rows, slots = self._in_flight(snapshots), self.num_slots
        in_flight = 0 if rows is None else len(rows.x0) // rows.num_blocks
        if rows is not None:
            # The rows of one sequence follow each other; the most revealed sequences first.
            revealed = rows.revealed.view(-1, rows.num_blocks).sum(1)
            mine = revealed.sort(descending=True, stable=True).indices[rank::ranks]
            self.seed, self.step = first["seed"], first["step"]
            if len(mine) > slots:
                self.sequences.put_before(sequences_of(_chosen(rows, mine[slots:])))
            missing = max(0, slots - len(mine))
            stage = torch.arange(missing) * rows.num_stages // max(1, missing)
            dealt = _chosen(rows, mine[:slots])
            if missing:
                size = None if self.block_size is None else rows.x0.shape[1]
                dealt = _all(size, dealt, self._fresh(stage, rows.num_stages, size, "deal")[0])
            self._hold(first, dealt)
        else:
            self._go_on(first, [None for _ in self.groups])
        rank_zero_warn(
            f"the checkpoint of {len(snapshots)} process(es) x {len(first['groups'])} x {first['num_slots']} sequences "
            f"(accumulation x batch size) goes on on {ranks} x {len(self.groups)} x {self.batch_size}: {in_flight:,} "
            f"sequences in flight are dealt to {ranks * slots:,} slots ({max(0, in_flight - ranks * slots):,} wait to "
            f"start again), and what is left of the data after {sum(positions):,} sequences is dealt anew; none is "
            "left out or taken twice, but the run is not the same to the last bit"
        )

    def _hold(self, snapshot: dict[str, Any], dealt: Chains) -> None:
        """Take over the sequences that were dealt to this rank, on the CPU, one for each slot."""
        groups = range(len(self.groups))
        self._go_on(snapshot, [_chosen(dealt, torch.arange(self.num_slots)[i :: len(groups)]) for i in groups])

    def _saved_chains(self, snapshot: dict[str, Any]) -> list[Chains | None]:
        """Return all chains of a snapshot, in parts."""
        return self._saved_groups(snapshot)

    def _saved_groups(self, snapshot: dict[str, Any]) -> list[Chains | None]:
        groups: list[Chains | None] = []
        for saved in snapshot["groups"]:
            blocks = saved and len(saved["x0"]) // snapshot["num_slots"]
            groups.append(saved and Chains(**saved, mask_id=self.mask_id, num_blocks=blocks))
        return groups

    def _in_flight(self, snapshots: Sequence[dict[str, Any]]) -> Chains | None:
        """Return the chains of all sequences that are not over, in blocks and stages of one kind; None if none is."""
        saved = [chains for snapshot in snapshots for chains in self._saved_chains(snapshot) if chains is not None]
        if not saved:
            return None
        # Schedules grow, so the largest is the newest.
        num_stages = max(chains.num_stages for chains in saved)
        size = None if self.block_size is None else max(chains.x0.shape[1] for chains in saved)
        found: list[Chains] = []
        for chains in saved:
            block = chains.x0.shape[1] if size is None else size
            if (chains.num_stages, chains.x0.shape[1]) != (num_stages, block):
                chains = self._with_room(chains, block)
                chains = self._cut_into(replace(chains, num_stages=num_stages), block)
            over = chains.done.view(-1, chains.num_blocks).all(1)
            found.append(_chosen(chains, (~over).nonzero().squeeze(1)))
        return _all(size, *found)

    def _with_room(self, chains: Chains, block_size: int = 1) -> Chains:
        """Pad sequences so that a block size divides them, and all those that are to come."""
        if self.block_size is None:
            return chains
        multiple = math.lcm(self._multiple, chains.x0.shape[1], block_size)
        return chains.with_length(_up_to(chains.num_blocks * chains.x0.shape[1], multiple), chains.x0.shape[1])

    def _go_on(self, snapshot: dict[str, Any], groups: list[Chains | None]) -> None:
        """Take over the groups of this rank, on the CPU."""
        coming = self.sequences.length
        for i, chains in enumerate(groups):
            if chains is None:
                continue
            real = chains.with_attention().attention_mask
            assert real is not None
            self._lengths[i] = join_blocks(real, chains.num_blocks).sum(1)
            # Not that of the slots, which are padded where no block size divides it.
            length = int(self._lengths[i].max())
            if not self.sequences.lengths_may_vary:
                check_same("sequence length", length, coming)
            self.sequences.lengths_vary |= length != coming
            groups[i] = self._with_room(chains)
        self.seed = snapshot["seed"]
        self.step = snapshot["step"]
        self.draws_for_all_rows = snapshot.get("draws_for_all_rows", False)
        self.groups = [chains and chains.to(self.device) for chains in groups]
        self._on_host = {i: copy_to_host(for_host(chains)) for i, chains in enumerate(groups) if chains is not None}


def sequences_of(chains: Chains) -> dict[str, Tensor]:
    """Return the clean sequences of chains, (B, L) each."""
    rows = {"input_ids": chains.x0, "prompt_mask": chains.prompt_mask}
    if chains.attention_mask is not None:
        rows["attention_mask"] = chains.attention_mask
    return {name: join_blocks(each, chains.num_blocks) for name, each in rows.items()}


def _chosen(chains: Chains, sequences: Tensor) -> Chains:
    """Return the chains of some sequences, (n,) int64."""
    rows = (sequences[:, None] * chains.num_blocks + torch.arange(chains.num_blocks)).flatten()
    return chains.map(lambda tensor: tensor[rows])


def _all(block_size: int | None, *some: Chains) -> Chains:
    """Return the chains of several one after the other, all padded to the longest."""
    length = max(chains.num_blocks * chains.x0.shape[1] for chains in some)
    some = tuple(chains.with_length(length, block_size) for chains in some)
    if any(chains.attention_mask is not None for chains in some):
        some = tuple(chains.with_attention() for chains in some)
    first, parts = some[0], [chains.tensors() for chains in some]
    joined: dict[str, Any] = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return replace(first, **joined)


def begin(
    process: ForwardProcess,
    clean: Batch,
    mask_id: int,
    num_stages: int,
    stage: Tensor,
    block_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Chains:
    """Start chains of clean sequences.

    Args:
        process: The forward process.
        clean: A checked batch, (B, L), whose padding is last.
        mask_id: The mask token.
        num_stages: K.
        stage: The stage that each sequence starts at, (B,) int64.
        block_size: Cut the sequences into blocks of this length, which divides L; None for one chain each.
        generator: Source of all randomness, on the device of the batch.
    """
    length = clean["input_ids"].shape[1]
    stage = stage.repeat_interleave(length // (block_size or length))
    chains = Chains.fully_masked(
        clean["input_ids"], clean["prompt_mask"], mask_id, num_stages, stage, block_size or length,
        clean.get("attention_mask"),
    )  # fmt: skip
    # With a threshold a chain that is shorter than K has fewer stages.
    stage = stage * process.chain_stages(num_stages, chains.answer_length) // num_stages
    return process.start(replace(chains, stage=stage), generator)


def _up_to(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _with_blocks(known: Tensor, batch_size: int, blocks: int) -> Tensor:
    """Return what the host knows, (2, N), with another number of blocks of each sequence; new ones are over."""
    done, masked = known.view(2, batch_size, -1)
    more = blocks - done.shape[1]
    return torch.stack([F.pad(done, (0, more), value=1), F.pad(masked, (0, more))]).flatten(1)


def for_host(chains: Chains) -> Tensor:
    """Tell of each chain whether it is over, and how many positions are masked, (2, N) int64."""
    return torch.stack([chains.done.long(), chains.masked.sum(1)])


def check_same(what: str, saved: int | str | None, now: int | str | None) -> None:
    """Check that a checkpoint is of such a run.

    Raises:
        ValueError: If not.
    """
    if saved != now:
        raise ValueError(
            f"{what}: expected {saved}, as in the checkpoint, got {now}; resume with {saved}, or start a new run from "
            "its weights with init_from"
        )

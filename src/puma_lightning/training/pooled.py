"""Batch streaming from a pool: each batch is made of chains that have waited, and these wait again after their step."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from torch import Tensor

from puma_lightning.chain.chains import Chains
from puma_lightning.chain.stages import StepSchedule
from puma_lightning.chain.teacher import ForwardProcess
from puma_lightning.data.batch import padded_to_multiple
from puma_lightning.training.pool import Pool, redealt
from puma_lightning.training.sequences import CleanSequences
from puma_lightning.training.stream import Stream, begin, for_host, sequences_of


class PooledStream(Stream):
    """A stream whose batches are drawn from a pool of more chains than a batch has rows.

    The pool is gone through in passes, each in an order of its own, so that every chain takes a step in each pass. A
    chain that waits was moved last by the policy of up to two passes ago. Each rank has a pool of its own.

    - A pool of P chains: a sequence whose chains are over gives its row to the next fresh one. Each batch holds chains
      of all stages evenly.
    - A pool of all: every training sequence has a row. A pass is a pass over the data, read in the loader's order, and
      a sequence whose chains are over starts again at its next turn. A rank has the same sequences in every pass.

    All else is as in ``Stream``. In the first pass over the pool the stages at which chains start are spread evenly
    over each batch.

    Args:
        size: P, a multiple of the batch size and the number of groups; None for all training sequences, whose supply
            must have a ``fixed_share`` then.
        sequences: As for ``Stream``, like all that follow.
        process: The forward process.
        mask_id: The mask token.
        batch_size: B.
        num_steps: Batches in a Lightning epoch.
        num_groups: M.
        seed: The same on all ranks.
        device: Where the chains of a batch live.
        block_size: Length of the blocks at an optimizer step.
    """

    def __init__(
        self,
        size: int | None,
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
        super().__init__(sequences, process, mask_id, batch_size, num_steps, num_groups, seed, device, block_size)
        self.pool = Pool(size or sequences.share, mask_id, size is None)
        self.pool.num_stages = process.num_stages_at(0)
        self.pool.block_size = None if block_size is None else block_size.at(0)
        self._rows = torch.zeros(0, dtype=torch.long)  # of the batch made last
        self._made_at = -1  # the step of that batch
        self._pass, self._order = -1, torch.zeros(0, dtype=torch.long)

    @property
    def pool_name(self) -> int | str:
        return self.pool.name

    @property
    def num_slots(self) -> int:
        return self.pool.size

    def refilled_by_host(self, group: int) -> Chains:
        """Return the next batch, made of the chains whose turn it is."""
        if self._made_at == self.step:
            made = self.groups[group]
            assert made is not None
            return made
        if self.pool.is_of_all:
            clean, rows = self.sequences.take_with_rows(self.batch_size)
        else:
            rows = self._turn()
            over = rows[self.pool.is_over(rows)]
            if len(over):
                self.pool.put(over, self.sequences.take(len(over)))
            clean = self.pool.sequences(rows)
        clean = self.with_whole_blocks(clean)
        waiting = self.pool.chains(rows, clean, self.process)
        num_stages, place = waiting.num_stages, torch.arange(self.batch_size)
        stage = torch.where(self.pool.is_new(rows), place * num_stages // self.batch_size, 0)
        generator = self._seeded(self.step, "start")
        fresh = begin(self.process, clean, self.mask_id, num_stages, stage, self.pool.block_size, generator)
        starts = waiting.done.view(self.batch_size, -1).all(1).repeat_interleave(waiting.num_blocks)
        chains = waiting.with_rows(starts.nonzero().squeeze(1), fresh.map(lambda tensor: tensor[starts]))
        known = for_host(chains)
        chains = chains.map(self._upload)
        self.groups[group], self._on_host[group] = chains, lambda: known
        self._rows, self._made_at = rows, self.step
        return chains

    def _turn(self) -> Tensor:
        """Return the rows whose turn it is, (B,) int64: the next in this pass over the pool."""
        number, first = divmod(self.step * self.batch_size, self.pool.size)
        if number != self._pass:
            self._pass, self._order = number, self._new_order(number)
        return self._order[first : first + self.batch_size]

    def _new_order(self, number: int) -> Tensor:
        """Return an order of all rows, (P,) int64, in which each batch holds chains of all stages evenly.

        Sorted by how much is masked, in random order where that is the same, the rows are cut into B strata, and each
        batch has one of each.
        """
        generator = torch.Generator().manual_seed(self.seed_of(number, "turn"))
        order = torch.randperm(self.pool.size, generator=generator)
        order = order[self.pool.share_masked()[order].argsort(stable=True)]
        batches = order.view(self.batch_size, -1).T
        return batches[torch.randperm(len(batches), generator=generator)].flatten()

    def note(self, group: int, chains: Chains) -> None:
        self.pool.note(self._rows, chains)

    def snapshot(self, in_flight: bool = False) -> dict[str, Any]:
        """Return everything needed to go on exactly from here; of the groups only a batch that is still to be done."""
        state = super().snapshot(in_flight)
        at_hand = [None for _ in self.groups]
        if in_flight or self._made_at == self.step:
            now = state["step"] % len(self.groups)
            at_hand[now] = state["groups"][now]
        turn = {"rows": self._rows, "pass": self._pass, "order": self._order}
        return {**state, "groups": at_hand, "pool": {**self.pool.state(), **turn}}

    def restore(self, snapshot: dict[str, Any]) -> None:
        super().restore(snapshot)
        self.pool.restore(snapshot["pool"])
        self._rows, self._pass, self._order = (snapshot["pool"][name] for name in ("rows", "pass", "order"))
        made = self.groups[self.step % len(self.groups)] is not None
        self._made_at = self.step if made else -1

    def restore_from(self, snapshots: Sequence[dict[str, Any]]) -> None:
        if not self.pool.is_of_all or self.fits(snapshots):
            super().restore_from(snapshots)
            return
        # Every chain stays with its sequence, wherever that is now.
        first, sequences = snapshots[0], self.sequences
        self.check(first)
        taken = sum(snapshot["position"] for snapshot in snapshots)
        sequences.seek(first["seed"], taken // sequences.world_size)
        sequences.lengths_vary |= any(snapshot.get("lengths_vary", False) for snapshot in snapshots)
        states = [self._pool_of(snapshot).state() for snapshot in snapshots]
        self.pool.restore(redealt(states, sequences.rank, sequences.world_size))
        self._go_on(first, [None for _ in self.groups])
        self._made_at = -1
        rank_zero_warn(
            f"the checkpoint of {len(snapshots)} process(es) x {first['num_slots']} sequences goes on on "
            f"{sequences.world_size} x {self.batch_size}: every sequence keeps its chain, but the pass over the data "
            "that was under way is finished in another order, so a few are left out of it or taken twice"
        )

    def _pool_of(self, snapshot: dict[str, Any]) -> Pool:
        """Return the pool of a snapshot; the chains of a batch that was still to be done wait in it."""
        saved = snapshot["pool"]
        pool = Pool(len(saved["kind"]), self.mask_id, self.pool.is_of_all)
        pool.restore(saved)
        for chains in self._saved_groups(snapshot):
            if chains is not None:
                pool.note(saved["rows"], chains)
        return pool

    def _saved_chains(self, snapshot: dict[str, Any]) -> list[Chains | None]:
        pool = self._pool_of(snapshot)
        every = torch.arange(pool.size)
        rows = every[~pool.is_new(every)]
        if not len(rows):
            return []
        clean = padded_to_multiple(pool.sequences(rows), pool.block_size or 1, self.mask_id)
        return [pool.chains(rows, clean, self.process)]

    def _hold(self, snapshot: dict[str, Any], dealt: Chains) -> None:
        self._go_on(snapshot, [None for _ in self.groups])
        self._made_at = self._pass = -1
        rows = torch.arange(self.pool.size)
        self.pool.put(rows, sequences_of(dealt))
        self.pool.num_stages = dealt.num_stages
        self.pool.note(rows, dealt)

"""More chains than a batch has rows: a chain waits, as masked as it is, until its turn comes."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from puma_lightning.chain.blocks import cut_blocks, join_blocks
from puma_lightning.chain.chains import Chains, padding_token
from puma_lightning.chain.stages import stage_of
from puma_lightning.chain.teacher import ForwardProcess
from puma_lightning.data.batch import Batch, padded_to_multiple, padding_last
from puma_lightning.training.host import copy_to_host

BITS = 2 ** torch.arange(8)


class Pool:
    """The chains of P sequences, of which every batch holds some.

    They are kept in the memory of the host, wherever the model is: one bit for each position, which says whether it is
    masked, and the stage of each chain. Where chains have moved to is copied there in the background, and waited for
    only where a chain's next turn comes sooner.

    Args:
        size: P.
        mask_id: The mask token.
        is_of_all: Whether every training sequence has its own row, so that the sequences come with each batch. If not,
            the pool keeps them, and others take the places of those whose chains are over.

    Attributes:
        num_stages: The K that chains which start now count in; 0 before the first batch.
        block_size: Of these chains; None for one block.
    """

    def __init__(self, size: int, mask_id: int, is_of_all: bool = False) -> None:
        self.size = size
        self.is_of_all = is_of_all
        self.num_stages = 0
        self.block_size: int | None = None
        self._mask_id = mask_id
        self._sequences: Batch | None = None
        self._masked = torch.zeros(size, 0, dtype=torch.uint8)  # eight positions a byte
        self._stage = torch.zeros(size, 1, dtype=torch.int32)  # of each block
        self._kind = torch.zeros(size, 2, dtype=torch.int32)  # the K and the block size of each row; 0 before its first
        self._moving: deque[_Moved] = deque()

    @property
    def name(self) -> int | str:
        """What it is called in a config: P, or ``all``."""
        return "all" if self.is_of_all else self.size

    def is_new(self, rows: Tensor) -> Tensor:
        """Tell which rows have not had a turn, (n,) bool."""
        self._arrive(rows)
        return self._kind[rows, 0] == 0

    def is_over(self, rows: Tensor) -> Tensor:
        """Tell of which rows all chains are over, or have not started, (n,) bool."""
        self._arrive(rows)
        return ~(self._masked[rows] > 0).any(1)

    def share_masked(self) -> Tensor:
        """Return the share of each row's answer that is masked, (P,) float; 1 where all chains are over, as they start.

        Of a pool that keeps its sequences.
        """
        self.settle()
        masked = _unpacked(self._masked).sum(1)
        if self._sequences is None:
            return torch.ones(self.size)
        answer = (~self._sequences["prompt_mask"]).sum(1)
        return torch.where(masked > 0, masked / answer.clamp_min(1), 1.0)

    def put(self, rows: Tensor, sequences: Batch) -> None:
        """Keep sequences in some rows, (n,) int64."""
        sequences = {"attention_mask": sequences["prompt_mask"] | True, **sequences}
        length = sequences["input_ids"].shape[1]
        if self._sequences is None:
            shape = (self.size, length)
            self._sequences = {
                "input_ids": torch.full(shape, padding_token(self._mask_id)),
                "prompt_mask": torch.ones(shape, dtype=torch.bool),
                "attention_mask": torch.zeros(shape, dtype=torch.bool),
            }
        length = max(length, self._sequences["input_ids"].shape[1])
        self._sequences = padded_to_multiple(self._sequences, length, self._mask_id)
        for name, values in padded_to_multiple(sequences, length, self._mask_id).items():
            self._sequences[name][rows] = values

    def sequences(self, rows: Tensor) -> Batch:
        """Return the sequences in some rows, as long as the longest of them."""
        assert self._sequences is not None
        return padding_last({name: values[rows] for name, values in self._sequences.items()})

    def chains(self, rows: Tensor, clean: Batch, process: ForwardProcess) -> Chains:
        """Return the chains in some rows, on the CPU; those that are over, or have not started, have nothing masked.

        Args:
            rows: Their numbers, (B,) int64.
            clean: Their sequences, whose length the block size divides.
            process: The forward process.
        """
        self._arrive(rows)
        length = clean["input_ids"].shape[1]
        size = self.block_size or length
        whole = Chains.fully_masked(
            clean["input_ids"], clean["prompt_mask"], self._mask_id, self.num_stages, None, size,
            clean.get("attention_mask"),
        )  # fmt: skip
        masked = cut_blocks(_to_length(_unpacked(self._masked[rows]), length), size) & ~whole.prompt_mask
        stage = _to_length(self._stage[rows], whole.num_blocks).flatten().long()
        xt = torch.where(masked, self._mask_id, whole.x0)
        chains = replace(whole, xt=xt, stage=stage, done=~masked.any(1))
        same_kind = (self._kind[rows] == torch.tensor(self._kind_now())).all(1).repeat_interleave(whole.num_blocks)
        return replace(chains, stage=torch.where(same_kind, stage, stages_told(process, chains)))

    def note(self, rows: Tensor, chains: Chains) -> None:
        """Note where the chains of some rows have moved to.

        Args:
            rows: Their numbers, (B,) int64, on the CPU. Where one comes twice, the first counts.
            chains: On any device.
        """
        blocks = chains.num_blocks
        self.num_stages, self.block_size = chains.num_stages, self.block_size and chains.x0.shape[1]
        told = torch.cat([join_blocks(chains.masked, blocks).int(), chains.stage.view(-1, blocks).int()], 1)
        self._moving.append(_Moved(rows, copy_to_host(told), blocks, self._kind_now()))

    def settle(self) -> None:
        """Wait until everything that was noted is here."""
        while self._moving:
            moved = self._moving.popleft()
            masked, stage = moved.told().tensor_split([-moved.blocks], 1)
            first = _firsts(moved.rows)
            self._masked = _put(self._masked, moved.rows[first], _packed(masked[first]))
            self._stage = _put(self._stage, moved.rows[first], stage[first])
            self._kind[moved.rows] = torch.tensor(moved.kind, dtype=torch.int32)

    def _arrive(self, rows: Tensor) -> None:
        if any(torch.isin(rows, moved.rows).any() for moved in self._moving) or len(self._moving) > 8:
            self.settle()

    def _kind_now(self) -> tuple[int, int]:
        return self.num_stages, self.block_size or 0

    def state(self) -> dict[str, Any]:
        """Return everything that is kept, as tensors and plain types."""
        self.settle()
        # Copies: a checkpoint may be written while training goes on.
        kept = {name: getattr(self, f"_{name}").clone() for name in ("masked", "stage", "kind")}
        sequences = self._sequences and {name: values.clone() for name, values in self._sequences.items()}
        now = {"num_stages": self.num_stages, "block_size": self.block_size}
        return {"name": self.name, "sequences": sequences, **now, **kept}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state of as many rows."""
        self._moving.clear()
        self.num_stages, self.block_size = state["num_stages"], state["block_size"]
        self._sequences = state["sequences"] and {name: rows.clone() for name, rows in state["sequences"].items()}
        self._masked, self._stage, self._kind = (state[name].clone() for name in ("masked", "stage", "kind"))


@dataclass(frozen=True)
class _Moved:
    """Where the chains of some rows have moved to, on its way to the host."""

    rows: Tensor
    told: Callable[[], Tensor]  # what is masked, then the stage of each block, (n, L + blocks) int32
    blocks: int
    kind: tuple[int, int]


def stages_told(process: ForwardProcess, chains: Chains) -> Tensor:
    """Return the stage of each chain that its revealed positions tell, (N,) int64."""
    num_stages = process.chain_stages(chains.num_stages, chains.answer_length)
    return stage_of(chains.revealed, num_stages, chains.answer_length)


def redealt(states: Sequence[dict[str, Any]], rank: int, ranks: int) -> dict[str, Any]:
    """Return what a rank has of pools of all sequences, of which each rank r of R has the numbers r, r + R, and so on.

    Args:
        states: Of every rank, of another number of ranks.
        rank: This process.
        ranks: How many there are now.
    """
    joined: dict[str, Any] = dict(states[0])
    for name in ("masked", "stage", "kind"):
        parts = [state[name] for state in states]
        whole = parts[0].new_zeros(sum(map(len, parts)), max(part.shape[1] for part in parts))
        for number, part in enumerate(parts):
            whole[number :: len(parts)] = _to_length(part, whole.shape[1])
        joined[name] = whole[rank::ranks]
    return joined


def _put(kept: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """Put values into rows; the narrower of both is filled with zeros."""
    kept = _to_length(kept, max(kept.shape[1], values.shape[1]))
    kept[rows] = _to_length(values, kept.shape[1]).to(kept.dtype)
    return kept


def _to_length(rows: Tensor, length: int) -> Tensor:
    """Cut columns off, or add zeros, (B, length)."""
    return rows if rows.shape[1] == length else F.pad(rows, (0, length - rows.shape[1]))


def _packed(masked: Tensor) -> Tensor:
    """Put eight columns into a byte: (n, L) to (n, L / 8) uint8."""
    return (_to_length(masked, -(-masked.shape[1] // 8) * 8).view(len(masked), -1, 8) * BITS).sum(2).to(torch.uint8)


def _unpacked(packed: Tensor) -> Tensor:
    """The reverse, (n, 8 W) bool."""
    return (packed[:, :, None] & BITS.to(torch.uint8)).bool().flatten(1)


def _firsts(rows: Tensor) -> Tensor:
    """Return where each number comes first, (n,) int64."""
    seen = dict(reversed(list(zip(rows.tolist(), range(len(rows)), strict=True))))
    return torch.tensor(sorted(seen.values()), dtype=torch.long)

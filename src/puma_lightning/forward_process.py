"""What the model trains on: a forward process turns clean sequences x0 into partly masked ones xt."""

from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from puma_lightning.schedule import StepSchedule
from puma_lightning.unmasking import (
    Confidence,
    PolicyLike,
    Prediction,
    Statistic,
    check_policy,
    reveal,
    reveal_at_random,
    score,
    stage_of,
    statistics_read,
    target_count,
)


@dataclass(frozen=True)
class Slots:
    """The rows of a training batch. Each holds one chain until it is done, then takes a fresh sequence.

    In block diffusion each block of a sequence is a chain and so a row; L is the length of a block then.

    Attributes:
        x0: Clean sequences, (B, L) int64.
        prompt_mask: True where a position is given, (B, L) bool.
        xt: The partly masked sequences to train on, (B, L) int64.
        stage: How far along its chain each sequence is, (B,) int64.
        done: True where the chain is over and the slot wants a fresh sequence, (B,) bool.
        num_stages: The K that ``stage`` counts in.
    """

    x0: Tensor
    prompt_mask: Tensor
    xt: Tensor
    stage: Tensor
    done: Tensor
    num_stages: int

    def tensors(self) -> dict[str, Any]:
        """The tensor fields by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "num_stages"}

    def to(self, device: torch.device) -> "Slots":
        """The same slots on another device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})


class ForwardProcess:
    """Base of all forward processes. Another one from another paper is one subclass in its own file.

    ``start`` is all that a process without a chain has to define: by default every slot retires after
    one step, as in ordinary masked diffusion training.
    """

    def reads(self) -> Collection[Statistic] | None:
        """The statistics of the predictions that ``advance`` makes do with; None, the default, if it needs logits."""
        return None

    def num_stages_at(self, step: int) -> int:
        """K at an optimizer step; 1 for a process without stages."""
        return 1

    def chain_stages(self, num_stages: int, answer_length: Tensor) -> Tensor:
        """The K of each chain, (B,), given that of its time and its answer length, (B,) int64."""
        return torch.full_like(answer_length, num_stages)

    def start(
        self,
        x0: Tensor,
        prompt_mask: Tensor,
        stage: Tensor,
        num_stages: int,
        mask_id: int,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Mask sequences that enter a slot. The stream does so on the CPU.

        Args:
            x0: Clean sequences, (B, L) int64.
            prompt_mask: True where a position is given and must stay, (B, L) bool.
            stage: The stage they enter at, (B,) int64; 0 but for the first, staggered fill.
            num_stages: K.
            mask_id: The mask token.
            generator: Source of all randomness, on the device of ``x0``.

        Returns:
            xt with at least one masked position in every row that has an answer, (B, L) int64.
        """
        raise NotImplementedError

    def advance(
        self,
        slots: Slots,
        predictions: Tensor | Prediction,
        step: int,
        mask_id: int,
        generator: torch.Generator | None = None,
    ) -> Slots:
        """Move the chains on after the model has seen them. Without a chain every slot retires.

        A subclass that overrides this says in ``reads`` what it needs.

        Args:
            slots: The slots that the model has just been trained on.
            predictions: Its predictions for ``slots.xt``, aligned with positions, without gradient: logits, (B, L, V),
                or what ``reads`` asks for, (B, L) each, of which that at masked positions counts.
            step: The optimizer step, for schedules.
            mask_id: The mask token.
            generator: Source of all randomness, on the device of the slots.

        Returns:
            The new slots. Those that are ``done`` are over; every other must have a masked position.
        """
        return replace(slots, done=torch.ones_like(slots.done))


class RandomMasking(ForwardProcess):
    """The usual masked diffusion training: n uniformly chosen answer positions, n uniform in 1..A."""

    def reads(self) -> Collection[Statistic]:
        return ()

    def start(
        self,
        x0: Tensor,
        prompt_mask: Tensor,
        stage: Tensor,
        num_stages: int,
        mask_id: int,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        uniform = torch.rand(x0.shape[0], dtype=torch.float, device=x0.device, generator=generator)
        return mask_fraction(x0, prompt_mask, uniform, mask_id, generator)


class NoMasking(ForwardProcess):
    """Clean sequences, for autoregressive training."""

    def reads(self) -> Collection[Statistic]:
        return ()

    def start(
        self,
        x0: Tensor,
        prompt_mask: Tensor,
        stage: Tensor,
        num_stages: int,
        mask_id: int,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        return x0


class ProgressiveUnmasking(ForwardProcess):
    """PUMA: a teacher-forced chain in the order that the model's own policy chooses (arXiv 2602.10314).

    Args:
        num_stages: K, the number of training steps each sequence stays for (about as many with a threshold); or
            a schedule of ``[optimizer step, K]`` pairs such as ``[[0, 12], [60000, 15]]``. Without a threshold
            an answer of fewer positions than that meets some of its boards more than once.
        policy: Scores masked positions; the highest are revealed first.
        threshold: If given, also reveal every masked position whose top-1 probability exceeds it.
    """

    def __init__(
        self,
        num_stages: int | list[tuple[int, int]] = 8,
        policy: PolicyLike = Confidence(),  # noqa: B008 - policies hold no state
        threshold: float | None = None,
    ) -> None:
        if threshold is not None and not 0 < threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1] or null, got {threshold}")
        self.schedule = StepSchedule("num_stages", num_stages)
        self.policy = check_policy(policy)
        self.threshold = threshold

    def reads(self) -> Collection[Statistic] | None:
        return statistics_read(self.policy, self.threshold)

    def num_stages_at(self, step: int) -> int:
        return self.schedule.at(step)

    def chain_stages(self, num_stages: int, answer_length: Tensor) -> Tensor:
        """With a threshold no more than the answer has positions.

        Else two stages in a row could ask for the same count, and as a threshold sets the stage from what is
        revealed, such a chain would stay there for ever.
        """
        stages = super().chain_stages(num_stages, answer_length)
        return stages if self.threshold is None else torch.minimum(stages, answer_length.clamp_min(1))

    def start(
        self,
        x0: Tensor,
        prompt_mask: Tensor,
        stage: Tensor,
        num_stages: int,
        mask_id: int,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        answer_length = (~prompt_mask).sum(1)
        count = target_count(stage, self.chain_stages(num_stages, answer_length), answer_length, generator)
        return reveal_at_random(x0, prompt_mask, count, mask_id, generator)

    def advance(
        self,
        slots: Slots,
        predictions: Tensor | Prediction,
        step: int,
        mask_id: int,
        generator: torch.Generator | None = None,
    ) -> Slots:
        answer_length = (~slots.prompt_mask).sum(1)
        num_stages = self.chain_stages(self.num_stages_at(step), answer_length)
        revealed = answer_length - (slots.xt == mask_id).sum(1)
        stage = slots.stage
        if self.num_stages_at(step) != slots.num_stages:
            stage = stage_of(revealed, num_stages, answer_length)

        stage = stage + 1
        done = stage >= num_stages
        target = target_count(torch.minimum(stage, num_stages - 1), num_stages, answer_length, generator)
        scores = score(self.policy, predictions, slots.xt)
        confident = None if self.threshold is None else score(Confidence(), predictions, slots.xt) > self.threshold
        xt = reveal(slots.xt, slots.x0, scores, (target - revealed).clamp_min(0), mask_id, confident, generator)
        if confident is not None:
            masked = (xt == mask_id).sum(1)
            stage = stage_of(answer_length - masked, num_stages, answer_length)
            done = done | (masked == 0)
        stage = torch.minimum(stage, num_stages - 1)
        return Slots(slots.x0, slots.prompt_mask, xt, stage, done, self.num_stages_at(step))


def mask_fraction(
    x0: Tensor, prompt_mask: Tensor, uniform: Tensor, mask_id: int, generator: torch.Generator | None = None
) -> Tensor:
    """Mask n = floor(u * A) + 1 uniformly chosen answer positions, so that n is uniform in 1..A when u is.

    Args:
        x0: Clean sequences, (B, L) int64.
        prompt_mask: True where a position is given, (B, L) bool.
        uniform: u in [0, 1), (B,) float.
        mask_id: The mask token.
        generator: Source of the choice of positions, on the device of ``x0``.

    Returns:
        xt, (B, L) int64.
    """
    answer_length = (~prompt_mask).sum(1)
    # u can round up to 1 in float32, so that n could be A + 1.
    masked = torch.minimum((uniform * answer_length).long() + 1, answer_length)
    return reveal_at_random(x0, prompt_mask, answer_length - masked, mask_id, generator)


def stratified_masking(
    x0: Tensor, prompt_mask: Tensor, mask_id: int, generator: torch.Generator | None = None
) -> Tensor:
    """Random masking with n stratified over the batch: the same expectation, a lower variance.

    Args:
        x0: Clean sequences, (B, L) int64.
        prompt_mask: True where a position is given, (B, L) bool.
        mask_id: The mask token.
        generator: Source of all randomness, on the device of ``x0``.

    Returns:
        xt, (B, L) int64.
    """
    size = x0.shape[0]
    offset = torch.rand((), dtype=torch.float, device=x0.device, generator=generator)
    strata = torch.randperm(size, device=x0.device, generator=generator)
    return mask_fraction(x0, prompt_mask, (strata.float() + offset) / size, mask_id, generator)

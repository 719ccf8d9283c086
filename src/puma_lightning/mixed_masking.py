"""PUMA with some random masks among the chains."""

from dataclasses import replace

import torch
from torch import Tensor

from puma_lightning.forward_process import ProgressiveUnmasking, Slots
from puma_lightning.unmasking import Confidence, PolicyLike, Prediction, reveal_at_random, target_count


class MixedMasking(ProgressiveUnmasking):
    """PUMA, with a share of every batch masked at random.

    A sequence that is masked at random leaves after one step, so that more fresh sequences are taken in a step than by
    PUMA alone. Its n is distributed as over all of PUMA's stages, which is as in ``RandomMasking`` up to the rounding
    of targets. To go from random masks to PUMA's in the course of training let K grow from 1, with which PUMA *is*
    random masking, again up to rounding.

    Args:
        random_share: Of the rows of a batch, on average. With a threshold, which changes how long chains are and may
            keep one at stage 0, and of answers of hardly more than K positions, or fewer, it is approximate.
        num_stages: As in ``ProgressiveUnmasking``.
        policy: As in ``ProgressiveUnmasking``.
        threshold: As in ``ProgressiveUnmasking``.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        random_share: float = 0.5,
        num_stages: int | list[tuple[int, int]] = 8,
        policy: PolicyLike = Confidence(),  # noqa: B008 - policies hold no state
        threshold: float | None = None,
    ) -> None:
        super().__init__(num_stages, policy, threshold)
        if not 0 <= random_share <= 1:
            raise ValueError(f"random_share must be in [0, 1], got {random_share}")
        self.random_share = random_share

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
        chain = super().start(x0, prompt_mask, stage, num_stages, mask_id, generator)
        count = target_count(torch.zeros_like(stage), 1, answer_length, generator)  # of any stage
        at_random = reveal_at_random(x0, prompt_mask, count, mask_id, generator)
        # A chain stays K times as long, so of those that enter more are random than of those that are there.
        entering = self.chain_stages(num_stages, answer_length) * self.random_share
        uniform = torch.rand(stage.shape, dtype=torch.float, device=stage.device, generator=generator)
        chosen = (uniform * (entering + 1 - self.random_share) < entering) & (stage == 0)
        return torch.where(chosen[:, None], at_random, chain)

    def advance(
        self,
        slots: Slots,
        predictions: Tensor | Prediction,
        step: int,
        mask_id: int,
        generator: torch.Generator | None = None,
    ) -> Slots:
        moved = super().advance(slots, predictions, step, mask_id, generator)
        answer_length = (~slots.prompt_mask).sum(1)
        revealed = answer_length - (slots.xt == mask_id).sum(1)
        # A chain begins with a random mask as well. So a slot need not say which it is: of those at stage 0 that look
        # alike, the share that is random has to leave. A chain begins with at most round(A / K) revealed, and with just
        # that many only as often as targets round up to it.
        begins = answer_length / self.chain_stages(slots.num_stages, answer_length) - revealed + 0.5
        looks = self.random_share + (1 - self.random_share) * begins.clamp(0, 1)
        uniform = torch.rand(revealed.shape, dtype=torch.float, device=revealed.device, generator=generator)
        leaves = (slots.stage == 0) & (uniform * looks < self.random_share)
        return replace(moved, done=moved.done | leaves)

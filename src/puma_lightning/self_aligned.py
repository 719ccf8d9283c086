"""A rival of PUMA: mask more than wanted, then reveal what the model finds easiest."""

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from puma_lightning.forward_process import ForwardProcess, Slots, mask_fraction
from puma_lightning.unmasking import (
    Margin,
    PolicyLike,
    Prediction,
    Statistic,
    check_policy,
    reveal,
    score,
    statistics_read,
)


class SelfAlignedMasking(ForwardProcess):
    """Over-noising and then partial denoising by margin, after SAT-Mask (Tian et al., 2026).

    A sequence stays for two training steps: one with n1 random positions masked, one with the n2 <= n1 of them that the
    model is least sure of. n1 is the larger and n2 the smaller of two independent numbers, uniform in 1..A, so that
    over both steps together the number of masked positions is distributed as in ``RandomMasking``.

    Built from the published abstract, which leaves the distribution of n1 and n2 open, and whether the model is also
    trained on the over-noised sequence. Here it is, because its forward pass is made in any case.

    Args:
        policy: Scores masked positions; the highest are revealed.
    """

    def __init__(self, policy: PolicyLike = Margin()) -> None:  # noqa: B008 - policies hold no state
        self.policy = check_policy(policy)

    def reads(self) -> Collection[Statistic] | None:
        return statistics_read(self.policy)

    def num_stages_at(self, step: int) -> int:
        """2: over-noised and partly denoised."""
        return 2

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
        # The larger of two has distribution function u^2, the smaller 1 - (1 - u)^2.
        fraction = torch.where(stage == 0, uniform.sqrt(), 1 - (1 - uniform).sqrt())
        return mask_fraction(x0, prompt_mask, fraction, mask_id, generator)

    def advance(
        self,
        slots: Slots,
        predictions: Tensor | Prediction,
        step: int,
        mask_id: int,
        generator: torch.Generator | None = None,
    ) -> Slots:
        masked = (slots.xt == mask_id).sum(1)
        uniform = torch.rand(masked.shape, dtype=torch.float, device=masked.device, generator=generator)
        # If n1 is the larger of two, the other is each smaller number twice as often as n1 itself.
        fewer = (uniform * (2 * masked - 1) / 2).long() + 1
        scores = score(self.policy, predictions, slots.xt)
        xt = reveal(slots.xt, slots.x0, scores, masked - fewer, mask_id, generator=generator)
        return replace(slots, xt=xt, stage=torch.ones_like(slots.stage), done=slots.stage > 0)

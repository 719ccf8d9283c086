"""PUMA with some random masks among the chains."""

from dataclasses import replace

import torch
from torch import Tensor

from puma_lightning.chain.chains import Chains
from puma_lightning.chain.policies import Confidence, PolicyLike
from puma_lightning.chain.reveal import reveal_at_random
from puma_lightning.chain.stages import target_count
from puma_lightning.chain.teacher.puma import ProgressiveUnmasking
from puma_lightning.output.prediction import Prediction


class MixedMasking(ProgressiveUnmasking):
    """PUMA, with a share of every batch masked at random.

    A sequence that is masked at random leaves after one step, so a step takes more fresh sequences than with PUMA
    alone. Its number of masked positions has the distribution that PUMA has over all stages, which is that of
    ``RandomMasking`` up to the rounding of targets. To go from random masks to PUMA's in the course of training, let K
    grow from 1 instead: with K = 1 PUMA *is* random masking, again up to rounding.

    Args:
        random_share: The share of a batch's rows that is masked at random, on average. The share is approximate with a
            threshold, which changes how long chains are and may keep one at stage 0, and where answers have hardly more
            than K positions.
        num_stages: As in ``ProgressiveUnmasking``.
        policy: As in ``ProgressiveUnmasking``.
        threshold: As in ``ProgressiveUnmasking``.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> x0, given = torch.tensor([[5, 3, 8]]), torch.tensor([[True, False, False]])
        >>> mixed = MixedMasking(random_share=0.5, num_stages=2)
        >>> bool(mixed.start(Chains.fully_masked(x0, given, mask_id=9, num_stages=2)).masked.any())
        True
    """

    recordable = True

    def __init__(
        self,
        random_share: float = 0.5,
        num_stages: int | list[tuple[int, int]] = 8,
        policy: PolicyLike = Confidence(),  # noqa: B008 - policies hold no state
        threshold: float | None = None,
    ) -> None:
        super().__init__(num_stages, policy, threshold)
        if not 0 <= random_share <= 1:
            raise ValueError(f"random_share: expected a share in [0, 1], got {random_share}; 0 is PUMA alone")
        self.random_share = random_share

    def start(self, chains: Chains, generator: torch.Generator | None = None) -> Chains:
        answer_length = chains.answer_length
        started = super().start(chains, generator)
        # With one stage in all the target is that of any stage.
        count = target_count(torch.zeros_like(chains.stage), 1, answer_length, generator)
        at_random = reveal_at_random(chains.xt, chains.x0, count, chains.mask_id, generator)
        # A chain stays K times as long as a random mask: for a given share of the rows that are in the batch, the share
        # of the rows that enter it must be larger.
        entering = self.chain_stages(chains.num_stages, answer_length) * self.random_share
        chosen = chains.uniform(generator) * (entering + 1 - self.random_share) < entering
        chosen = chosen & (chains.stage == 0)
        return replace(chains, xt=torch.where(chosen[:, None], at_random, started.xt))

    def advance(
        self, chains: Chains, predictions: Tensor | Prediction, step: int, generator: torch.Generator | None = None
    ) -> Chains:
        moved = super().advance(chains, predictions, step, generator)
        answer_length, revealed = chains.answer_length, chains.revealed
        # No row says whether it is a random mask or the first mask of a chain, which is random too. This is not needed:
        # among the rows at stage 0 that look the same, it is enough that the right share leaves. A first mask has at
        # most round(A / K) positions revealed, and exactly that many only as often as the target rounds up to it.
        first = answer_length / self.chain_stages(chains.num_stages, answer_length) - revealed + 0.5
        looks = self.random_share + (1 - self.random_share) * first.clamp(0, 1)
        leaves = (chains.stage == 0) & (chains.uniform(generator) * looks < self.random_share)
        return replace(moved, done=moved.done | leaves)

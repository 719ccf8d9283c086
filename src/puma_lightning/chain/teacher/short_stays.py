"""PUMA, between random masks and whole chains: sequences enter at any stage and leave before the last."""

from dataclasses import replace

import torch
from torch import Tensor

from puma_lightning.chain.chains import Chains
from puma_lightning.chain.policies import Confidence, PolicyLike
from puma_lightning.chain.teacher.puma import ProgressiveUnmasking
from puma_lightning.output.prediction import Prediction


class ShortStays(ProgressiveUnmasking):
    """PUMA whose sequences enter at a random stage, with a random mask, and leave after any step.

    More sequences are seen than with whole chains, whose masks are like each other from step to step; but the masks
    with which sequences enter are random. Stages stay spread evenly over a batch: of the sequences that enter, a share
    of 1 / (1 + q (K - 1)) begins at stage 0, and the rest at any other; q is the probability to leave. With q = 0 this
    is ``ProgressiveUnmasking``, and with q = 1 random masking. With a threshold, which changes how long chains are, the
    spread is approximate, as it is in the first steps of a run.

    Args:
        leaving: q, the probability to leave after each step. A sequence stays for about K / (1 + q (K - 1)) steps.
        num_stages: As in ``ProgressiveUnmasking``.
        policy: As in ``ProgressiveUnmasking``.
        threshold: As in ``ProgressiveUnmasking``.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> x0, given = torch.tensor([[5, 3, 8]]), torch.tensor([[True, False, False]])
        >>> short = ShortStays(leaving=1.0, num_stages=2)
        >>> chains = short.start(Chains.fully_masked(x0, given, mask_id=9, num_stages=2))
        >>> short.advance(chains, predictions=torch.zeros(1, 3, 10), step=0).done
        tensor([True])
    """

    recordable = True

    def __init__(
        self,
        leaving: float = 0.5,
        num_stages: int | list[tuple[int, int]] = 8,
        policy: PolicyLike = Confidence(),  # noqa: B008 - policies hold no state
        threshold: float | None = None,
    ) -> None:
        super().__init__(num_stages, policy, threshold)
        if not 0 <= leaving <= 1:
            raise ValueError(f"leaving: expected a probability in [0, 1], got {leaving}; 0 is PUMA")
        self.leaving = leaving

    def start(self, chains: Chains, generator: torch.Generator | None = None) -> Chains:
        num_stages = self.chain_stages(chains.num_stages, chains.answer_length)
        # In units of what begins at each stage but the first: 1 / q there, and 1 at each of the others.
        place = chains.uniform(generator) * (1 + self.leaving * (num_stages - 1)) - 1
        later = 1 + (place / max(self.leaving, 1e-6)).floor().long()
        stage = torch.where(place < 0, 0, torch.minimum(later, num_stages - 1))
        # The first batches of a run have stages already.
        stage = torch.where(chains.stage == 0, stage, chains.stage)
        return super().start(replace(chains, stage=stage), generator)

    def advance(
        self, chains: Chains, predictions: Tensor | Prediction, step: int, generator: torch.Generator | None = None
    ) -> Chains:
        moved = super().advance(chains, predictions, step, generator)
        return replace(moved, done=moved.done | (chains.uniform(generator) < self.leaving))

"""A rival of PUMA: mask more positions than wanted, then reveal those that the model finds easiest."""

from dataclasses import replace

import torch
from torch import Tensor

from puma_lightning.chain.chains import Chains
from puma_lightning.chain.policies import Margin, PolicyLike
from puma_lightning.chain.step import Unmasking
from puma_lightning.chain.teacher.base import ForwardProcess
from puma_lightning.chain.teacher.random_masking import mask_fraction
from puma_lightning.output.prediction import Prediction


class SelfAlignedMasking(ForwardProcess):
    """Over-noising and then partial denoising by margin, after SAT-Mask (Tian et al., 2026).

    A sequence stays for two training steps: one with n1 random positions masked, one with the n2 <= n1 of them that the
    model is least sure of. n1 is the larger and n2 the smaller of two independent numbers, uniform in 1..A, so that
    over both steps together the number of masked positions is distributed as in ``RandomMasking``.

    Built from the published abstract, which leaves open how n1 and n2 are distributed, and whether the model is also
    trained on the over-noised sequence. Here it is, because its forward pass is made in any case.

    Args:
        policy: Scores masked positions; the highest are revealed.

    Example:
        >>> x0, given = torch.tensor([[5, 3, 8]]), torch.tensor([[True, False, False]])
        >>> process = SelfAlignedMasking()
        >>> noisy = process.start(Chains.fully_masked(x0, given, mask_id=9, num_stages=2))
        >>> fewer = process.advance(noisy, predictions=torch.zeros(1, 3, 10), step=0)
        >>> bool(fewer.masked.sum() <= noisy.masked.sum())
        True
    """

    unmasking: Unmasking
    recordable = True

    def __init__(self, policy: PolicyLike = Margin()) -> None:  # noqa: B008 - policies hold no state
        self.unmasking = Unmasking(policy)

    def num_stages_at(self, step: int) -> int:
        """Return 2: over-noised, and partly denoised."""
        return 2

    def start(self, chains: Chains, generator: torch.Generator | None = None) -> Chains:
        uniform = chains.uniform(generator)
        # The larger of two uniform numbers has the distribution function u^2, the smaller 1 - (1 - u)^2.
        fraction = torch.where(chains.stage == 0, uniform.sqrt(), 1 - (1 - uniform).sqrt())
        return mask_fraction(chains, fraction, generator)

    def advance(
        self, chains: Chains, predictions: Tensor | Prediction, step: int, generator: torch.Generator | None = None
    ) -> Chains:
        masked = chains.masked.sum(1)
        # Given that n1 is the larger of the two, n2 = n1 has probability 1 / (2 n1 - 1), every smaller n2 twice that.
        fewer = (chains.uniform(generator) * (2 * masked - 1) / 2).long() + 1
        count = masked - fewer
        xt = self.unmasking.step(chains.xt, chains.x0, predictions, count, chains.mask_id, generator)
        return replace(chains, xt=xt, stage=torch.ones_like(chains.stage), done=chains.stage > 0)

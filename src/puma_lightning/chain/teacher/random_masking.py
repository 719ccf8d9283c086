"""Random masks: ordinary masked diffusion training, and the masks of the validation loss."""

from dataclasses import replace

import torch
from torch import Tensor

from puma_lightning.chain.chains import Chains
from puma_lightning.chain.reveal import reveal_at_random
from puma_lightning.chain.teacher.base import ForwardProcess


class RandomMasking(ForwardProcess):
    """The baseline: mask n uniformly chosen answer positions, with n uniform in 1..A.

    Args:
        stratified: Spread the n of a batch evenly over 1..A, as MDLM (arXiv 2406.07524) does with its times: every
            sequence's n is as likely as without, so the expected gradient is the same, and its variance is lower.
            Without, they are independent, as in the paper.

    Example:
        >>> x0, given = torch.tensor([[5, 3, 8]]), torch.tensor([[True, False, False]])
        >>> chains = RandomMasking().start(Chains.fully_masked(x0, given, mask_id=9))
        >>> int(chains.masked.sum()) in (1, 2)
        True
    """

    recordable = True

    def __init__(self, stratified: bool = False) -> None:
        self.stratified = stratified

    def start(self, chains: Chains, generator: torch.Generator | None = None) -> Chains:
        if self.stratified:
            return stratified_masking(chains, generator)
        return mask_fraction(chains, chains.uniform(generator), generator)


def mask_fraction(chains: Chains, uniform: Tensor, generator: torch.Generator | None = None) -> Chains:
    """Mask n = floor(u * A) + 1 uniformly chosen answer positions, so that n is uniform in 1..A when u is.

    Args:
        chains: Chains with the whole answer masked.
        uniform: u in [0, 1), (N,) float.
        generator: Source of the choice of positions, on the device of the chains.

    Returns:
        The chains with n positions masked.

    Example:
        >>> x0, given = torch.tensor([[5, 3, 8, 1]]), torch.tensor([[False, False, False, False]])
        >>> int(mask_fraction(Chains.fully_masked(x0, given, mask_id=9), torch.tensor([0.6])).masked.sum())
        3
    """
    answer_length = chains.answer_length
    # u can round up to 1 in float32, so that n could be A + 1.
    masked = torch.minimum((uniform * answer_length).long() + 1, answer_length)
    return replace(chains, xt=reveal_at_random(chains.xt, chains.x0, answer_length - masked, chains.mask_id, generator))


def stratified_masking(chains: Chains, generator: torch.Generator | None = None) -> Chains:
    """Mask at random with n stratified over the batch: the same expectation of the loss, a lower variance.

    Args:
        chains: Chains with the whole answer masked.
        generator: Source of all randomness, on the device of the chains.

    Returns:
        The chains with n positions masked, n in 1..A.

    Example:
        >>> x0, given = torch.zeros(4, 8, dtype=torch.long), torch.zeros(4, 8, dtype=torch.bool)
        >>> masked = stratified_masking(Chains.fully_masked(x0, given, mask_id=9)).masked.sum(1)
        >>> masked.sort().values // 2.001  # one row in each quarter of 1..8
        tensor([0., 1., 2., 3.])
    """
    size, device = chains.x0.shape[0], chains.x0.device
    offset = torch.rand((), dtype=torch.float, device=device, generator=generator)
    strata = torch.randperm(size, device=device, generator=generator)
    return mask_fraction(chains, (strata.float() + offset) / size, generator)

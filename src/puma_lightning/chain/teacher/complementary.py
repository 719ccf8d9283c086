"""A random mask and what it left out, so that every position of a sequence is learned once."""

from dataclasses import replace

import torch
from torch import Tensor

from puma_lightning.chain.chains import Chains
from puma_lightning.chain.teacher.base import ForwardProcess
from puma_lightning.chain.teacher.random_masking import mask_fraction
from puma_lightning.output.prediction import Prediction


class ComplementaryMasking(ForwardProcess):
    """Two training steps for each sequence, of which the second masks what the first did not.

    Fast-dLLM v2 (arXiv 2509.26328) has both masks in one batch. Here the second comes in the next step, so that a batch
    of B rows holds B different sequences, as with every other process. A sequence that was masked as a whole has no
    complement and is trained on again as it is; so the number of masked positions is uniform in 1..A in both steps.

    Example:
        >>> x0, given = torch.tensor([[5, 3, 8]]), torch.tensor([[True, False, False]])
        >>> process = ComplementaryMasking()
        >>> first = process.start(Chains.fully_masked(x0, given, mask_id=9, num_stages=2))
        >>> second = process.advance(first, predictions=torch.zeros(1, 3, 10), step=0)
        >>> bool((first.masked | second.masked | given).all())
        True
    """

    recordable = True

    def num_stages_at(self, step: int) -> int:
        """Return 2: a mask, and its complement."""
        return 2

    def start(self, chains: Chains, generator: torch.Generator | None = None) -> Chains:
        return mask_fraction(chains, chains.uniform(generator), generator)

    def advance(
        self, chains: Chains, predictions: Tensor | Prediction, step: int, generator: torch.Generator | None = None
    ) -> Chains:
        complement = ~chains.prompt_mask & ~chains.masked
        complement = torch.where(complement.any(1, keepdim=True), complement, chains.masked)
        xt = torch.where(complement, chains.mask_id, chains.x0)
        return replace(chains, xt=xt, stage=torch.ones_like(chains.stage), done=chains.stage > 0)

"""The step of the unmasking chain: the one idea of this package.

Training and sampling take the same step. Only the source of the revealed tokens differs::

    train :  xt = unmasking.step(xt, x0,    predictions, target - revealed, mask_id)   # teacher/puma.py
    sample:  xt = unmasking.step(xt, drawn, predictions, k,                 mask_id)   # student/any_order.py
"""

import torch
from torch import Tensor

from puma_lightning.chain.policies import Confidence, Policy, PolicyLike, check_policy
from puma_lightning.chain.reveal import reveal
from puma_lightning.output.prediction import Prediction, Statistic


class Unmasking:
    """One step of a chain: the policy scores the masked positions, and the best of them are revealed.

    Args:
        policy: Scores masked positions; the highest are revealed first.
        threshold: Also reveal every masked position whose top-1 probability exceeds this; None for no such rule.

    Raises:
        ValueError: If the policy cannot be called, or the threshold is not in (0, 1].

    Example:
        >>> xt, x0 = torch.tensor([[5, 9, 9, 9]]), torch.tensor([[5, 3, 8, 1]])
        >>> logits = torch.zeros(1, 4, 10)
        >>> logits[0, 2, 8] = 7.0  # the model is sure of position 2
        >>> Unmasking(Confidence()).step(xt, x0, logits, count=torch.tensor([1]), mask_id=9)
        tensor([[5, 9, 8, 9]])
    """

    def __init__(self, policy: PolicyLike, threshold: float | None = None) -> None:
        if threshold is not None and not 0 < threshold <= 1:
            raise ValueError(
                f"threshold: expected a probability in (0, 1], got {threshold}; null reveals by the policy alone"
            )
        self.policy = check_policy(policy)
        self.threshold = threshold

    def reads(self) -> tuple[Statistic, ...] | None:
        """Name the statistics of the predictions that a step makes do with; None if it needs logits."""
        policy = self.policy
        if not isinstance(policy, Policy) or type(policy).__call__ is not Policy.__call__ or policy.reads is None:
            return None
        return policy.reads if self.threshold is None else tuple({*policy.reads, *Confidence.reads})

    def step(
        self,
        xt: Tensor,
        tokens: Tensor,
        predictions: Tensor | Prediction,
        count: Tensor,
        mask_id: int,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Reveal the ``count`` best positions of each row, and those above the threshold.

        Args:
            xt: Partly masked sequences, (B, L) int64.
            tokens: What a revealed position becomes, (B, L) int64: x0 for the teacher, drawn tokens for the student.
            predictions: The model's for xt, aligned with positions: logits, (B, L, V), with -inf for the mask token, or
                what ``reads`` names, (B, L) each.
            count: How many masked positions to reveal in each row, (B,) int64.
            mask_id: The mask token.
            generator: Source of the tie-breaking, on the device of ``xt``.

        Returns:
            The new xt, (B, L) int64.
        """
        scores = _score(self.policy, predictions, xt)
        return reveal(xt, tokens, scores, count, mask_id, self.above_threshold(predictions, xt), generator)

    def above_threshold(self, predictions: Tensor | Prediction, xt: Tensor) -> Tensor | None:
        """Tell where the top-1 probability exceeds the threshold, (B, L) bool; None without a threshold."""
        return None if self.threshold is None else _score(Confidence(), predictions, xt) > self.threshold


def _score(policy: PolicyLike, predictions: Tensor | Prediction, xt: Tensor) -> Tensor:
    """Return the scores of a policy, (B, L), from logits, (B, L, V), or from the statistics it reads, (B, L) each."""
    if isinstance(predictions, Tensor):
        return policy(predictions, xt)
    assert isinstance(policy, Policy) and policy.reads is not None
    return policy.score(predictions, xt)

"""Policies: which masked position is revealed next. Training and sampling score positions by the same ones."""

from collections.abc import Callable

import torch
from torch import Tensor

from puma_lightning.output.prediction import Prediction, Statistic, statistics


class Policy:
    """Scores every position of a partly masked sequence; the highest-scored masked ones are revealed first.

    A policy sees the predictions and xt and never x0, which is what keeps the posterior and the minimiser of the loss
    (Propositions 2 and 3 of arXiv 2602.10314). Scores of positions that are not masked are ignored. Any callable with
    this signature can stand in for a ``Policy``; a function named in YAML must have its types annotated.

    Attributes:
        reads: The statistics that ``score`` makes scores of, for a policy that needs no more of the predictions; a
            large vocabulary's logits are then never kept. None if it needs the logits.

    Example:
        A policy of one's own is a subclass that names its statistics and scores them:

        >>> class MostCertainToken(Policy):
        ...     reads = ("log_prob",)
        ...     def score(self, prediction, xt):
        ...         return prediction.log_prob
        >>> MostCertainToken()(torch.zeros(1, 2, 4), torch.tensor([[3, 3]])).shape
        torch.Size([1, 2])
    """

    reads: tuple[Statistic, ...] | None = None

    def score(self, prediction: Prediction, xt: Tensor) -> Tensor:
        """Return scores, (B, L), from the statistics that the policy reads, (B, L) each, and xt, (B, L)."""
        raise NotImplementedError

    def __call__(self, logits: Tensor, xt: Tensor) -> Tensor:
        """Score positions.

        Args:
            logits: Predictions aligned with positions, (B, L, V).
            xt: The partly masked sequences, (B, L) int64.

        Returns:
            Scores, (B, L) float. Equal scores are revealed in uniformly random order.
        """
        if self.reads is None:
            raise NotImplementedError
        return self.score(statistics(logits, self.reads), xt)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


PolicyLike = Policy | Callable[[Tensor, Tensor], Tensor]


class Confidence(Policy):
    """The probability of the most likely token ("top-k" in the paper).

    Example:
        >>> logits, xt = torch.tensor([[[0.0, 5.0, 0.0], [1.0, 0.0, 0.0]]]), torch.tensor([[2, 2]])
        >>> Confidence()(logits, xt).argmax().item()
        0
    """

    reads: tuple[Statistic, ...] = ("log_prob",)

    def score(self, prediction: Prediction, xt: Tensor) -> Tensor:
        assert prediction.log_prob is not None
        return prediction.log_prob.exp()


class Margin(Policy):
    """The probability of the most likely token minus that of the second ("top-k margin" in the paper).

    Example:
        >>> logits, xt = torch.tensor([[[5.0, 5.0, 0.0], [2.0, 0.0, 0.0]]]), torch.tensor([[2, 2]])
        >>> Margin()(logits, xt).argmax().item()
        1
    """

    reads: tuple[Statistic, ...] = ("margin",)

    def score(self, prediction: Prediction, xt: Tensor) -> Tensor:
        assert prediction.margin is not None
        return prediction.margin


class Entropy(Policy):
    """The negative entropy of the prediction, in nats: the most certain position first.

    Example:
        >>> Entropy()(torch.zeros(1, 1, 4), torch.tensor([[3]]))
        tensor([[-1.3863]])
    """

    reads: tuple[Statistic, ...] = ("entropy",)

    def score(self, prediction: Prediction, xt: Tensor) -> Tensor:
        assert prediction.entropy is not None
        return -prediction.entropy


class RandomOrder(Policy):
    """The same score for every position, so that the order is uniformly random.

    Example:
        >>> RandomOrder()(torch.zeros(1, 2, 4), torch.tensor([[3, 3]]))
        tensor([[0., 0.]])
    """

    reads: tuple[Statistic, ...] = ()

    def score(self, prediction: Prediction, xt: Tensor) -> Tensor:
        return torch.zeros(xt.shape, device=xt.device)


class LeftToRight(Policy):
    """The leftmost masked position first.

    Example:
        >>> LeftToRight()(torch.zeros(1, 3, 4), torch.tensor([[3, 3, 3]]))
        tensor([[-0., -1., -2.]])
    """

    reads: tuple[Statistic, ...] = ()

    def score(self, prediction: Prediction, xt: Tensor) -> Tensor:
        return -torch.arange(xt.shape[1], device=xt.device, dtype=torch.float).expand(xt.shape)


def check_policy(policy: PolicyLike) -> PolicyLike:
    """Return the policy.

    Raises:
        ValueError: If it is not an instance or a function that can be called with (logits, xt).

    Example:
        >>> check_policy(Confidence())
        Confidence()
    """
    if isinstance(policy, type) or not callable(policy):
        raise ValueError(
            f"policy: expected an instance such as Confidence(), or a function (logits, xt) -> scores, got {policy!r}"
            "; give one of these"
        )
    return policy


def policy_name(policy: PolicyLike) -> str:
    """Return a short lower-case name for logs: that of the class, or of the user's own callable.

    Example:
        >>> policy_name(Confidence())
        'confidence'
    """
    return str(getattr(policy, "__name__", type(policy).__name__)).lower()

"""The unmasking chain: policies score masked positions, ``reveal`` uncovers the best of them.

Training and sampling are the same chain and call the same functions. Only the source of the revealed
tokens differs::

    train :  xt = reveal(xt, tokens=x0,           scores=policy(logits, xt), count=n)   # teacher
    sample:  xt = reveal(xt, tokens=draw(logits), scores=policy(logits, xt), count=n)   # student

Everything here is a pure function of tensors, works on whole batches and never waits for the device.
Where an order is random, that is how ``reveal`` breaks ties; so a policy is a plain function of the logits and xt.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Statistic = Literal["token", "log_prob", "margin", "entropy"]


@dataclass(frozen=True)
class Prediction:
    """What the model says about positions, without gradient; None where it was not asked for.

    Attributes:
        nll: -log p(target) in nats, (...) float32.
        token: The most likely token, (...) int64.
        log_prob: Its log-probability, (...) float32.
        margin: Its probability minus that of the second, (...) float32.
        entropy: Of the distribution, in nats, (...) float32.
        drawn: A token drawn from the distribution, (...) int64.
    """

    nll: Tensor | None = None
    token: Tensor | None = None
    log_prob: Tensor | None = None
    margin: Tensor | None = None
    entropy: Tensor | None = None
    drawn: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Prediction":
        """The same with a function applied to everything that is there."""
        return Prediction(**{name: function(value) for name, value in vars(self).items() if value is not None})


def statistics(logits: Tensor, names: Collection[Statistic]) -> Prediction:
    """Statistics of predictions that are there as logits, (..., V)."""
    logits = logits.float()
    found: dict[str, Tensor] = {}
    if "token" in names:
        found["token"] = logits.argmax(-1)
    if "log_prob" in names:
        found["log_prob"] = logits.amax(-1) - logits.logsumexp(-1)
    if "margin" in names:
        top = (logits.topk(2, dim=-1).values - logits.logsumexp(-1, keepdim=True)).exp()
        found["margin"] = top[..., 0] - top[..., 1]
    if "entropy" in names:
        found["entropy"] = torch.special.entr(logits.softmax(-1)).sum(-1)
    return Prediction(**found)


class Policy:
    """Scores every position of a partly masked sequence; the highest-scored masked ones are revealed first.

    A policy sees the logits and xt and never x0, which is what keeps the posterior and the minimiser of
    the loss (Propositions 2 and 3 of arXiv 2602.10314). Scores of positions that are not masked are
    ignored. Any callable with this signature can stand in for a ``Policy``; a function named in YAML must
    have its types annotated.

    Attributes:
        reads: The statistics that ``score`` makes scores of, for a policy that needs no more of the predictions; a
            large vocabulary's logits are then never kept. None if it needs the logits.
    """

    reads: tuple[Statistic, ...] | None = None

    def score(self, prediction: Prediction, xt: Tensor) -> Tensor:
        """Scores, (B, L), from the statistics that the policy reads, (B, L) each, and xt, (B, L)."""
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
    """The probability of the most likely token ("top-k" in the paper)."""

    reads: tuple[Statistic, ...] = ("log_prob",)

    def score(self, prediction: Prediction, xt: Tensor) -> Tensor:
        assert prediction.log_prob is not None
        return prediction.log_prob.exp()


class Margin(Policy):
    """The probability of the most likely token minus that of the second ("top-k margin")."""

    reads: tuple[Statistic, ...] = ("margin",)

    def score(self, prediction: Prediction, xt: Tensor) -> Tensor:
        assert prediction.margin is not None
        return prediction.margin


class Entropy(Policy):
    """The negative entropy of the prediction, in nats: the most certain position first."""

    reads: tuple[Statistic, ...] = ("entropy",)

    def score(self, prediction: Prediction, xt: Tensor) -> Tensor:
        assert prediction.entropy is not None
        return -prediction.entropy


class RandomOrder(Policy):
    """Every position alike, so that the order is uniformly random."""

    reads: tuple[Statistic, ...] = ()

    def score(self, prediction: Prediction, xt: Tensor) -> Tensor:
        return torch.zeros(xt.shape, device=xt.device)


class LeftToRight(Policy):
    """The leftmost masked position first."""

    reads: tuple[Statistic, ...] = ()

    def score(self, prediction: Prediction, xt: Tensor) -> Tensor:
        return -torch.arange(xt.shape[1], device=xt.device, dtype=torch.float).expand(xt.shape)


def statistics_read(policy: PolicyLike, threshold: float | None = None) -> tuple[Statistic, ...] | None:
    """The statistics that a policy, and a threshold on the top-1 probability, make do with; None if it needs logits."""
    if not isinstance(policy, Policy) or type(policy).__call__ is not Policy.__call__ or policy.reads is None:
        return None
    return policy.reads if threshold is None else tuple({*policy.reads, *Confidence.reads})


def score(policy: PolicyLike, predictions: Tensor | Prediction, xt: Tensor) -> Tensor:
    """The scores of a policy, (B, L), from logits, (B, L, V), or from the statistics that it reads, (B, L) each."""
    if isinstance(predictions, Tensor):
        return policy(predictions, xt)
    assert isinstance(policy, Policy) and policy.reads is not None
    return policy.score(predictions, xt)


def exclude_token(logits: Tensor, token: int) -> Tensor:
    """Give a token, such as the mask, probability 0.

    Args:
        logits: (..., V).
        token: Its id.

    Returns:
        Logits with -inf for the token, (..., V).
    """
    return logits.masked_fill(torch.arange(logits.shape[-1], device=logits.device) == token, float("-inf"))


def check_policy(policy: PolicyLike) -> PolicyLike:
    """Return the policy.

    Raises:
        ValueError: If it is not an instance or a function that can be called with (logits, xt).
    """
    if isinstance(policy, type) or not callable(policy):
        raise ValueError(
            f"policy must be an instance such as Confidence(), or a function (logits, xt) -> scores, got {policy!r}"
        )
    return policy


def policy_name(policy: PolicyLike) -> str:
    """A short lower-case name for logs: ``confidence``, or the name of the user's own callable."""
    return str(getattr(policy, "__name__", type(policy).__name__)).lower()


def reveal(
    xt: Tensor,
    tokens: Tensor,
    scores: Tensor,
    count: Tensor,
    mask_id: int,
    also: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Uncover the highest-scored masked positions. Positions that are not masked never change.

    Args:
        xt: Partly masked sequences, (B, L) int64.
        tokens: What a revealed position becomes, (B, L) int64: x0 for the teacher, draws for the student.
        scores: Higher is revealed earlier, (B, L). Ties are broken uniformly at random.
        count: How many masked positions to reveal in each row, (B,) int64; all of them where it is more
            than the row has.
        mask_id: The mask token.
        also: Masked positions to reveal whatever their score, (B, L) bool.
        generator: Source of the tie-breaking, on the device of ``xt``.

    Returns:
        The new xt, (B, L) int64.

    Raises:
        ValueError: If the scores have another shape, or (looked for on the CPU only) are NaN where xt is masked.
    """
    masked = xt == mask_id
    if scores.shape != xt.shape:
        raise ValueError(f"a policy must return scores (B, L) = {tuple(xt.shape)}, got {tuple(scores.shape)}")
    if scores.device.type == "cpu" and (scores.isnan() & masked).any():
        raise ValueError("a policy returned NaN for a masked position; scores must be numbers")
    # Positions that are not masked come last, behind a masked position scored -inf as well.
    scores = scores.float().clamp_min(torch.finfo(torch.float).min).masked_fill(~masked, float("-inf"))
    shuffle = torch.rand(xt.shape, dtype=torch.float, device=xt.device, generator=generator).argsort(dim=1)
    ranked = scores.gather(1, shuffle).argsort(dim=1, descending=True, stable=True)
    order = shuffle.gather(1, ranked)
    first = torch.arange(xt.shape[1], device=xt.device) < count[:, None]
    chosen = torch.zeros_like(masked).scatter(1, order, first)
    if also is not None:
        chosen = chosen | also
    return torch.where(chosen & masked, tokens, xt)


def reveal_at_random(
    x0: Tensor, prompt_mask: Tensor, count: Tensor, mask_id: int, generator: torch.Generator | None = None
) -> Tensor:
    """Mask the whole answer, then reveal ``count`` uniformly chosen positions of it.

    Args:
        x0: Clean sequences, (B, L) int64.
        prompt_mask: True where a position is given, (B, L) bool.
        count: Revealed answer positions in each row, (B,) int64.
        mask_id: The mask token.
        generator: Source of the choice, on the device of ``x0``.

    Returns:
        xt, (B, L) int64.
    """
    xt = x0.masked_fill(~prompt_mask, mask_id)
    return reveal(xt, x0, torch.zeros(xt.shape, device=xt.device), count, mask_id, generator=generator)


def target_count(
    stage: Tensor, num_stages: int | Tensor, answer_length: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """How many answer positions are uncovered at a stage (section 3.2 of arXiv 2602.10314).

    ``min(round(r * A), A - 1)`` with r drawn uniformly from [s / K, (s + 1) / K).

    Args:
        stage: s in 0..K-1, any shape, int64.
        num_stages: K, of all chains or of each.
        answer_length: A, the same shape as ``stage``, int64.
        generator: Source of r, on the device of ``stage``.

    Returns:
        Counts in 0..A-1, the shape of ``stage``, int64.
    """
    uniform = torch.rand(stage.shape, dtype=torch.float, device=stage.device, generator=generator)
    count = ((stage + uniform) / num_stages * answer_length).round().long()
    return torch.minimum(count, answer_length - 1)


def stage_of(revealed: Tensor, num_stages: int | Tensor, answer_length: Tensor) -> Tensor:
    """The stage that a number of uncovered positions belongs to.

    The bucket s of K with s / K < revealed / A <= (s + 1) / K; nothing revealed is stage 0. A bucket
    holds its upper end because ``target_count`` rounds. A - 1, the most that a target asks for, is always the
    last stage: where A = K it would be the last but one, and a chain that got there would never end. So is the only
    count of a chain without an answer.

    Args:
        revealed: Uncovered answer positions, any shape, int64.
        num_stages: K, of all chains or of each.
        answer_length: A, the same shape as ``revealed``, int64.

    Returns:
        Stages in 0..K-1, the shape of ``revealed``, int64.
    """
    # Less than num_stages already: revealed <= answer_length.
    stage = ((revealed * num_stages - 1) // answer_length.clamp_min(1)).clamp_min(0)
    return torch.where(revealed >= answer_length - 1, num_stages - 1, stage)


def cut_blocks(rows: Tensor, block_size: int) -> Tensor:
    """Cut sequences into blocks, each a row of its own: (B, L, ...) to (B * L / S, S, ...), S the block size.

    Raises:
        ValueError: As ``check_block_size``.
    """
    check_block_size(block_size, rows.shape[1])
    return rows.reshape(-1, block_size, *rows.shape[2:])


def check_block_size(block_size: int, length: int) -> None:
    """Check that blocks of a size fill a sequence.

    Raises:
        ValueError: If it does not divide the length; names the sizes that do.
    """
    if length % block_size:
        divisors = ", ".join(str(n) for n in range(1, length + 1) if length % n == 0)
        raise ValueError(
            f"block_size must divide the sequence length {length}, got {block_size}; "
            f"choose among {divisors}, or another sequence length"
        )

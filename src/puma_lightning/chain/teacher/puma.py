"""PUMA, progressive unmasking: Algorithm 1 of arXiv 2602.10314.

Line by line, as the code goes through it, with s the stage of a chain, K the number of stages and A its answer length:

1. Take a clean sequence and mask its answer. Reveal target(0) positions, uniformly chosen (``start``). In the first
   batches of a run the stages are spread evenly over 0..K-1, and target(s) positions are revealed.
2. Run the model on xt, once: this gives the loss, and predictions for the policy (the module's ``training_step``).
3. s <- s + 1. If s = K, the chain is over (``advance``, and all lines below).
4. Otherwise draw target(s) = min(round(r A), A - 1) with r uniform in [s / K, (s + 1) / K).
5. Reveal the highest-scored masked positions, with the tokens of x0, until target(s) are revealed.
6. With a threshold also reveal every masked position whose top-1 probability exceeds it; then s is the stage that
   what is revealed belongs to, and a chain with nothing masked is over.
7. A new clean sequence takes the place of a chain that is over (``training/stream.py``). With a ``pool`` there are
   more chains than a batch has rows, and they take turns (``training/pooled.py``).
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from puma_lightning.chain.chains import Chains
from puma_lightning.chain.policies import Confidence, PolicyLike
from puma_lightning.chain.reveal import reveal_at_random
from puma_lightning.chain.stages import StepSchedule, stage_of, target_count
from puma_lightning.chain.step import Unmasking
from puma_lightning.chain.teacher.base import ForwardProcess
from puma_lightning.output.prediction import Prediction


class ProgressiveUnmasking(ForwardProcess):
    """PUMA: a teacher-forced chain in the order that the model's own policy chooses (arXiv 2602.10314).

    Args:
        num_stages: K, the number of training steps each sequence stays for (about as many with a threshold); or
            a schedule of ``[optimizer step, K]`` pairs such as ``[[0, 12], [60000, 15]]``. Without a threshold
            an answer of fewer than K positions is trained on more than once with the same mask.
        policy: Scores masked positions; the highest are revealed first.
        threshold: If given, also reveal every masked position whose top-1 probability exceeds it.
        pool: P, to train each step on B of P chains in shuffled order, so that a sequence's masks are spread over many
            steps: a multiple of the batch size (times accumulation), for each process. ``all`` keeps a chain for every
            training sequence and moves it on once an epoch. By default P = B, the paper's batch streaming. A chain
            that waits has been moved by a model of up to two passes over the pool ago. The posterior and the minimiser
            stay the same, as any policy that does not see what is masked keeps them (Propositions 2 and 3); what is
            approximate is that the order is that of the *current* model.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> x0, given = torch.tensor([[5, 3, 8, 1]]), torch.tensor([[True, False, False, False]])
        >>> puma = ProgressiveUnmasking(num_stages=3)
        >>> chains = puma.start(Chains.fully_masked(x0, given, mask_id=9, num_stages=3))
        >>> steps = 0
        >>> while not chains.done.all():
        ...     steps += 1
        ...     chains = puma.advance(chains, predictions=torch.zeros(1, 4, 10), step=steps)
        >>> steps
        3
    """

    unmasking: Unmasking
    recordable = True

    def __init__(
        self,
        num_stages: int | list[tuple[int, int]] = 8,
        policy: PolicyLike = Confidence(),  # noqa: B008 - policies hold no state
        threshold: float | None = None,
        pool: int | Literal["all"] | None = None,
    ) -> None:
        if pool is not None and pool != "all" and (type(pool) is not int or pool < 1):
            raise ValueError(
                f"pool: expected a number of chains, or all, got {pool!r}; null has as many as a batch has rows"
            )
        self.pool = pool
        self.schedule = StepSchedule("num_stages", num_stages)
        self.unmasking = Unmasking(policy, threshold)

    def num_stages_at(self, step: int) -> int:
        return self.schedule.at(step)

    def chain_stages(self, num_stages: int, answer_length: Tensor) -> Tensor:
        """Return the K of each chain: with a threshold, no more than its answer has positions.

        With more stages than positions, two stages in a row can ask for the same count. As a threshold tells the stage
        from what is revealed, a chain would then stay at a stage for ever.
        """
        stages = super().chain_stages(num_stages, answer_length)
        return stages if self.unmasking.threshold is None else torch.minimum(stages, answer_length.clamp_min(1))

    def start(self, chains: Chains, generator: torch.Generator | None = None) -> Chains:
        answer_length = chains.answer_length
        num_stages = self.chain_stages(chains.num_stages, answer_length)
        count = target_count(chains.stage, num_stages, answer_length, generator)  # 1
        return replace(chains, xt=reveal_at_random(chains.xt, chains.x0, count, chains.mask_id, generator))

    def advance(
        self, chains: Chains, predictions: Tensor | Prediction, step: int, generator: torch.Generator | None = None
    ) -> Chains:
        answer_length, revealed, stage = chains.answer_length, chains.revealed, chains.stage
        num_stages = self.chain_stages(self.num_stages_at(step), answer_length)
        if self.num_stages_at(step) != chains.num_stages:
            stage = stage_of(revealed, num_stages, answer_length)

        stage = stage + 1  # 3
        done = stage >= num_stages
        target = target_count(torch.minimum(stage, num_stages - 1), num_stages, answer_length, generator)  # 4
        count = (target - revealed).clamp_min(0)
        xt = self.unmasking.step(chains.xt, chains.x0, predictions, count, chains.mask_id, generator)  # 5, 6
        moved = replace(chains, xt=xt, num_stages=self.num_stages_at(step))
        if self.unmasking.threshold is not None:  # 6
            stage = stage_of(moved.revealed, num_stages, answer_length)
            done = done | ~moved.masked.any(1)
        return replace(moved, stage=torch.minimum(stage, num_stages - 1), done=done)

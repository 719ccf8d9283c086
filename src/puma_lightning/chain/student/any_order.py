"""The student's chain: complete masked sequences in any order, with the model's own tokens."""

from collections.abc import Callable

import torch
from torch import Tensor

from puma_lightning.chain.policies import Confidence, PolicyLike, policy_name
from puma_lightning.chain.step import Unmasking
from puma_lightning.chain.student.sample import MaskedPredictor, Sample, Selectable, end_at_first_eos, name_of_draw
from puma_lightning.output.drawing import check_draw, draw
from puma_lightning.output.prediction import Prediction, exclude_token


class Sampler:
    """Any-order sampling: score the masked positions, reveal the best, repeat until none is masked.

    Args:
        policy: Scores masked positions; the highest are revealed first.
        tokens_per_step: Positions revealed in each forward pass; 1 if nothing else is given.
        num_steps: Instead: the number of forward passes, over which the positions are spread evenly.
        threshold: Also reveal every masked position whose top-1 probability exceeds it.
        temperature: 0 takes the most likely token, otherwise tokens are drawn from softmax(logits / temperature).
        top_p: Draw only from the smallest set of tokens with at least this probability.
        end_at_eos: Whether an EOS that is revealed reveals as EOS, in the same pass, all positions after it that are
            still masked; so the model says how long an answer is. Positions before it go on, and tokens that stood
            after it already stay.

    Raises:
        ValueError: If an argument is out of range, or both ``tokens_per_step`` and ``num_steps`` are given.

    Example:
        A model can be any function from xt, (B, L), to logits, (B, L, V):

        >>> def always_seven(xt):
        ...     return torch.nn.functional.one_hot(torch.full_like(xt, 7), 10).float()
        >>> sample = Sampler(tokens_per_step=2)(always_seven, torch.tensor([[5, 9, 9, 9]]), mask_id=9)
        >>> sample.tokens, sample.nfe
        (tensor([[5, 7, 7, 7]]), tensor([2]))
    """

    def __init__(
        self,
        policy: PolicyLike = Confidence(),  # noqa: B008 - policies hold no state
        tokens_per_step: int | None = None,
        num_steps: int | None = None,
        threshold: float | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        end_at_eos: bool = False,
    ) -> None:
        if tokens_per_step is not None and num_steps is not None:
            raise ValueError(
                f"tokens_per_step: expected null where num_steps is given, got {tokens_per_step} and {num_steps}; give "
                "one of them"
            )
        for name, number in (("tokens_per_step", tokens_per_step), ("num_steps", num_steps)):
            if number is not None and number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}; give a positive integer, or null")
        check_draw(temperature, top_p)
        self.unmasking = Unmasking(policy, threshold)
        self.tokens_per_step = tokens_per_step or 1
        self.num_steps = num_steps
        self.temperature = temperature
        self.top_p = top_p
        self.end_at_eos = end_at_eos

    @property
    def name(self) -> str:
        """A short name for logs: ``confidence_1``, ``margin_steps8``, ``confidence_1_tau0.9``, ``confidence_1_eos``."""
        policy, threshold = self.unmasking.policy, self.unmasking.threshold
        pace = f"steps{self.num_steps}" if self.num_steps else str(self.tokens_per_step)
        tau = [f"tau{threshold:g}"] if threshold is not None else []
        eos = ["eos"] if self.end_at_eos else []
        return "_".join([policy_name(policy), pace, *tau, *name_of_draw(self.temperature, self.top_p), *eos])

    def check_eos(self, eos_id: int | None) -> None:
        """Check that there is an EOS if this sampler is to end at one.

        Raises:
            ValueError: If not.
        """
        if self.end_at_eos and eos_id is None:
            raise ValueError(
                "end_at_eos: expected false where no token ends an answer, got true without an eos_id; give the model "
                "(or this call) one, or data that offer it, or leave end_at_eos out"
            )

    @torch.no_grad()
    def __call__(
        self,
        model: Callable[[Tensor], Tensor],
        xt: Tensor,
        mask_id: int,
        generator: torch.Generator | None = None,
        eos_id: int | None = None,
    ) -> Sample:
        """Complete a batch.

        Rows leave the batch as they are finished if the model can ``select`` rows, unless its attribute
        ``static_shapes`` says that a batch of another size costs it more.

        Args:
            model: xt (B, L) to logits aligned with positions (B, L, V).
            xt: Sequences with the mask token at the positions to fill, (B, L) int64.
            mask_id: The mask token; it is never drawn.
            generator: Source of all randomness, on the device of ``xt``.
            eos_id: The token that ends an answer, for ``end_at_eos``.

        Returns:
            The completed sequences.

        Raises:
            ValueError: If answers are to end at EOS, and there is none.
        """
        self.check_eos(eos_id)
        sample = Sample.of_masked(xt, mask_id)
        rows = torch.arange(len(xt), device=xt.device)
        leaving = isinstance(model, Selectable) and not getattr(model, "static_shapes", False)
        step = 0
        while number := int((going := (sample.tokens[rows] == mask_id).any(1)).sum()):
            if number < len(rows) and leaving:
                kept = going.nonzero().squeeze(1)
                rows, model = rows[kept], model.select(kept)  # type: ignore[attr-defined]
            xt = sample.tokens[rows]
            masked = xt == mask_id
            predictions, drawn = self._predict(model, xt, masked, mask_id, generator)
            remaining = masked.sum(1)
            if self.num_steps:
                steps_left = max(1, self.num_steps - step)
                count = (remaining + steps_left - 1) // steps_left
            else:
                count = torch.full_like(remaining, self.tokens_per_step)
            xt = self.unmasking.step(xt, drawn, predictions, count, mask_id, generator)
            if self.end_at_eos and eos_id is not None:
                xt = end_at_first_eos(xt, sample.reveal_step[rows] >= 0, mask_id, eos_id)
            sample.tokens[rows] = xt
            sample.reveal_step[rows] = torch.where(masked & (xt != mask_id), step, sample.reveal_step[rows])
            sample.nfe[rows] += remaining > 0
            step += 1
        return sample

    def _predict(
        self,
        model: Callable[[Tensor], Tensor],
        xt: Tensor,
        masked: Tensor,
        mask_id: int,
        generator: torch.Generator | None,
    ) -> tuple[Tensor | Prediction, Tensor]:
        """Return what the model predicts, logits or statistics, and a drawn token for every masked position, (B, L)."""
        reads = self.unmasking.reads()
        if reads is not None and isinstance(model, MaskedPredictor):
            found = model.predict_masked(xt, masked, reads, self.temperature, self.top_p, generator)
            if found is not None and found.drawn is not None:
                return found, found.drawn
        logits = exclude_token(model(xt), mask_id)
        return logits, draw(logits, mask_id, self.temperature, self.top_p, generator)

"""The student's chain: complete masked sequences in any order, with the model's own tokens."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from puma_lightning import graphs
from puma_lightning.chain.policies import Confidence, Policy, PolicyLike, policy_name
from puma_lightning.chain.step import Unmasking
from puma_lightning.chain.student.recorded import Recordable, RecordedPasses, state_of
from puma_lightning.chain.student.sample import MaskedPredictor, Sample, Selectable, end_at_first_eos, name_of_draw
from puma_lightning.output.drawing import check_draw, draw
from puma_lightning.output.prediction import Prediction, exclude_token

LOOK_EVERY = 8  # passes
POSITIONS = 512  # masked ones, by which the output layer's graphs of a large vocabulary differ


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

        On CUDA the passes of a ``Recordable`` model are recorded for a batch shape, and replayed by later passes and
        later batches, see ``recorded.py``. Rows stay in the batch then. The host looks at how much is masked at the
        start, and after every 8th pass if a threshold or an EOS may have revealed more than the pace does; passes after
        the end change nothing. If the model or the policy looks at a value, passes are taken as they are, and a warning
        says so. Those of a subclass are never recorded.

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
        ids: dict[str, Any] = {"mask_id": mask_id, "eos_id": eos_id}
        recorded = self._recorded(model, sample, generator, **ids)
        if recorded is not None:
            assert isinstance(model, Recordable)
            recorded.begin(model, sample, generator)
            counted = model.per_position and self.unmasking.reads() is not None
            size = xt.numel()
            self._complete(
                lambda number: recorded(_bucket(number, size) if counted else None), recorded.sample, mask_id
            )
            return recorded.end(generator)
        step = torch.zeros((), dtype=torch.long, device=xt.device)
        if not isinstance(model, Selectable) or getattr(model, "static_shapes", False):
            self._complete(lambda _: self._take_pass(model, sample, step, generator, **ids), sample, mask_id)
            return sample
        rows = torch.arange(len(xt), device=xt.device)
        while number := int((going := (sample.tokens[rows] == mask_id).any(1)).sum()):
            if number < len(rows):
                kept = going.nonzero().squeeze(1)
                rows, model = rows[kept], model.select(kept)
            part = Sample(sample.tokens[rows], sample.reveal_step[rows], sample.nfe[rows])
            self._take_pass(model, part, step, generator, **ids)
            sample.tokens[rows], sample.reveal_step[rows], sample.nfe[rows] = part.tokens, part.reveal_step, part.nfe
        return sample

    def _recorded(
        self, model: Any, sample: Sample, generator: torch.Generator | None, mask_id: int, eos_id: int | None
    ) -> RecordedPasses | None:
        """Return the passes over batches of this shape, where they can be recorded."""
        device = sample.tokens.device
        # What a subclass depends on is not known.
        if type(self) is not Sampler or not graphs.can_record(device) or not isinstance(model, Recordable):
            return None
        if (passes := model.passes) is None:
            return None
        fixed = copy.copy(self)  # which nobody changes
        fixed.unmasking = copy.copy(self.unmasking)
        take = partial(fixed._take_pass, mask_id=mask_id, eos_id=eos_id)
        policy = self.unmasking.policy
        stateless = isinstance(policy, Policy) and not vars(policy)  # then two of a class are alike
        state = tuple((id(owner), value) for owner, value in state_of(policy))
        key = (
            (
                type(policy) if stateless else id(policy),
                state,
                self.unmasking.threshold,
                self.tokens_per_step,
                self.num_steps,
            ),
            (self.temperature, self.top_p, self.end_at_eos, mask_id, eos_id, generator is None),
            (device, sample.tokens.shape, *((n, x.shape, x.dtype) for n, x in model.inputs().items())),
            (torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)),
        )
        name = f"sampling from {type(model.model).__name__} by {self.name}"
        return passes.of(
            model.model, key, lambda pool: RecordedPasses(take, model, sample, generator, pool=pool, name=name)
        )

    def _complete(self, take_pass: Callable[[int], None], sample: Sample, mask_id: int) -> None:
        """Take passes over a whole batch until nothing is masked, with few looks at how much is.

        Args:
            take_pass: Takes a pass in place, given a bound on the number of masked positions.
            sample: The sample so far.
            mask_id: The mask token.
        """
        recording = graphs.can_record(sample.tokens.device)
        every = LOOK_EVERY if recording else 1  # where the host need not hurry it stops at once
        told = recording and self.unmasking.threshold is None and not self.end_at_eos
        left: list[int] = (sample.tokens == mask_id).sum(1).tolist()  # of each row, at most
        step = 0
        while any(left):
            take_pass(sum(left))
            left = [number - min(number, self._pace(number, step)) for number in left]
            step += 1
            if not told and step % every == 0:
                left = (sample.tokens == mask_id).sum(1).tolist()

    def _pace(self, number: int, step: int) -> int:
        """Return how many of a row's masked positions a pass reveals at least."""
        if self.num_steps is None:
            return self.tokens_per_step
        return -(-number // max(1, self.num_steps - step))

    def _take_pass(
        self,
        model: Any,
        sample: Sample,
        step: Tensor,
        generator: torch.Generator | None,
        number: int | None = None,
        *,
        mask_id: int,
        eos_id: int | None,
    ) -> None:
        """Take a pass in place; a row in which nothing is masked stays as it is, and the pass is none of its own.

        It looks at no value and has no shape that depends on one, unless the model or the policy has.

        Args:
            model: For the rows of the sample.
            sample: The sample so far.
            step: The number of the pass, counted from 0, which is raised, () int64.
            generator: Source of all randomness.
            number: How many positions are masked at most, if the model wants to know.
            mask_id: The mask token.
            eos_id: The token that ends an answer.
        """
        xt = sample.tokens.clone()
        masked = xt == mask_id
        predictions, drawn = self._predict(model, xt, masked, mask_id, generator, number)
        remaining = masked.sum(1)
        if self.num_steps:
            steps_left = (self.num_steps - step).clamp_min(1)
            count = (remaining + steps_left - 1) // steps_left
        else:
            count = torch.full_like(remaining, self.tokens_per_step)
        xt = self.unmasking.step(xt, drawn, predictions, count, mask_id, generator)
        if self.end_at_eos and eos_id is not None:
            xt = end_at_first_eos(xt, sample.reveal_step >= 0, mask_id, eos_id)
        # All that changes changes here, so that a pass that fails has done nothing.
        sample.reveal_step.copy_(torch.where(masked & (xt != mask_id), step, sample.reveal_step))
        sample.tokens.copy_(xt)
        sample.nfe.add_(remaining > 0)
        step.add_(1)

    def _predict(
        self,
        model: Callable[[Tensor], Tensor],
        xt: Tensor,
        masked: Tensor,
        mask_id: int,
        generator: torch.Generator | None,
        number: int | None = None,
    ) -> tuple[Tensor | Prediction, Tensor]:
        """Return what the model predicts, logits or statistics, and a drawn token for every masked position, (B, L)."""
        reads = self.unmasking.reads()
        if reads is not None and isinstance(model, MaskedPredictor):
            known: dict[str, Any] = {} if number is None else {"number": number}
            found = model.predict_masked(xt, masked, reads, self.temperature, self.top_p, generator, **known)
            if found is not None and found.drawn is not None:
                return found, found.drawn
        logits = exclude_token(model(xt), mask_id)
        return logits, draw(logits, mask_id, self.temperature, self.top_p, generator)


def _bucket(number: int, most: int) -> int:
    """Return a bound of few values on a number of positions, so that there are few graphs."""
    return min(-(-number // POSITIONS) * POSITIONS, most)

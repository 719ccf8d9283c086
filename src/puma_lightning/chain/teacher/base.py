"""What a forward process is: it turns clean sequences x0 into partly masked ones xt, and moves them on."""

import inspect
from collections.abc import Collection
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from puma_lightning.chain.chains import Chains
from puma_lightning.chain.step import Unmasking
from puma_lightning.output.prediction import Prediction, Statistic


class ForwardProcess:
    """Base of all forward processes. A process of one's own is one subclass in one file.

    ``start`` is all that a process without a chain has to define: by default every sequence leaves the batch after one
    training step, as in ordinary masked diffusion training.

    Attributes:
        unmasking: The step that moves its chains; None for a process without one.
        pool: How many chains there are, of which each batch holds some: P, or ``all`` for one for every training
            sequence. None for as many as a batch has rows.
        recordable: Whether the ``start`` and ``advance`` that this very class defines can be part of a recorded step
            (``captured``): they look at no value of a tensor, treat each row by itself, and depend on the optimizer
            step through ``num_stages_at`` alone.

    Example:
        A process that masks the whole answer:

        >>> class FullMasking(ForwardProcess):
        ...     def start(self, chains, generator=None):
        ...         return chains
        >>> x0, given = torch.tensor([[5, 3, 8]]), torch.tensor([[True, False, False]])
        >>> FullMasking().start(Chains.fully_masked(x0, given, mask_id=9)).xt
        tensor([[5, 9, 9]])
    """

    unmasking: Unmasking | None = None
    pool: int | Literal["all"] | None = None
    recordable = True

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        for method, old, expected in (
            (cls.start, "x0", "chains, generator"),
            (cls.advance, "mask_id", "chains, predictions"),
        ):
            names = list(inspect.signature(method).parameters)
            if old in names:
                raise ValueError(
                    f"{method.__qualname__}: expected the arguments {expected}, ..., got {', '.join(names[1:])}; "
                    "write it for Chains, which hold all of these since version 0.2.0"
                )

    def reads(self) -> Collection[Statistic] | None:
        """Name the statistics of the predictions that ``advance`` makes do with; None if it needs logits.

        A process whose ``advance`` reads more of the predictions than its ``unmasking`` does overrides this.
        """
        if type(self).advance is ForwardProcess.advance:
            return ()
        return None if self.unmasking is None else self.unmasking.reads()

    def num_stages_at(self, step: int) -> int:
        """Return K at an optimizer step; 1 for a process without stages."""
        return 1

    def chain_stages(self, num_stages: int, answer_length: Tensor) -> Tensor:
        """Return the K of each chain, (N,), from the K of the step and the answer lengths, (N,) int64."""
        return torch.full_like(answer_length, num_stages)

    def start(self, chains: Chains, generator: torch.Generator | None = None) -> Chains:
        """Mask sequences that enter the batch.

        Args:
            chains: Chains with the whole answer masked, each at the stage it is to start at: 0, except in the first
                batches of a run, whose stages are spread evenly.
            generator: Source of all randomness, on the device of the chains.

        Returns:
            The chains to train on, with at least one masked position in every row that has an answer.
        """
        raise NotImplementedError

    def advance(
        self, chains: Chains, predictions: Tensor | Prediction, step: int, generator: torch.Generator | None = None
    ) -> Chains:
        """Move the chains on after the model has been trained on them. By default all are over.

        Args:
            chains: The chains that the model has just been trained on.
            predictions: Its predictions for ``chains.xt``, aligned with positions, without gradient: logits, (N, L, V),
                or what ``reads`` names, (N, L) each. Only those at masked positions mean anything.
            step: The optimizer step, for schedules.
            generator: Source of all randomness, on the device of the chains.

        Returns:
            The new chains. Those that are ``done`` are over, and every other must have a masked position. A sequence
            leaves when all its chains are over.
        """
        return replace(chains, done=torch.ones_like(chains.done))


class NoMasking(ForwardProcess):
    """Clean sequences, for autoregressive training.

    Example:
        >>> x0, given = torch.tensor([[5, 3, 8]]), torch.tensor([[True, False, False]])
        >>> NoMasking().start(Chains.fully_masked(x0, given, mask_id=9)).xt
        tensor([[5, 3, 8]])
    """

    recordable = True

    def start(self, chains: Chains, generator: torch.Generator | None = None) -> Chains:
        return replace(chains, xt=chains.x0)

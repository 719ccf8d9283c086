"""Chains of random sequences, and a model with an opinion, for the tests of forward processes."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from puma_lightning.chain.chains import Chains
from puma_lightning.chain.teacher import ForwardProcess, ProgressiveUnmasking

V = 6
MASK = V - 1


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sequences(seed: int, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Clean sequences with prompts that leave at least one position to predict."""
    generator = gen(seed)
    x0 = torch.randint(MASK, (batch, length), generator=generator)
    prompt = torch.rand(batch, length, generator=generator) < 0.4
    prompt[torch.arange(batch), torch.randint(length, (batch,), generator=generator)] = False
    return x0, prompt


def begin(process: ForwardProcess, x0: Tensor, prompt: Tensor, seed: int, stage: Any = 0, step: int = 0) -> Chains:
    """Chains that have just started."""
    stage = torch.as_tensor(stage).expand(len(x0)).clone()
    return process.start(Chains.fully_masked(x0, prompt, MASK, process.num_stages_at(step), stage), gen(seed))


def predictions(x0: Tensor, seed: int) -> Tensor:
    """Logits of a model with an opinion of varying strength."""
    return 3 * torch.randn(*x0.shape, V, generator=gen(seed)).index_fill(2, torch.tensor([MASK]), float("-inf"))


def chain(process: ProgressiveUnmasking, x0: Tensor, prompt: Tensor, seed: int, steps: int) -> list[Chains]:
    """The chains before each training step; finished ones are left as they are."""
    chains = begin(process, x0, prompt, seed)
    seen = [chains]
    for step in range(steps):
        moved = process.advance(chains, predictions(x0, seed + step), step, gen(seed + step))
        keep = chains.done
        chains = replace(
            moved,
            xt=torch.where(keep[:, None], chains.xt, moved.xt),
            stage=torch.where(keep, chains.stage, moved.stage),
            done=keep | moved.done,
        )
        seen.append(chains)
    return seen


def revealed(chains: Chains) -> Tensor:
    return ((chains.xt != MASK) & ~chains.prompt_mask).sum(1)

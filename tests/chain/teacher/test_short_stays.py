"""Sequences that enter at any stage and leave after any step: stages stay spread evenly."""

import pytest
import torch
from some_chains import MASK, V
from torch.utils.data import DataLoader

from puma_lightning.chain.teacher import ProgressiveUnmasking, ShortStays
from puma_lightning.training.sequences import CleanSequences
from puma_lightning.training.stream import Stream

ROWS, LENGTH = 200, 12


def run(process: ProgressiveUnmasking, steps: int) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    """Stages, sequences taken so far, and masked positions, of each step."""
    x0 = torch.randint(MASK, (4 * ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    loader = DataLoader([{"input_ids": row} for row in x0], batch_size=ROWS)
    stream = Stream(CleanSequences(loader, MASK, V), process, MASK, ROWS, 10**6)
    stages, taken, masked = [], [], []
    for step, batch in zip(range(steps), stream, strict=False):
        stages.append(batch["chains"].stage)
        taken.append(stream.sequences.position)
        masked.append(batch["chains"].masked.sum(1))
        logits = torch.randn(ROWS, LENGTH, V, generator=torch.Generator().manual_seed(step))
        stream.advance(logits.index_fill(2, torch.tensor([MASK]), -torch.inf), step)
    return torch.stack(stages), taken, torch.stack(masked)


@pytest.mark.parametrize("num_stages", [1, 2, 6])
@pytest.mark.parametrize("leaving", [0.0, 0.2, 0.7, 1.0])
def test_stages_and_counts_stay_spread_evenly_however_soon_sequences_leave(num_stages, leaving):
    """As with whole chains; and so many sequences enter in a step as the docstring says."""
    steps, settled = 160, 40
    stages, taken, masked = run(ShortStays(leaving, num_stages), steps)
    share = torch.bincount(stages[settled:].flatten(), minlength=num_stages) / stages[settled:].numel()
    assert (share - 1 / num_stages).abs().max() < 0.02
    _, _, whole = run(ProgressiveUnmasking(num_stages), steps)
    assert masked[settled:].float().mean() == pytest.approx(whole[settled:].float().mean().item(), abs=0.15)
    entering = (taken[-1] - taken[settled]) / (steps - 1 - settled)
    assert entering == pytest.approx(ROWS * (1 + leaving * (num_stages - 1)) / num_stages, rel=0.03)


def test_those_that_stay_go_on_as_in_puma():
    """One stage further with each step; what is revealed stays so."""
    process = ShortStays(0.0, 4)
    stages, taken, _ = run(process, 9)
    assert torch.equal(stages[1:], (stages[:-1] + 1) % 4) and taken[4] - taken[3] == ROWS // 4


@pytest.mark.parametrize("leaving", [-0.1, 1.5, float("nan")])
def test_what_is_no_probability_is_refused(leaving):
    with pytest.raises(ValueError, match="leaving"):
        ShortStays(leaving)

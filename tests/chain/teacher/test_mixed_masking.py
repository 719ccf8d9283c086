"""A share of each batch is random masks; the rest are PUMA's chains."""

import pytest
import torch
from torch.utils.data import DataLoader

from puma_lightning.chain.teacher import MixedMasking, ProgressiveUnmasking
from puma_lightning.training.sequences import CleanSequences
from puma_lightning.training.stream import Stream

V, LENGTH, ROWS = 6, 8, 200
MASK = V - 1


def stream_of(process: ProgressiveUnmasking, rows: int = ROWS) -> Stream:
    x0 = torch.randint(MASK, (4 * rows, LENGTH), generator=torch.Generator().manual_seed(0))
    loader = DataLoader([{"input_ids": row} for row in x0], batch_size=rows)
    return Stream(CleanSequences(loader, MASK, V), process, MASK, rows, 10**6)


def left_to_right(x0: torch.Tensor) -> torch.Tensor:
    """Logits of a model that is the surer of a position the further left it is."""
    sure = torch.nn.functional.one_hot(x0, V) * torch.arange(10, 2, -1)[:, None].float()
    return sure.index_fill(2, torch.tensor([MASK]), float("-inf"))


def taken(process: ProgressiveUnmasking, steps: int = 60) -> float:
    """Sequences taken in a step once the chains have settled."""
    stream = stream_of(process)
    batches = iter(stream)
    for step in range(2 * steps):
        batch = next(batches)
        if step == steps:
            before = stream.sequences.position
        stream.advance(left_to_right(batch["input_ids"]), step)
    return (stream.sequences.position - before) / steps


@pytest.mark.parametrize("num_stages", [1, 2, 4])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_the_batch_leaves_after_one_step(num_stages, share):
    """Sequences taken per step: the random rows, and a K-th of the others."""
    expected = ROWS * (share + (1 - share) / num_stages)
    assert taken(MixedMasking(share, num_stages)) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("threshold", [None, 0.9])
@pytest.mark.parametrize("num_stages", [4, [(0, 2), (5, 4)]], ids=["K=4", "K grows"])
def test_without_random_masks_it_is_puma(threshold, num_stages):
    """The same chains at every step."""
    mixed = stream_of(MixedMasking(0.0, num_stages, threshold=threshold), 64)
    puma = stream_of(ProgressiveUnmasking(num_stages, threshold=threshold), 64)
    for step, (a, b) in enumerate(zip(mixed, puma, strict=False)):
        if step == 12:
            break
        assert all(map(torch.equal, a["chains"].tensors().values(), b["chains"].tensors().values()))
        for stream, batch in ((mixed, a), (puma, b)):
            stream.advance(left_to_right(batch["input_ids"]), step)


@pytest.mark.parametrize(
    "process", [MixedMasking(1.0, 4), ProgressiveUnmasking(1)], ids=["all random", "PUMA with K 1"]
)
def test_random_masks_are_what_is_left_of_it(process):
    """Once the first chains are over every sequence leaves after one step, and no position is masked more often."""
    stream = stream_of(process)
    masked, before = [], 0
    for step, batch in enumerate(stream):
        if step == 40:
            break
        if step > 4:
            assert stream.sequences.position == before + ROWS
            masked.append(batch["xt"] == MASK)
        before = stream.sequences.position
        stream.advance(left_to_right(batch["input_ids"]), step)
    assert torch.cat(masked).float().mean(0).std() < 0.02


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_all_counts_are_masked_equally_often_whatever_the_share(share):
    """n is as over all of PUMA's stages, so the loss weighs all counts as it does."""
    stream = stream_of(MixedMasking(share, 4))
    counts = torch.zeros(LENGTH + 1)
    for step, batch in enumerate(stream):
        if step == 100:
            break
        counts += torch.bincount((batch["xt"] == MASK).sum(1), minlength=LENGTH + 1)
        stream.advance(left_to_right(batch["input_ids"]), step)
    assert counts[0] == 0
    shares = counts[1:] / counts.sum() * LENGTH
    assert shares[1:-1] == pytest.approx(torch.ones(LENGTH - 2), abs=0.06)
    # PUMA's targets round.
    assert shares[0] == pytest.approx(1.5, abs=0.06) and shares[-1] == pytest.approx(0.5, abs=0.06)


def test_chains_go_in_the_policys_order_and_random_masks_do_not():
    """Of a model that is surest at the left: what is beyond the first stage is a prefix or random."""
    stream = stream_of(MixedMasking(0.5, 4))
    seen = []
    for step, batch in enumerate(stream):
        if step == 40:
            break
        if step > 10:
            seen.append(torch.cat([batch["chains"].stage[:, None], (batch["xt"] == MASK).long()], dim=1))
        stream.advance(left_to_right(batch["input_ids"]), step)
    rows = torch.cat(seen)
    stage, masked = rows[:, 0], rows[:, 1:].bool()
    last = masked[stage == 3]
    # A stage reveals two: at most two of the start were random, so four of the first five were chosen from the left.
    assert (~last[:, :4]).all(1).float().mean() > 0.99
    ahead = masked[(stage == 0) & ((~masked).sum(1) > 2)]
    assert len(ahead) > 1000
    assert (~ahead).float().mean(0).std() < 0.04  # no position before others


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match="random_share"):
        MixedMasking(share)


def test_the_first_fill_has_chains_at_all_later_stages():
    """They are put there half-way, so that what they hold must fit the stage."""
    batch = stream_of(MixedMasking(1.0, 4)).peek()
    later = batch["chains"].stage > 0
    stage, revealed = batch["chains"].stage[later], (batch["xt"][later] != MASK).sum(1)
    assert later.sum() == 3 * ROWS // 4
    assert (revealed >= stage * LENGTH / 4 - 0.5).all() and (revealed <= (stage + 1) * LENGTH / 4 + 0.5).all()

"""Batches from a pool: whose turn it is, that chains wait as they are, and that a stream goes on where it stopped."""

from collections import Counter
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import (
    MASK,
    RAGGED,
    IterableRows,
    RandomHalf,
    Rows,
    V,
    names,
    predictions,
    same,
    saved_and_loaded,
    train,
)
from torch.utils.data import DataLoader, default_collate

from puma_lightning.chain.blocks import cut_blocks, join_blocks
from puma_lightning.chain.stages import StepSchedule
from puma_lightning.chain.teacher import ForwardProcess, ProgressiveUnmasking
from puma_lightning.training.pooled import PooledStream
from puma_lightning.training.sequences import CleanSequences
from puma_lightning.training.stream import Stream

few = settings(max_examples=15, deadline=None)
PROCESSES: dict[str, Any] = {
    "K=3": ProgressiveUnmasking(3),
    "threshold": ProgressiveUnmasking(4, threshold=0.6),
    "schedule": ProgressiveUnmasking([[0, 2], [6, 5]], threshold=0.6),
}
BLOCKS: dict[str, Any] = {"whole": None, "blocks": 2, "curriculum": [[0, 2], [7, 6]]}


def pooled(
    process: ForwardProcess,
    size: int | None = 16,
    loader: DataLoader | None = None,
    groups: int = 1,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    block_size: Any = None,
) -> PooledStream:
    loader = loader or DataLoader(Rows(61), batch_size=4, shuffle=True)
    supply = CleanSequences(loader, MASK, V, rank, world_size, seed, fixed_share=size is None)
    blocks = None if block_size is None else StepSchedule("block_size", block_size)
    return PooledStream(size, supply, process, MASK, supply.batch_size, 10**6, groups, seed, block_size=blocks)


sizes = pytest.mark.parametrize("size", [16, None], ids=["pool of 16", "pool of all"])
processes = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
blocks = pytest.mark.parametrize("block_size", BLOCKS.values(), ids=BLOCKS)


# --- whose turn it is ---


@pytest.mark.parametrize("groups", [1, 2])
def test_every_chain_of_a_pool_has_a_turn_in_each_pass(groups):
    """In an order of its own. With K = 1000 no chain is over, so that the same sequences stay."""
    stream = pooled(ProgressiveUnmasking(1000), 16, groups=groups)
    held = [names(batch["input_ids"]) for batch in train(stream, 12)]
    passes = [list(chain(*held[first : first + 4])) for first in (0, 4, 8)]
    assert len({tuple(sorted(each)) for each in passes}) == 1 and len(set(passes[0])) == 16
    assert len({tuple(each) for each in passes}) == 3


@pytest.mark.parametrize("threshold", [None, 0.6])
def test_each_batch_of_a_pass_holds_chains_of_all_stages_evenly(threshold):
    """Of the chains of the pool, sorted by the share that is masked when the pass begins, one of each stratum."""
    stream = pooled(ProgressiveUnmasking(6, threshold=threshold), 32)
    train(stream, 8)
    for _ in range(4):
        shares = stream.pool.share_masked()
        strata = shares.sort().values.view(4, 8)
        for _ in range(8):
            stream.peek()
            mine = shares[stream._rows].sort().values
            assert (strata[:, 0] <= mine).all() and (mine <= strata[:, -1]).all()
            train(stream, 1)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_pool_of_all_is_a_pass_over_the_data(world_size):
    """A rank has the same sequences in every pass, and all ranks together have all of them."""
    shares = []
    for rank in range(world_size):
        stream = pooled(ProgressiveUnmasking(3), None, rank=rank, world_size=world_size)
        mine = len(range(rank, 61, world_size))
        held = list(chain(*(names(batch["input_ids"]) for batch in train(stream, mine))))
        passes = [held[i * mine : (i + 1) * mine] for i in range(4)]
        assert len({tuple(sorted(each)) for each in passes}) == 1 and len({tuple(each) for each in passes}) == 4
        shares.append(passes[0])
        assert stream.sequences.position == 4 * mine
    assert sorted(chain(*shares)) == list(range(61))


def test_without_shuffling_a_pool_of_all_is_read_in_order():
    stream = pooled(ProgressiveUnmasking(3), None, DataLoader(Rows(12), batch_size=4))
    assert [names(batch["input_ids"]) for batch in train(stream, 3)] * 2 == [
        names(batch["input_ids"]) for batch in train(pooled(ProgressiveUnmasking(3), None, DataLoader(Rows(12), 4)), 6)
    ]
    assert stream.sequences.position == 12


@pytest.mark.parametrize("groups", [2, 4])
def test_the_micro_batches_of_an_update_hold_different_sequences(groups):
    stream = pooled(ProgressiveUnmasking(3), 16, DataLoader(Rows(61), batch_size=4), groups)
    held = [names(batch["input_ids"]) for batch in train(stream, 40)]
    for first in range(0, len(held), groups):
        window = list(chain(*held[first : first + groups]))
        assert len(set(window)) == len(window)


# --- chains ---


@sizes
@processes
@blocks
def test_a_chain_waits_as_it_is(size, process, block_size):
    """What a sequence's turn begins with is what its last turn ended with; or, if that was all, a whole new chain."""
    # In the order of the data, so that no sequence enters a pool while it is still there from the pass before.
    stream = pooled(process, size, DataLoader(Rows(61), 4, shuffle=size is None), block_size=block_size)
    left: dict[int, torch.Tensor] = {}
    began = went_on = 0
    for step in range(60):
        batch = next(iter(stream))
        before = join_blocks(batch["chains"].masked, batch["chains"].num_blocks)
        for name, masked in zip(names(batch["input_ids"]), before, strict=True):
            if name in left and left[name].any():
                assert torch.equal(masked, left[name])
                went_on += 1
            elif name in left:
                assert masked.any()
                began += 1
        logits = cut_blocks(predictions(batch["input_ids"], step), batch["chains"].x0.shape[1])
        stream.advance(logits, step)
        after = stream.groups[0]
        assert after is not None
        after_masked = join_blocks(after.masked, after.num_blocks)
        turns = list(zip(names(batch["input_ids"]), after_masked, strict=True))
        left |= dict(reversed(turns))  # of a sequence that comes twice, at the end of a pass, the first counts
    assert went_on > 20 and (began or size is not None)


@pytest.mark.parametrize("num_stages", [1, 3, 4])
def test_a_sequence_leaves_a_pool_after_k_turns(num_stages):
    """And every sequence of the data enters exactly once per pass over them, in the supply's order."""
    stream = pooled(ProgressiveUnmasking(num_stages), 16, DataLoader(Rows(61), batch_size=4))
    turns = Counter(chain(*(names(batch["input_ids"]) for batch in train(stream, 4 * 3 * num_stages))))
    entered = stream.sequences.position
    assert entered == len(turns) and sorted(turns) == list(range(entered))
    assert max(turns.values()) == num_stages
    assert (
        sum(times < num_stages for times in turns.values()) <= 2 * 16
    )  # those that began at a later stage, or are in it


def test_a_sequence_of_a_pool_of_all_starts_again_when_its_chain_is_over():
    """With K stages it is fully masked at every K-th turn, but for the first, that may begin later."""
    stream = pooled(ProgressiveUnmasking(3), None, DataLoader(Rows(12), batch_size=4, shuffle=True))
    stages: dict[int, list[int]] = {}
    for batch in train(stream, 30):
        for name, stage in zip(names(batch["input_ids"]), batch["chains"].stage.tolist(), strict=True):
            stages.setdefault(name, []).append(stage)
    assert len(stages) == 12
    for seen in stages.values():
        assert seen == [(seen[0] + turn) % 3 for turn in range(10)]


@sizes
@few
@given(num_stages=st.integers(1, 6), times=st.integers(1, 3))
def test_each_batch_of_the_first_pass_holds_all_stages_evenly(size, num_stages, times):
    rows = num_stages * times
    loader = DataLoader(Rows(200), batch_size=rows, shuffle=True)
    stream = pooled(ProgressiveUnmasking(num_stages), size and 5 * rows, loader)
    for batch in train(stream, 5):
        assert torch.bincount(batch["chains"].stage, minlength=num_stages).tolist() == [times] * num_stages


@sizes
@processes
@blocks
def test_the_number_of_masked_positions_is_that_of_the_batch(size, process, block_size):
    stream = pooled(process, size, groups=2, block_size=block_size)
    for step in range(25):
        stream.peek()
        batch = next(iter(stream))
        assert stream.num_masked == (batch["xt"] == MASK).sum()
        logits = cut_blocks(predictions(batch["input_ids"], step), batch["chains"].x0.shape[1])
        stream.advance(logits, step // 2)


def test_a_stream_does_not_touch_the_global_generators():
    before = torch.get_rng_state()
    a = train(pooled(ProgressiveUnmasking(3), None), 30)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(123)
    assert same(a, train(pooled(ProgressiveUnmasking(3), None), 30))
    assert not same(a, train(pooled(ProgressiveUnmasking(3), None, seed=1), 30))


# --- going on from a snapshot ---


@sizes
@processes
@blocks
@pytest.mark.parametrize("at", [0, 1, 5, 17])
def test_a_restored_stream_goes_on_bit_by_bit(size, process, block_size, at):
    """Mid-chain, mid-pass, mid-accumulation, before a switch of K or of blocks."""
    stream = pooled(process, size, groups=2, block_size=block_size)
    train(stream, at)
    state = saved_and_loaded(stream.snapshot())
    expected = train(stream, 40)
    other = pooled(process, size, groups=2, block_size=block_size, seed=999)
    train(other, 3)
    other.restore(state)
    assert same(train(other, 40), expected)


@sizes
@pytest.mark.parametrize("in_flight", [False, True])
@pytest.mark.parametrize("moved", [False, True])
def test_a_batch_that_was_made_and_not_trained_on_comes_next(size, in_flight, moved):
    """After a look at it, or a step that failed before or after the chains were moved."""
    stream = pooled(ProgressiveUnmasking(3, threshold=0.6), size)
    train(stream, 9)
    if in_flight:
        batch = next(iter(stream))
        if moved:
            stream.advance(predictions(batch["input_ids"], 1), 1)
    else:
        batch = stream.peek()
    state = saved_and_loaded(stream.snapshot(in_flight))
    runs = []
    for _ in range(2):
        other = pooled(ProgressiveUnmasking(3, threshold=0.6), size)
        other.restore(state)
        state = saved_and_loaded(other.snapshot())
        runs.append(train(other, 30))
    assert same(runs[0], runs[1]) and same(runs[0][:1], [batch])
    if not in_flight:
        assert same(runs[0], train(stream, 30))


def left_masked(stream: PooledStream, rank: int, world_size: int) -> dict[int, list[bool]]:
    """What is masked of every sequence of a pool of all that has had a turn, by its number."""
    every = torch.arange(stream.pool.size)
    rows = every[~stream.pool.is_new(every)]
    clean = default_collate([Rows(61)[rank + world_size * int(i)] for i in rows])
    chains = stream.pool.chains(rows, clean, stream.process)
    masked = join_blocks(chains.masked, chains.num_blocks).tolist()
    return {rank + world_size * int(i): row for i, row in zip(rows, masked, strict=True)}


@pytest.mark.filterwarnings("ignore:the checkpoint of")
@blocks
@pytest.mark.parametrize("looked", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [4, 3])
def test_a_pool_of_all_goes_on_on_other_ranks_with_every_chain(block_size, looked, ranks, batch_size):
    """Wherever its sequence is then; a batch that was looked at waits too."""
    process = PROCESSES["schedule"]

    def streams(number: int, rows: int) -> list[PooledStream]:
        loader = DataLoader(Rows(61), batch_size=rows, shuffle=True)
        made = [pooled(process, None, loader, 1, 5, rank, number, block_size) for rank in range(number)]
        return made

    before = streams(2, 4)
    for stream in before:
        train(stream, 9)
    expected = {k: v for rank, stream in enumerate(before) for k, v in left_masked(stream, rank, 2).items()}
    if looked:
        for stream in before:
            batch = stream.peek()
            for name, row in zip(names(batch["input_ids"]), batch["xt"] == MASK, strict=True):
                expected[name] = row.tolist()
    snapshots = saved_and_loaded([stream.snapshot() for stream in before])
    after = streams(ranks, batch_size)
    for stream in after:
        stream.restore_from(snapshots)
    if ranks == 2 and batch_size == 4:
        assert same(train(after[0], 30), train(before[0], 30))  # the very same run
        return
    found = {k: v for rank, stream in enumerate(after) for k, v in left_masked(stream, rank, ranks).items()}
    assert found == expected
    for stream in after:
        assert len(train(stream, 30)) == 30
    taken = sum(snapshot["position"] for snapshot in snapshots)
    assert [stream.sequences.position for stream in after] == [taken // ranks + 30 * batch_size] * ranks


@pytest.mark.filterwarnings("ignore:the checkpoint of")
@blocks
@pytest.mark.parametrize("looked", [False, True])
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_pool_goes_on_on_other_ranks_with_every_sequence(block_size, looked, ranks):
    """Those for which there is no row wait to start again, and rows for which there is none take fresh ones."""

    def in_flight(stream: PooledStream) -> list[int]:
        chains = stream._in_flight([stream.snapshot()])
        held = [] if chains is None else names(join_blocks(chains.x0, chains.num_blocks))
        put_off = stream.sequences.supply()["waiting"]
        return held + ([] if put_off is None else names(put_off["input_ids"]))

    process = PROCESSES["schedule"]
    before = [pooled(process, 16, None, 1, 5, rank, 2, block_size) for rank in range(2)]
    for stream in before:
        train(stream, 9)
        if looked:
            stream.peek()
    taken = sum(stream.sequences.position for stream in before)
    expected = sorted(chain(*map(in_flight, before)))
    snapshots = saved_and_loaded([stream.snapshot() for stream in before])
    after = [pooled(process, 16, None, 1, 5, rank, ranks, block_size) for rank in range(ranks)]
    for stream in after:
        stream.restore_from(snapshots)
    found = sorted(chain(*map(in_flight, after)))
    assert not Counter(expected) - Counter(found)
    assert sum(stream.sequences.num_taken for stream in after) == taken + len(found) - len(expected)
    for stream in after:
        assert len(train(stream, 30)) == 30


def test_another_pool_is_refused():
    """Nothing says which chains should go, or wait."""

    def plain() -> Stream:
        supply = CleanSequences(DataLoader(Rows(101), batch_size=4), MASK, V)
        return Stream(supply, ProgressiveUnmasking(3), MASK, 4, 10**6)

    for a, b, message in [
        (pooled(ProgressiveUnmasking(3), 16), pooled(ProgressiveUnmasking(3), 32), "pool: expected 16.* got 32"),
        (pooled(ProgressiveUnmasking(3), None), pooled(ProgressiveUnmasking(3), 16), "pool: expected all.* got 16"),
        (plain(), pooled(ProgressiveUnmasking(3), 16, DataLoader(Rows(101), 4)), "got 16"),
        (
            pooled(ProgressiveUnmasking(3), None, DataLoader(Rows(101), 4)),
            plain(),
            "got None",
        ),
    ]:
        train(a, 2)
        with pytest.raises(ValueError, match=message):
            b.restore_from([a.snapshot()])


# --- sequences of different lengths ---


@sizes
@pytest.mark.parametrize("block_size", [None, 4, [[0, 2], [9, 3]]])
def test_ragged_sequences_wait_in_their_rows(size, block_size):
    """Each batch is as long as its longest; nothing is masked that is padding; a stream goes on where it stopped."""

    def run(stream: PooledStream, first: int, last: int) -> list[dict[str, torch.Tensor]]:
        seen = []
        for step in range(first, last):
            batch = next(iter(stream))
            chains, ids = batch["chains"], batch["input_ids"]
            real = batch.get("attention_mask", torch.ones_like(ids).bool())
            assert ("attention_mask" in batch) == (not real.all())
            assert not ((batch["xt"] == MASK) & ~real).any()
            assert (chains.answer_length.view(len(ids), -1).sum(1) == real.sum(1) - 1).all()
            assert (chains.masked.any(1) != chains.done).all()
            assert stream.num_masked == chains.masked.sum()
            seen.append(chains.tensors())
            generator = torch.Generator().manual_seed(step)
            stream.advance(
                torch.randn(*chains.xt.shape, V, generator=generator).index_fill(2, torch.tensor([MASK]), -1e9), step
            )
        return seen

    def fresh() -> PooledStream:
        loader = RAGGED["shuffle"](50, batch_size=4)
        return pooled(ProgressiveUnmasking(3, threshold=0.5), size, loader, block_size=block_size)

    whole = run(fresh(), 0, 40)
    for stop in (1, 10, 23):
        first, second = fresh(), fresh()
        run(first, 0, stop)
        second.restore(saved_and_loaded(first.snapshot()))
        for expected, found in zip(whole[stop:], run(second, stop, 40), strict=True):
            assert expected.keys() == found.keys()
            assert all(torch.equal(expected[name], found[name]) for name in expected)


# --- mistakes ---


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(IterableRows(12), batch_size=4),
        DataLoader(Rows(12), batch_size=4, sampler=RandomHalf(12)),
    ],
    ids=["iterable", "sampler"],
)
def test_a_pool_of_all_needs_sequences_with_numbers(loader):
    with pytest.raises(ValueError, match=r"as every sequence has a row in a pool of all, got (Iterable|RandomHalf)"):
        pooled(ProgressiveUnmasking(3), None, loader)


def test_a_pool_of_all_needs_a_sequence_for_every_example():
    """A collate function that leaves some out would put chains into the rows of other sequences."""
    loader = DataLoader(Rows(12), batch_size=4, collate_fn=lambda rows: default_collate(rows[:3]))
    with pytest.raises(ValueError, match=r"a sequence for each of 4 examples, .* got 3"):
        train(pooled(ProgressiveUnmasking(3), None, loader), 1)

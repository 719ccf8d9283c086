"""Batch streaming: which sequences are in which rows, and that a stream goes on exactly where it stopped."""

import gc
import io
import random
import weakref
from collections import Counter
from collections.abc import Iterator
from itertools import chain, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import (
    LENGTH,
    MASK,
    RAGGED,
    Backwards,
    IterableRows,
    RandomHalf,
    Rows,
    V,
    names,
    predictions,
    row,
    same,
    saved_and_loaded,
    train,
)
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from puma_lightning.chain.blocks import cut_blocks, join_blocks
from puma_lightning.chain.stages import StepSchedule
from puma_lightning.chain.teacher import (
    ComplementaryMasking,
    ForwardProcess,
    MixedMasking,
    ProgressiveUnmasking,
    RandomMasking,
    SelfAlignedMasking,
    ShortStays,
)
from puma_lightning.data.batch import pad_collate
from puma_lightning.training.sequences import CleanSequences, derived_seed
from puma_lightning.training.stream import Stream

few = settings(max_examples=25, deadline=None)


LOADERS: dict[str, Any] = {
    "shuffle": lambda n, **kw: DataLoader(Rows(n), shuffle=True, **kw),
    "sequential": lambda n, **kw: DataLoader(Rows(n), **kw),
    "sampler": lambda n, **kw: DataLoader(Rows(n), sampler=Backwards(n), **kw),
    "random sampler": lambda n, **kw: DataLoader(Rows(n), sampler=RandomHalf(n), **kw),
    "iterable": lambda n, **kw: DataLoader(IterableRows(n), **kw),
}


def clean(loader: DataLoader, rank: int = 0, world_size: int = 1, seed: int = 0, **options: Any) -> CleanSequences:
    return CleanSequences(loader, MASK, V, rank, world_size, seed, **options)


def stream_of(
    process: ForwardProcess,
    loader: DataLoader | None = None,
    groups: int = 1,
    steps: int = 10**6,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    block_size: Any = None,
) -> Stream:
    loader = loader or DataLoader(Rows(101), batch_size=4, shuffle=True)
    supply = clean(loader, rank, world_size, seed)
    blocks = None if block_size is None else StepSchedule("block_size", block_size)
    return Stream(supply, process, MASK, supply.batch_size, steps, groups, seed, block_size=blocks)


# --- the rows ---


@few
@given(num_stages=st.integers(1, 6), times=st.integers(1, 3), groups=st.integers(1, 3))
def test_the_first_batch_holds_all_stages_evenly(num_stages, times, groups):
    """Staggered start: each stage has its equal share of every group's rows, and keeps it."""
    loader = DataLoader(Rows(200), batch_size=num_stages * times)
    stream = stream_of(ProgressiveUnmasking(num_stages), loader, groups)
    for batch in train(stream, 3 * groups):
        assert torch.bincount(batch["chains"].stage, minlength=num_stages).tolist() == [times] * num_stages


@few
@given(num_stages=st.integers(1, 9), batch_size=st.integers(1, 9), groups=st.integers(1, 3))
def test_the_first_stages_spread_over_all_groups(num_stages, batch_size, groups):
    """With fewer rows than stages too: no stage is held by two more rows than another."""
    stream = stream_of(ProgressiveUnmasking(num_stages), DataLoader(Rows(99), batch_size=batch_size), groups)
    stages = torch.cat([batch["chains"].stage for batch in train(stream, groups)])
    counts = torch.bincount(stages, minlength=num_stages)
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("threshold", [None, 0.6])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("num_stages", [1, 3, [[0, 2], [6, 5]]], ids=str)
def test_every_sequence_enters_exactly_once_per_pass(num_stages, groups, threshold):
    """In the supply's order, none skipped, none thrown away, pass after pass."""
    stream = stream_of(
        ProgressiveUnmasking(num_stages, threshold=threshold), DataLoader(Rows(61), batch_size=4), groups
    )
    in_slot = [[-1] * 4 for _ in range(groups)]
    entered = []
    for step, batch in enumerate(train(stream, 90)):
        now = names(batch["input_ids"])
        before = in_slot[step % groups]
        entered += [new for old, new in zip(before, now, strict=True) if new != old]
        in_slot[step % groups] = now
    assert len(entered) > 61
    assert entered == [i % 61 for i in range(len(entered))]
    assert stream.sequences.position == len(entered)


@pytest.mark.parametrize("groups", [2, 3])
def test_the_micro_batches_of_an_update_hold_different_sequences(groups):
    """With accumulation M, any M batches in a row have no sequence in common."""
    stream = stream_of(ProgressiveUnmasking(3), groups=groups)
    held = [names(batch["input_ids"]) for batch in train(stream, 30)]
    for first in range(len(held) - groups):
        window = list(chain(*held[first : first + groups]))
        assert len(set(window)) == len(window)


def test_an_epoch_is_a_number_of_steps():
    """The stream's length is what it yields, epoch after epoch, and the chains go on over the epoch's end."""
    stream, endless = (stream_of(ProgressiveUnmasking(3), steps=steps) for steps in (7, 10**6))
    assert len(stream) == 7
    assert same(train(stream, 7) + train(stream, 7), train(endless, 14))


def test_an_epoch_ends():
    """After its steps, without a call from outside."""
    stream = stream_of(RandomMasking(), steps=3)
    assert sum(1 for _ in stream) == 3


def test_looking_at_the_next_batch_does_not_change_it():
    """What preflight looks at is what the first step gets."""
    stream = stream_of(ProgressiveUnmasking(3))
    looked = [stream.peek(), stream.peek()]
    assert same(looked, [looked[0], next(iter(stream))])


def test_the_batch_has_clean_and_masked_sequences():
    """input_ids without masks, xt with at least one in each row and none in a prompt."""
    for batch in train(stream_of(ProgressiveUnmasking(4, threshold=0.5)), 20):
        assert set(batch) == {"input_ids", "prompt_mask", "xt", "chains"}
        assert not (batch["input_ids"] == MASK).any()
        masked = batch["xt"] == MASK
        assert masked.any(1).all()
        assert not (masked & batch["prompt_mask"]).any()
        assert torch.equal(batch["xt"][~masked], batch["input_ids"][~masked])


@pytest.mark.parametrize(
    "process", [RandomMasking(), ProgressiveUnmasking([[0, 2], [3, 4]], threshold=0.6)], ids=["random", "puma"]
)
@pytest.mark.parametrize("block_size", [None, 2, [[0, 2], [4, 6]]], ids=str)
@pytest.mark.parametrize("groups", [1, 3])
def test_the_number_of_masked_positions_is_that_of_the_batch(process, block_size, groups):
    """At every step, after a look ahead, and after a restore."""
    stream = stream_of(process, groups=groups, block_size=block_size)
    for step in range(25):
        stream.peek()
        if step == 11:
            other = stream_of(process, groups=groups, block_size=block_size)
            other.restore(saved_and_loaded(stream.snapshot()))
            stream = other
        batch = next(iter(stream))
        assert stream.num_masked == (batch["xt"] == MASK).sum()
        logits = cut_blocks(predictions(batch["input_ids"], step), batch["chains"].x0.shape[1])
        stream.advance(logits, step // groups)


def test_a_stream_does_not_touch_the_global_generators():
    """Its randomness is a function of (seed, rank, step)."""
    before = torch.get_rng_state(), random.getstate()
    a = train(stream_of(ProgressiveUnmasking(3)), 10)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    torch.manual_seed(123)
    assert same(a, train(stream_of(ProgressiveUnmasking(3)), 10))
    assert not same(a, train(stream_of(ProgressiveUnmasking(3), seed=1), 10))


def test_ranks_mask_differently():
    """Although all ranks share one seed."""
    loader = DataLoader(Rows(40), batch_size=8)
    a, b = (train(stream_of(RandomMasking(), loader, rank=rank, world_size=2), 3) for rank in (0, 1))
    assert not any(torch.equal(x["xt"] == MASK, y["xt"] == MASK) for x, y in zip(a, b, strict=True))


# --- going on from a snapshot ---


@pytest.mark.parametrize("at", [0, 1, 2, 5, 8, 13])
@pytest.mark.parametrize(
    "process",
    [
        ProgressiveUnmasking(3),
        ProgressiveUnmasking(4, threshold=0.6),
        ProgressiveUnmasking([[0, 2], [4, 5]]),
        RandomMasking(),
        MixedMasking(0.5, 3),
        SelfAlignedMasking(),
        ComplementaryMasking(),
        ShortStays(0.3, 3),
        RandomMasking(stratified=True),
    ],
    ids=[
        "K=3",
        "threshold",
        "schedule",
        "baseline",
        "mixed",
        "self-aligned",
        "complementary",
        "short stays",
        "stratified",
    ],
)
def test_a_restored_stream_goes_on_bit_by_bit(process, at):
    """Mid-chain, mid-accumulation, before a switch of K: the same chains as if it had never stopped."""
    stream = stream_of(process, groups=2)
    train(stream, at)
    state = stream.snapshot()
    expected = train(stream, 14)
    other = stream_of(process, groups=2, seed=999)
    train(other, 3)
    other.restore(saved_and_loaded(state))
    assert same(train(other, 14), expected)


def test_restore_also_works_after_a_look_at_the_next_batch():
    """A checkpoint may be saved after preflight has filled the rows."""
    stream = stream_of(ProgressiveUnmasking(3))
    stream.peek()
    state = saved_and_loaded(stream.snapshot())
    expected = train(stream, 8)
    other = stream_of(ProgressiveUnmasking(3))
    other.restore(state)
    assert same(train(other, 8), expected)


def test_a_run_begun_before_all_rows_were_drawn_for_goes_on_as_it_began():
    """A checkpoint that says nothing of it is such a run's; the two draw differently where few rows enter."""
    stream = stream_of(ProgressiveUnmasking(3))
    train(stream, 4)
    new = saved_and_loaded(stream.snapshot())
    old = {name: value for name, value in new.items() if name != "draws_for_all_rows"}
    runs = {}
    for name, state in (("new", new), ("old", old)):
        other = stream_of(ProgressiveUnmasking(3))
        other.restore(state)
        assert ("draws_for_all_rows" in other.snapshot()) == (name == "new")
        runs[name] = train(other, 8)
    assert same(runs["new"], train(stream, 8)) and not same(runs["old"], runs["new"])


def test_other_data_are_refused():
    """The error says what was saved, what is here, and what to do instead."""
    stream = stream_of(ProgressiveUnmasking(3), groups=2)
    train(stream, 3)
    other = stream_of(ProgressiveUnmasking(3), DataLoader(Rows(99), batch_size=4), groups=2)
    with pytest.raises(ValueError, match=r"training sequences: expected 101.* got 99.*init_from"):
        other.restore_from([stream.snapshot()])


# --- the supply ---


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_pass_holds_every_sequence_once_over_all_ranks(kind, world_size):
    """Ranks see disjoint sequences, together all of them, whatever the rest of the division."""
    size = 23
    held = []
    for rank in range(world_size):
        supply = clean(LOADERS[kind](size, batch_size=4), rank, world_size)
        mine = len(range(rank, size, world_size))
        passes = [names(supply.take(mine)["input_ids"]) for _ in range(2)] if kind != "iterable" else []
        held.append(passes or [names(supply.take(mine)["input_ids"])])
    for every in zip(*held, strict=True):
        assert sorted(chain(*every)) == list(range(size))


def test_shuffled_passes_differ_and_a_sequential_one_does_not():
    """A shuffling loader is shuffled anew each pass, by the seed."""
    shuffled = clean(LOADERS["shuffle"](30, batch_size=4))
    first, second = (names(shuffled.take(30)["input_ids"]) for _ in range(2))
    assert first != second and first != list(range(30))
    assert names(clean(LOADERS["shuffle"](30, batch_size=7)).take(30)["input_ids"]) == first
    assert names(clean(LOADERS["shuffle"](30, batch_size=4), seed=1).take(30)["input_ids"]) != first
    assert names(clean(LOADERS["sequential"](30, batch_size=4)).take(30)["input_ids"]) == list(range(30))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_position_says_where_in_the_data_a_rank_is(kind, workers, world_size):
    """Seeking to it gives the same continuation, however the taken numbers are cut."""

    def supply() -> CleanSequences:
        return clean(LOADERS[kind](23, batch_size=4, num_workers=workers), world_size - 1, world_size, seed=3)

    one = supply()
    for number in (5, 9, 1):
        one.take(number)
    assert one.position == 15
    expected = names(one.take(20)["input_ids"])
    other = supply()
    other.take(3)
    other.seek(3, 15)
    assert names(other.take(13)["input_ids"]) + names(other.take(7)["input_ids"]) == expected


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("waiting", [0, 5])
def test_sequences_taken_ahead_count_when_they_are_settled(kind, waiting):
    """They are those that would be taken; and wherever a run is saved, it goes on with the first that do not count."""

    def supply() -> CleanSequences:
        made = clean(LOADERS[kind](23, batch_size=4))
        if waiting:  # sequences that start again, and count already
            made.put_before(
                {"input_ids": torch.full((waiting, LENGTH), 1), "prompt_mask": torch.zeros(waiting, LENGTH).bool()}
            )
        return made

    expected = names(supply().take(40)["input_ids"])
    ahead, taken, settled = supply(), 0, 0
    for number, then in [(3, 0), (4, 2), (1, 5), (6, 1), (2, 8), (5, 0), (4, 9)]:
        assert names(ahead.take_ahead(number)["input_ids"]) == expected[taken : taken + number]
        taken += number
        ahead.settle(then)
        settled += then
        assert ahead.position == max(0, settled - waiting)
        other = supply()
        other.restore(0, ahead.position, saved_and_loaded(ahead.supply()))
        assert names(other.take(40 - settled)["input_ids"]) == expected[settled:]
    ahead.give_back()
    assert names(ahead.take(40 - settled)["input_ids"]) == expected[settled:]


def test_workers_do_not_change_the_data():
    """num_workers is a matter of speed."""
    a, b = (clean(LOADERS["shuffle"](23, batch_size=4, num_workers=workers)) for workers in (0, 2))
    assert names(a.take(50)["input_ids"]) == names(b.take(50)["input_ids"])


def test_a_users_distributed_sampler_is_not_dealt_out_twice():
    """Its shard is the rank's; its shuffle is anew in each pass."""
    held = []
    for rank in (0, 1):
        sampler = DistributedSampler(Rows(20), num_replicas=2, rank=rank)
        supply = clean(DataLoader(Rows(20), batch_size=4, sampler=sampler), rank, 2)
        assert supply.num_sequences == 20
        held.append([names(supply.take(10)["input_ids"]) for _ in range(2)])
    for every in zip(*held, strict=True):
        assert sorted(chain(*every)) == list(range(20))
    assert held[0][0] != held[0][1]


def test_without_a_prompt_mask_nothing_is_given():
    """A data set of token ids alone is a data set."""

    class Plain(Rows):
        def __getitem__(self, i: int) -> dict[str, Tensor]:
            return {"input_ids": row(i)["input_ids"]}

    taken = clean(DataLoader(Plain(8), batch_size=4)).take(6)
    assert not taken["prompt_mask"].any()
    assert taken["prompt_mask"].shape == (6, LENGTH)


# --- mistakes ---


class Broken(Rows):
    """Good rows, but for the changes to row 5."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(12)
        self.changes = changes

    def __getitem__(self, i: int) -> Any:
        return {**row(i), **self.changes} if i == 5 else row(i)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": torch.tensor([1, 2, MASK, 3, 4, 5])}, "mask token 10, got it at row 1, position 2"),
        ({"input_ids": torch.tensor([1, 2, 11, 3, 4, 5])}, r"0\.\.10 .* got 11 at row 1, position 2"),
        ({"input_ids": torch.tensor([1, -1, 1, 3, 4, 5])}, "got -1 at row 1, position 1"),
        ({"prompt_mask": torch.ones(LENGTH, dtype=torch.bool)}, "prompt that covers the whole sequence in row 1"),
        ({"input_ids": torch.ones(LENGTH + 1).long()}, "one length"),
    ],
    ids=["mask in the data", "outside", "negative", "all prompt", "another length"],
)
def test_what_cannot_be_trained_on_is_refused(changes, message):
    """The error says what is wrong where."""
    supply = clean(DataLoader(Broken(**changes), batch_size=4))
    supply.take(4)
    with pytest.raises(ValueError, match=message):
        supply.take(4)


def test_a_model_that_needs_a_first_position_is_told_of_every_sequence_without_one():
    """Not of the first batch alone."""

    class Given(Rows):
        def __getitem__(self, i: int) -> dict[str, Tensor]:
            return {**row(i), "prompt_mask": torch.arange(LENGTH) < (i != 6)}

    supply = clean(DataLoader(Given(12), batch_size=4), first_given=True)
    supply.take(4)
    with pytest.raises(ValueError, match=r"expected position 0 to be given .* in row 2 .* after 4 training sequences"):
        supply.take(4)


# --- sequences of different lengths ---


@pytest.mark.parametrize("loader", RAGGED.values(), ids=RAGGED)
@pytest.mark.parametrize(
    "process", [ProgressiveUnmasking(3), ProgressiveUnmasking(3, threshold=0.5), RandomMasking(), MixedMasking(0.5, 3)]
)
@pytest.mark.parametrize("block_size", [None, 4, [[0, 2], [9, 3]]])
def test_ragged_sequences_are_padded_in_their_slots(process, loader, block_size):
    """To the longest that is there, and a multiple of all block sizes; nothing is masked or counted that is not."""
    stream = stream_of(process, loader(50, batch_size=4), block_size=block_size)
    multiple = {None: 1, 4: 4}.get(block_size if isinstance(block_size, int | None) else 0, 6)
    lengths = set()
    for step, batch in zip(range(40), stream, strict=False):
        chains, ids = batch["chains"], batch["input_ids"]
        real = batch.get("attention_mask", torch.ones_like(ids).bool())
        assert ("attention_mask" in batch) == (not real.all())
        row_lengths = real.sum(1)
        assert torch.equal(real, torch.arange(ids.shape[1]) < row_lengths[:, None])
        assert ids.shape[1] == -(-int(row_lengths.max()) // multiple) * multiple
        assert (batch["prompt_mask"] | real).all() and not ((batch["xt"] == MASK) & ~real).any()
        assert (chains.answer_length.view(4, -1).sum(1) == row_lengths - 1).all()
        assert (chains.masked.any(1) != chains.done).all()
        assert stream.num_masked == chains.masked.sum()
        lengths |= set(row_lengths.tolist())
        predictions = torch.randn(*chains.xt.shape, V, generator=torch.Generator().manual_seed(step))
        stream.advance(predictions.index_fill(2, torch.tensor([MASK]), -torch.inf), step)
    assert lengths == set(range(2, 11))


@pytest.mark.parametrize("loader", RAGGED.values(), ids=RAGGED)
@pytest.mark.parametrize("block_size", [None, 4, [[0, 2], [9, 3]]])
def test_a_ragged_stream_goes_on_exactly_where_it_stopped(loader, block_size):
    def run(stream: Stream, first: int, last: int) -> list[dict[str, Tensor]]:
        seen = []
        for step, batch in zip(range(first, last), stream, strict=False):
            seen.append({**batch["chains"].tensors()})
            predictions = torch.randn(*batch["chains"].xt.shape, V, generator=torch.Generator().manual_seed(step))
            stream.advance(predictions, step)
        return seen

    def fresh() -> Stream:
        return stream_of(ProgressiveUnmasking(3, threshold=0.3), loader(50, batch_size=4), block_size=block_size)

    whole = run(fresh(), 0, 24)
    for stop in (1, 5, 10, 17):
        first = fresh()
        run(first, 0, stop)
        file = io.BytesIO()
        torch.save(first.snapshot(), file)
        file.seek(0)
        second = fresh()
        second.restore(torch.load(file, weights_only=True))
        for expected, found in zip(whole[stop:], run(second, stop, 24), strict=True):
            assert expected.keys() == found.keys()
            assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.filterwarnings("ignore:the checkpoint of")
@pytest.mark.parametrize("loader", RAGGED.values(), ids=RAGGED)
@pytest.mark.parametrize("block_size", [None, 4, [[0, 2], [4, 3]]])
@pytest.mark.parametrize("ranks", [1, 3])
def test_ragged_sequences_are_dealt_to_another_number_of_ranks(loader, block_size, ranks):
    """Whole and as long as they were, whether they go on or wait."""

    def run(stream: Stream, steps: int) -> None:
        for step, batch in zip(range(steps), stream, strict=False):
            chains = batch["chains"]
            assert (chains.masked.any(1) != chains.done).all() and chains.masked.any()
            predictions = torch.randn(*chains.xt.shape, V, generator=torch.Generator().manual_seed(step))
            stream.advance(predictions, stream.step)

    def held_rows(stream: Stream) -> list[list[int]]:
        found = []
        for chains in filter(None, stream.groups):
            full = chains.with_attention()
            ids, real = (join_blocks(rows, chains.num_blocks) for rows in (full.x0, full.attention_mask))
            over = chains.done.view(len(ids), -1).all(1)
            found += [row[kept].tolist() for row, kept, out in zip(ids, real, over, strict=True) if not out]
        put_off = stream.sequences.supply()["waiting"]
        if put_off is not None:
            real = put_off.get("attention_mask", put_off["prompt_mask"] | True)
            found += [row[kept].tolist() for row, kept in zip(put_off["input_ids"], real, strict=True)]
        return found

    process = ProgressiveUnmasking([[0, 2], [3, 4]], threshold=0.6)
    before = [stream_of(process, loader(50, batch_size=4), 1, 10**6, 5, r, 2, block_size) for r in range(2)]
    for stream in before:
        run(stream, 6)
    snapshots = [stream.snapshot() for stream in before]
    after = [stream_of(process, loader(50, batch_size=2), 1, 10**6, 5, r, ranks, block_size) for r in range(ranks)]
    for stream in after:
        stream.restore_from(saved_and_loaded(snapshots))
    expected = sorted(row for stream in before for row in held_rows(stream))
    found = sorted(row for stream in after for row in held_rows(stream))
    assert all(row in found for row in expected) and len(expected) <= len(found) <= max(len(expected), 2 * ranks)
    for stream in after:
        run(stream, 12)


def test_ragged_sequences_whose_first_ones_have_one_length_go_on():
    """Those that come next may be longer; whether a loader can yield such is known before."""
    rows = [{"input_ids": torch.arange(length) % MASK} for length in (3,) * 8 + (5,) * 16]

    def fresh() -> Stream:
        return stream_of(RandomMasking(), DataLoader(rows, 4, collate_fn=pad_collate))

    whole = fresh()
    train(whole, 2)
    snapshot, other = saved_and_loaded(whole.snapshot()), fresh()
    other.restore(snapshot)
    assert same(train(whole, 4), train(other, 4))
    stacked = stream_of(RandomMasking(), DataLoader(rows[8:], 4, shuffle=True))
    with pytest.raises(ValueError, match=r"sequence length: expected 3, as in the checkpoint, got 5"):
        stacked.restore({**snapshot, "num_sequences": 16})


def test_a_snapshot_without_padding_is_as_it_was():
    stream = stream_of(RandomMasking())
    next(iter(stream))
    snapshot = stream.snapshot()
    draws = "draws_for_all_rows"  # since version 0.3.0
    assert set(snapshot) == {"seed", "step", "position", "num_slots", "num_sequences", "groups", "supply", draws}
    assert set(snapshot["groups"][0]) == {"x0", "prompt_mask", "xt", "stage", "done", "num_stages"}


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (torch.ones(LENGTH).long(), "batch: expected .*got Tensor.*dictionary"),
        ((torch.ones(LENGTH).long(), 0), "batch: expected .*got list"),
        ({"tokens": torch.ones(LENGTH).long()}, r"batch: expected .*got \['tokens'\]"),
        ({"input_ids": torch.ones(LENGTH)}, "integers.*float32"),
        ({"input_ids": torch.ones(2, 3).long()}, r"integers \(B, L\), got \(4, 2, 3\)"),
        ({"input_ids": torch.ones(6).long(), "prompt_mask": torch.ones(5).bool()}, "prompt_mask: expected the shape"),
    ],
    ids=["tensor", "pair", "other names", "floats", "three dimensions", "other shape"],
)
def test_another_batch_format_is_refused(item, message):
    """The error shows the format."""

    class Items(Rows):
        def __getitem__(self, i: int) -> Any:
            return item

    with pytest.raises(ValueError, match=message):
        clean(DataLoader(Items(8), batch_size=4)).take(1)


def test_a_loader_needs_a_batch_size_and_sequences():
    """The batch size says how many rows there are; an empty set has nothing to put into them."""
    with pytest.raises(ValueError, match="batch_size"):
        clean(DataLoader(Rows(8), batch_size=None))
    with pytest.raises(ValueError, match="empty"):
        clean(DataLoader(Rows(0), batch_size=4))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_iterable_data_set_must_hold_something(workers):
    class Empty(IterableDataset):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            return iter(())

    with pytest.raises(ValueError, match="got none from Empty"):
        clean(DataLoader(Empty(), batch_size=4, num_workers=workers)).take(1)


# --- loaders of other kinds, and seeds ---


def test_a_batch_samplers_order_is_kept():
    """A shuffling batch_sampler is not silently a sequential one."""
    batches = torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(Rows(50)), 5, False)
    supply = clean(DataLoader(Rows(50), batch_sampler=batches))
    assert names(supply.take(50)["input_ids"]) != list(range(50))


def test_seeds_of_different_purposes_differ():
    """(seed, rank, step) drives dropout, (seed, rank, step, 0) the masks: they must not be the same numbers."""
    assert len({derived_seed(7), derived_seed(7, 0), derived_seed(7, 0, 0), derived_seed(7, 0, 0, 0)}) == 4


def test_a_shuffling_iterable_data_set_is_the_same_on_all_ranks():
    """Every rank reads the whole stream and keeps its share, so all must read the same stream."""

    class Shuffling(IterableRows):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            return map(row, torch.randperm(self.size).tolist())

    held = [
        names(clean(DataLoader(Shuffling(20), batch_size=4, num_workers=1), rank, 2).take(10)["input_ids"])
        for rank in (0, 1)
    ]
    assert sorted(held[0] + held[1]) == list(range(20))


@pytest.mark.parametrize("iterable", [False, True])
def test_a_faulty_sequence_late_in_the_data_is_placed(iterable):
    """The message says how far this process had read."""
    rows = [row(i) for i in range(12)]
    rows[9] = {**rows[9], "input_ids": torch.full_like(rows[9]["input_ids"], MASK)}

    class Iterable(IterableDataset):
        def __iter__(self):
            return iter(rows)

        def __len__(self):
            return len(rows)

    supply = clean(DataLoader(Iterable() if iterable else rows, batch_size=4))
    supply.take(8)
    with pytest.raises(ValueError, match=r"mask token .* after 8 training sequences of process 0"):
        supply.take(1)


@pytest.mark.parametrize("kind", LOADERS)
def test_a_supply_ends_with_its_last_reference(kind):
    """As part of a cycle, its workers would wait for the garbage collector, which stops them one by one in seconds."""
    supply = clean(LOADERS[kind](23, batch_size=4))
    supply.take(1)
    alive = weakref.ref(supply)
    gc.disable()
    try:
        del supply
        assert alive() is None
    finally:
        gc.enable()


# --- blocks ---

BLOCKS = [2, [(0, 1), (3, 2), (9, 6)], [(0, 2), (4, 3)]]
block_processes = pytest.mark.parametrize(
    "process",
    [RandomMasking(), ProgressiveUnmasking(1), ProgressiveUnmasking(4), ProgressiveUnmasking(2, threshold=0.7)],
    ids=["mdm", "one stage", "puma", "threshold"],
)


@block_processes
@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize("groups", [1, 2])
def test_a_row_keeps_its_sequence_until_all_its_blocks_are_done(process, block_size, groups):
    """Masks only decrease, across switches of the block size too, and every batch has something to learn from."""
    stream = stream_of(process, groups=groups, block_size=block_size)
    before: dict[int, dict[str, Tensor]] = {}
    for index, batch in enumerate(train(stream, 40)):
        masked = batch["xt"] == MASK
        assert masked.any(1).all()
        assert torch.equal(batch["xt"], torch.where(masked, batch["xt"], batch["input_ids"]))
        assert not (masked & batch["prompt_mask"]).any()
        last = before.get(index % groups)
        if last is not None:
            stays = (batch["input_ids"] == last["input_ids"]).all(1)
            was_masked = last["xt"] == MASK
            assert not (masked & ~was_masked)[stays].any()
            if isinstance(process, RandomMasking):
                assert not stays.any()
        before[index % groups] = batch


@block_processes
@pytest.mark.parametrize("block_size", BLOCKS)
def test_a_sequence_leaves_when_its_last_block_is_done(process, block_size):
    """A block that is done before the others has nothing masked, so no loss, until they are."""
    stream = stream_of(process, block_size=block_size)
    waited = 0
    for _ in range(60):
        (batch,) = train(stream, 1)
        (chains,) = stream.groups
        done = chains.done.view(4, -1)
        after = stream.peek()
        stays = (after["input_ids"] == batch["input_ids"]).all(1)
        assert torch.equal(stays, ~done.all(1))
        masked = (after["xt"] == MASK).view(4, done.shape[1], -1).any(2)
        assert not (masked & done)[stays].any()
        waited += int((done & ~batch["prompt_mask"].view(4, done.shape[1], -1).all(2))[stays].sum())
    if process.num_stages_at(0) > 1 and process.unmasking.threshold is not None:
        assert waited > 0


@block_processes
@pytest.mark.parametrize("block_size", BLOCKS)
def test_every_sequence_is_trained_on_in_blocks_too(process, block_size):
    size = 23
    stream = stream_of(process, DataLoader(Rows(size), batch_size=4), block_size=block_size)
    steps = 0
    order: list[int] = []
    while stream.sequences.position < 2 * size:
        (batch,) = train(stream, 1)
        order += [name for name in names(batch["input_ids"]) if name not in order]
        steps += 1
        assert steps < 1000
    assert order == list(range(size))


def test_a_switch_of_the_block_size_masks_nothing_and_reveals_nothing():
    """The advance of the switch's step sees the sequences as they were, in new blocks, at stages that fit them."""
    process = ProgressiveUnmasking(2)
    seen: list[Any] = []

    class Watched(ProgressiveUnmasking):
        def advance(self, chains, logits, step, generator=None):
            seen.append((chains, logits))
            return process.advance(chains, logits, step, generator)

    stream = stream_of(Watched(2), block_size=[(0, 2), (3, 6)])
    batches = train(stream, 5)
    for step, (batch, (chains, logits)) in enumerate(zip(batches, seen, strict=True)):
        size = 2 if step < 3 else 6
        assert chains.xt.shape[1] == logits.shape[1] == size
        assert torch.equal(chains.xt.view(4, LENGTH), batch["xt"])
        assert torch.equal(logits.reshape(4, LENGTH, V), predictions(batch["input_ids"], step + 1))
    assert [batch["chains"].num_blocks for batch in batches] == [3, 3, 3, 3, 1]
    chains, _ = seen[3]
    answer, revealed = chains.answer_length, chains.revealed
    assert torch.equal(chains.stage, torch.where(revealed >= answer - 1, 1, ((2 * revealed - 1) // answer).clamp(0, 1)))


def test_blocks_of_a_sequence_start_together_and_those_without_an_answer_are_over():
    stream = stream_of(ProgressiveUnmasking(2), block_size=1)
    for batch in train(stream, 9):
        given_ = batch["prompt_mask"]
        assert torch.equal((batch["xt"] == MASK)[given_], torch.zeros(int(given_.sum()), dtype=torch.bool))
    assert all(
        len(set(stages)) == 1
        for stages in train(stream_of(ProgressiveUnmasking(2), block_size=3), 1)[0]["chains"].stage.view(4, -1).tolist()
    )


@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize("stop", [1, 3, 4, 9, 10, 17])
def test_a_restored_stream_of_blocks_goes_on_exactly(block_size, stop):
    process = ProgressiveUnmasking([(0, 1), (5, 3)], threshold=0.7)
    whole = train(stream_of(process, block_size=block_size, groups=2), 30)
    stream = stream_of(process, block_size=block_size, groups=2)
    train(stream, stop)
    buffer = io.BytesIO()
    torch.save(stream.snapshot(), buffer)
    buffer.seek(0)
    other = stream_of(process, block_size=block_size, groups=2, seed=9)
    other.restore(torch.load(buffer, weights_only=True))
    assert same(train(other, 30 - stop), whole[stop:])


# --- another number of ranks, another batch size ---


def entries(stream: Stream, steps: int) -> list[int]:
    """The sequences that the next steps bring into the slots, in the order in which they were taken."""
    slots = [[-1] * stream.batch_size for _ in stream.groups]
    for group, chains in enumerate(stream.groups):
        if chains is not None:
            whole = chains.x0.view(stream.batch_size, -1)
            over = chains.done.view(stream.batch_size, -1).all(1).tolist()
            slots[group] = [-1 if out else name for name, out in zip(names(whole), over, strict=True)]
    came = []
    for _ in range(steps):
        group = stream.step % len(stream.groups)
        (batch,) = train(stream, 1)
        now = names(batch["input_ids"])
        came += [new for old, new in zip(slots[group], now, strict=True) if new != old]
        chains = stream.groups[group]
        over = chains.done.view(stream.batch_size, -1).all(1).tolist()
        slots[group] = [-1 if out else name for name, out in zip(now, over, strict=True)]
    return came


def held(stream: Stream) -> list[int]:
    """The sequences in the slots that are not over."""
    found = []
    for chains in filter(None, stream.groups):
        whole = names(chains.x0.view(stream.batch_size, -1))
        over = chains.done.view(stream.batch_size, -1).all(1).tolist()
        found += [name for name, out in zip(whole, over, strict=True) if not out]
    return found


shape = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))  # ranks, batch size, groups


def waiting(stream: Stream) -> list[int]:
    """The sequences that come before the data: from slots that there are no more, or read and not taken."""
    supply = stream.sequences.supply()
    return [name for batch in (supply["waiting"], supply["rest"]) if batch for name in names(batch["input_ids"])]


@pytest.mark.filterwarnings("ignore:the checkpoint of", "ignore:.* does not tell its place")
@settings(max_examples=20, deadline=None)
@given(
    shapes=st.lists(shape, min_size=1, max_size=4),
    steps=st.integers(0, 9),
    threshold=st.sampled_from([None, 0.6]),
    kind=st.sampled_from(["shuffle", "sampler", "iterable"]),
    block_size=st.sampled_from([None, [(0, 2), (2, 6)]]),
    baseline=st.booleans(),
)
def test_another_number_of_ranks_takes_every_sequence_of_a_pass_once(
    shapes, steps, threshold, kind, block_size, baseline
):
    """Those in the slots go on or wait, those taken are not taken again, all others are; however often it changes."""
    size = 1000  # more than can be taken in a pass
    process = RandomMasking() if baseline else ProgressiveUnmasking([[0, 2], [3, 4]], threshold=threshold)
    taken: set[int] = set()
    snapshots: list[Any] = []
    carried: Counter[int] = Counter()  # taken, and not trained on to the end
    for ranks, batch_size, groups in [shapes[0], *(b for a, b in pairwise(shapes) if a != b)]:
        brought: Counter[int] = Counter()
        streams = []
        for rank in range(ranks):
            loader = LOADERS[kind](size, batch_size=batch_size)
            stream = stream_of(process, loader, groups, 10**6, 5, rank, ranks, block_size)
            if snapshots:
                stream.restore_from(saved_and_loaded(snapshots))
            brought.update(held(stream))
            brought.update(entries(stream, steps))
            brought.update(waiting(stream))
            streams.append(stream)
        assert carried <= brought and max(brought.values(), default=1) == 1
        fresh = set(brought) - set(carried)
        assert fresh.isdisjoint(taken)
        taken |= fresh
        snapshots = [stream.snapshot() for stream in streams]
        carried = Counter(name for stream in streams for name in held(stream) + waiting(stream))
    # One process takes what is left, to the last.
    last = stream_of(process, LOADERS[kind](size, batch_size=7), 1, 10**6, 5, block_size=block_size)
    last.restore_from(saved_and_loaded(snapshots))
    came = held(last)
    left = Counter(set(range(size)) - taken) + carried
    while len(came) < left.total():
        came += entries(last, 1)
    assert Counter(came[: left.total()]) == left


def test_slots_go_on_as_masked_as_they_were_and_new_ones_start_staggered():
    """So that a batch goes on to hold all stages at once."""
    one = stream_of(ProgressiveUnmasking(4), DataLoader(Rows(101), batch_size=8))
    train(one, 5)
    (before,) = one.groups
    streams = [
        stream_of(ProgressiveUnmasking(4), DataLoader(Rows(101), batch_size=8), rank=r, world_size=2) for r in (0, 1)
    ]
    for stream in streams:
        with pytest.warns(UserWarning, match=r"1 process\(es\) x 1 x 8 .* goes on on 2 x 1 x 8: 6 sequences in flight"):
            stream.restore_from([saved_and_loaded(one.snapshot())])
    after = [stream.groups[0] for stream in streams]
    xt = {name: row for chains in after for name, row in zip(names(chains.x0), chains.xt.tolist(), strict=True)}
    going = [i for i in range(8) if not before.done[i]]
    assert all(xt[names(before.x0)[i]] == before.xt[i].tolist() for i in going)
    stages = torch.cat([chains.stage for chains in after])
    assert torch.bincount(stages, minlength=4).min() >= 3


def test_sequences_without_a_slot_are_the_least_revealed_and_come_first():
    """They start again when slots are free, before anything fresh."""
    one = stream_of(ProgressiveUnmasking(4), DataLoader(Rows(101), batch_size=12))
    train(one, 1)
    (before,) = one.groups
    going = sorted(
        ((int(r), n) for r, n, d in zip(before.revealed, names(before.x0), before.done, strict=True) if not d)
    )
    other = stream_of(ProgressiveUnmasking(4), DataLoader(Rows(101), batch_size=5))
    with pytest.warns(UserWarning, match="9 sequences in flight are dealt to 5 slots \\(4 wait to start again\\)"):
        other.restore_from([saved_and_loaded(one.snapshot())])
    assert other.groups[0].revealed.sum() == sum(revealed for revealed, _ in going[-5:])
    waits = names(other.sequences.supply()["waiting"]["input_ids"])
    assert set(waits) == {name for _, name in going} - set(held(other)) and len(waits) == 4
    assert entries(other, 12)[:4] == waits

"""A pool keeps chains as they are: what goes in comes out, wherever, however long and in whatever blocks it is."""

import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from puma_lightning.chain.chains import Chains
from puma_lightning.chain.reveal import reveal_at_random
from puma_lightning.chain.teacher import ProgressiveUnmasking
from puma_lightning.data.batch import Batch
from puma_lightning.training.pool import Pool, redealt
from puma_lightning.training.stream import begin

V = 11
MASK = 10
PROCESS = ProgressiveUnmasking(4)
few = settings(max_examples=40, deadline=None)


def sequences(lengths: list[int], seed: int = 0, length: int | None = None) -> Batch:
    """Of some lengths, each with its first position given."""
    generator = torch.Generator().manual_seed(seed)
    length = length or max(lengths)
    real = torch.arange(length) < torch.tensor(lengths)[:, None]
    ids = torch.randint(MASK, (len(lengths), length), generator=generator).masked_fill(~real, 0)
    batch = {"input_ids": ids, "prompt_mask": ~real | (torch.arange(length) < 1)}
    return batch if real.all() else {**batch, "attention_mask": real}


def started(clean: Batch, num_stages: int = 4, block_size: int | None = None, seed: int = 0) -> Chains:
    """Chains at stages of their own, some of them over."""
    generator = torch.Generator().manual_seed(seed)
    stage = torch.randint(num_stages, (len(clean["input_ids"]),), generator=generator)
    chains = begin(PROCESS, clean, MASK, num_stages, stage, block_size, generator)
    over = torch.rand(len(chains.x0), generator=generator) < 0.3
    chains.done = chains.done | over
    chains.xt = torch.where(chains.done[:, None], chains.x0, chains.xt)
    return chains


def pool_of(size: int, num_stages: int = 4, block_size: int | None = None, is_of_all: bool = False) -> Pool:
    pool = Pool(size, MASK, is_of_all)
    pool.num_stages, pool.block_size = num_stages, block_size
    return pool


def equal(a: Chains, b: Chains) -> bool:
    """The same, but for the stages of chains that are over, which mean nothing."""
    x, y = a.tensors(), b.tensors()
    running = ~a.done
    stages = torch.equal(x.pop("stage")[running], y.pop("stage")[running])
    return stages and x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


@few
@given(
    lengths=st.lists(st.integers(2, 20), min_size=1, max_size=9),
    block_size=st.sampled_from([None, 2, 5]),
    num_stages=st.sampled_from([1, 4, 300]),
    seed=st.integers(0, 99),
)
def test_what_goes_in_comes_out(lengths, block_size, num_stages, seed):
    """Masks, stages and what is over, from any rows, in batches of any length."""
    length = None if block_size is None else -(-max(lengths) // block_size) * block_size
    clean = sequences(lengths, seed, length)
    chains = started(clean, num_stages, block_size, seed)
    rows = torch.randperm(30, generator=torch.Generator().manual_seed(seed))[: len(lengths)]
    pool = pool_of(30, num_stages, block_size)
    pool.note(rows, chains)
    assert equal(pool.chains(rows, clean, PROCESS), chains)
    assert torch.equal(pool.is_over(rows), ~chains.masked.view(len(lengths), -1).any(1))
    assert not pool.is_new(rows).any() and pool.is_new(torch.arange(30)).sum() == 30 - len(lengths)


def test_rows_before_their_first_turn_have_nothing_masked():
    """As have those that are over, so that both start."""
    clean = sequences([5, 5])
    chains = pool_of(4).chains(torch.tensor([1, 3]), clean, PROCESS)
    assert not chains.masked.any() and chains.done.all()


def test_the_sequences_of_rows_are_kept_whatever_their_lengths():
    """The longest may come first or last; those that are asked for are as long as the longest of them."""
    pool = pool_of(6)
    first, longer = sequences([3, 5], 1), sequences([9, 2], 2)
    pool.put(torch.tensor([4, 0]), first)
    pool.put(torch.tensor([2, 4]), longer)
    found = pool.sequences(torch.tensor([0]))
    assert torch.equal(found["input_ids"], first["input_ids"][1:]) and "attention_mask" not in found
    found = pool.sequences(torch.tensor([2, 4]))
    assert all(torch.equal(found[name], longer[name]) for name in longer)


def test_of_a_row_that_comes_twice_the_first_counts():
    """In a batch that straddles two passes over the data."""
    clean = sequences([6, 6, 6])
    chains = started(clean)
    chains = begin(PROCESS, clean, MASK, 4, torch.tensor([0, 1, 3]))
    pool = pool_of(5)
    pool.note(torch.tensor([2, 4, 2]), chains)
    found = pool.chains(torch.tensor([2, 4]), {name: rows[:2] for name, rows in clean.items()}, PROCESS)
    assert torch.equal(found.xt, chains.xt[:2]) and found.stage.tolist() == [0, 1]


@pytest.mark.parametrize(("num_stages", "block_size"), [(8, None), (4, 3), (8, 3)])
def test_rows_that_waited_while_stages_or_blocks_changed_are_told_from_what_is_revealed(num_stages, block_size):
    """Masks stay; the stage is that of the new kind."""
    clean = sequences([12] * 4)
    chains = begin(PROCESS, clean, MASK, 4, torch.arange(4), None, torch.Generator().manual_seed(0))
    pool = pool_of(4, 4, None)
    pool.note(torch.arange(4), chains)
    pool.num_stages, pool.block_size = num_stages, block_size
    found = pool.chains(torch.arange(4), clean, PROCESS)
    assert torch.equal(found.xt.reshape(4, 12), chains.xt)
    assert found.num_stages == num_stages and found.num_blocks == (1 if block_size is None else 4)
    # Stage s holds the shares of the answer in (s / K, (s + 1) / K].
    share = found.revealed / found.answer_length.clamp_min(1)
    inner = ~found.done & (found.revealed > 0) & (found.revealed < found.answer_length - 1)
    assert inner.any() and torch.equal(found.stage[inner], (share * num_stages).ceil().long()[inner] - 1)


def test_where_chains_moved_is_waited_for_only_if_they_are_asked_for():
    """So that a GPU is not waited for in every step."""

    def copied() -> Tensor:
        waited.append(True)
        return told()

    waited: list[bool] = []
    clean, pool = sequences([6, 6]), pool_of(6)
    chains = started(clean)
    pool.note(torch.tensor([0, 1]), chains)
    told = pool._moving[0].told
    object.__setattr__(pool._moving[0], "told", copied)
    assert pool.is_new(torch.tensor([2, 3])).all() and not waited
    assert equal(pool.chains(torch.tensor([0, 1]), clean, PROCESS), chains) and waited


def saved_and_loaded(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_state_is_all_there_is_and_stays_as_it_is():
    """Through a file; what happens to the pool later does not change it."""
    clean, rows = sequences([6, 4, 6]), torch.tensor([3, 0, 2])
    pool, chains = pool_of(5), started(clean)
    pool.put(rows, clean)
    pool.note(rows, chains)
    state = pool.state()
    other = pool_of(5, num_stages=1)
    other.restore(saved_and_loaded(state))
    kept = pool_of(5)
    kept.restore(state)
    for each in (pool, kept):
        each.put(rows, sequences([5, 5, 5], 9))
        each.note(rows, started(sequences([6, 6, 6], 8), seed=3))
        each.settle()
    again = pool_of(5)
    again.restore(state)
    for each in (other, again):
        assert equal(each.chains(rows, each.sequences(rows), PROCESS), chains)
        assert torch.equal(each.sequences(rows)["input_ids"], clean["input_ids"])


@few
@given(size=st.integers(4, 23), before=st.integers(1, 4), after=st.integers(1, 4), seed=st.integers(0, 99))
def test_a_chain_stays_with_its_sequence_on_another_number_of_ranks(size, before, after, seed):
    """Of R ranks, rank r has the sequences r, r + R, and so on."""
    clean = sequences([7] * size, seed)
    chains = started(clean, seed=seed)
    states = []
    for rank in range(before):
        every = torch.arange(rank, size, before)
        pool = pool_of(len(every), is_of_all=True)
        pool.note(torch.arange(len(every)), chains.map(lambda tensor, every=every: tensor[every]))
        states.append(pool.state())
    for rank in range(after):
        every = torch.arange(rank, size, after)
        pool = pool_of(len(every), is_of_all=True)
        pool.restore(redealt(states, rank, after))
        mine = {name: values[every] for name, values in clean.items()}
        found = pool.chains(torch.arange(len(every)), mine, PROCESS)
        assert equal(found, chains.map(lambda tensor, every=every: tensor[every]))


def test_a_chain_takes_a_bit_for_each_position_and_four_bytes_for_each_block():
    """Besides eight bytes that say what its stage counts in."""
    pool, clean = pool_of(100, block_size=16), sequences([64] * 100)
    pool.note(torch.arange(100), started(clean, block_size=16))
    state = pool.state()
    sizes = {name: value.numel() * value.element_size() for name, value in state.items() if isinstance(value, Tensor)}
    assert sizes == {"masked": 100 * 8, "stage": 100 * 4 * 4, "kind": 100 * 8}


def test_the_masks_of_a_pool_are_not_those_of_the_chains_it_was_given():
    """A recorded step changes its chains in place."""
    clean, pool = sequences([6, 6]), pool_of(2)
    chains = begin(PROCESS, clean, MASK, 4, torch.tensor([0, 2]))
    before = chains.map(torch.clone)
    pool.note(torch.arange(2), chains)
    chains.xt.copy_(reveal_at_random(chains.xt, chains.x0, torch.tensor([9, 9]), MASK))
    chains.stage.fill_(3)
    assert equal(pool.chains(torch.arange(2), clean, PROCESS), before)

"""The state of chains."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from some_chains import MASK, begin, gen, sequences

from puma_lightning.chain.blocks import join_blocks
from puma_lightning.chain.chains import Chains
from puma_lightning.chain.teacher import RandomMasking

seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=40, deadline=None)


def test_chains_list_their_tensors_and_move_together():
    """Everything is a tensor, except for K and the mask token."""
    x0, prompt = sequences(0, 2, 3)
    chains = begin(RandomMasking(), x0, prompt, 0)
    assert set(chains.tensors()) == {"x0", "prompt_mask", "xt", "stage", "done"}
    moved = chains.to(torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(chains.tensors().values(), moved.tensors().values(), strict=True))


@few
@given(seed=seeds, batch=st.integers(1, 4), blocks=st.integers(1, 4), size=st.integers(1, 4))
def test_counts_are_those_of_the_rows(seed, batch, blocks, size):
    """Blocks are rows; a row without an answer is over from the start."""
    x0, _ = sequences(seed, batch, blocks * size)
    prompt = torch.rand(x0.shape, generator=gen(seed)) < 0.5
    chains = Chains.fully_masked(x0, prompt, MASK, block_size=size)
    assert chains.num_blocks == blocks and len(chains.x0) == batch * blocks
    assert torch.equal(join_blocks(chains.x0, blocks), x0)
    assert torch.equal(join_blocks(chains.masked, blocks), ~prompt)
    assert (chains.revealed == 0).all() and int(chains.answer_length.sum()) == int((~prompt).sum())
    assert torch.equal(chains.done, chains.answer_length == 0)


def test_rows_take_the_place_of_others():
    x0, prompt = sequences(0, 5, 4)
    chains = Chains.fully_masked(x0, prompt, MASK)
    others = Chains.fully_masked(x0[:2] + 0, torch.ones_like(prompt[:2]), MASK)
    changed = chains.with_rows(torch.tensor([1, 3]), others)
    assert changed.done.tolist() == [False, True, False, True, False]
    assert torch.equal(changed.x0[[0, 2, 4]], x0[[0, 2, 4]]) and torch.equal(changed.x0[[1, 3]], x0[:2])


def test_a_number_is_drawn_for_each_chain():
    """In float32 whatever the default dtype, which a Trainer in half precision changes."""
    x0, prompt = sequences(0, 5, 4)
    torch.set_default_dtype(torch.bfloat16)
    try:
        uniform = Chains.fully_masked(x0, prompt, MASK).uniform(gen(0))
    finally:
        torch.set_default_dtype(torch.float32)
    assert uniform.shape == (5,) and uniform.dtype == torch.float32 and (uniform < 1).all()

"""Where answers end: what a sampler does once it has generated EOS, and what it leaves alone."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from puma_lightning.chain.policies import Confidence, Entropy, LeftToRight, Margin, RandomOrder
from puma_lightning.chain.student import BlockSampler, Sampler

V, MASK, EOS = 6, 3, 1
POLICIES = [Confidence(), Margin(), Entropy(), RandomOrder(), LeftToRight()]
few = settings(max_examples=40, deadline=None)


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def board(seed: int, batch: int, length: int) -> Tensor:
    """Prompts with the rest masked; a prompt may hold EOS, and positions between may be given."""
    given_ = torch.rand(batch, length, generator=gen(seed + 1)) < torch.rand(batch, 1, generator=gen(seed + 2))
    clean = torch.tensor([0, EOS, 2, 4, 5])[torch.randint(5, (batch, length), generator=gen(seed))]
    return clean.masked_fill(~given_, MASK)


class Model:
    """Logits that depend on the whole row and on nothing else; rows may leave. ``eos`` makes EOS likelier."""

    def __init__(self, seed: int, length: int, eos: float = 0.0, context: float = 1.0) -> None:
        self.own = torch.randn(length, V, generator=gen(seed + 1)) * 3
        self.weight = context * torch.randn(length, V, length * V, generator=gen(seed))
        self.eos = eos

    def __call__(self, xt: Tensor) -> Tensor:
        row = F.one_hot(xt, V).flatten(1).float()
        logits = self.own + torch.einsum("bi,lvi->blv", row, self.weight)
        logits[..., EOS] += self.eos
        return logits

    def select(self, rows: Tensor) -> "Model":
        return copy.copy(self)


def both(seed, batch, length, eos=0.0, context=1.0, **options):
    """The same batch without and with an end at EOS, and what was to be filled in."""
    xt, model = board(seed, batch, length), Model(seed, length, eos, context)
    model.static_shapes = bool(seed % 2)  # whether finished rows stay in the batch
    without = Sampler(**options)(model, xt, MASK, gen(seed))
    return without, Sampler(**options, end_at_eos=True)(model, xt, MASK, gen(seed), EOS), xt == MASK


sizes = {"seed": st.integers(0, 2**31 - 1), "batch": st.integers(1, 4), "length": st.integers(1, 9)}
eos = st.sampled_from([-1e9, -2.0, 0.0, 3.0, 50.0])
options = st.fixed_dictionaries(
    {"policy": st.sampled_from(POLICIES)},
    optional={
        "tokens_per_step": st.integers(1, 4), "threshold": st.floats(0.1, 0.9), "temperature": st.just(1.0),
    },
)  # fmt: skip
greedy = st.fixed_dictionaries({"policy": st.sampled_from(POLICIES)}, optional={"tokens_per_step": st.integers(1, 4)})


@few
@given(**sizes, eos=eos, options=options)
def test_no_position_after_an_eos_is_revealed_later_than_it(seed, batch, length, eos, options):
    """So a row ends at its first EOS: what stands after it, and is no EOS, was there before it."""
    _, sample, answer = both(seed, batch, length, eos, **options)
    assert not (sample.tokens == MASK).any()
    for tokens, step, free in zip(sample.tokens, sample.reveal_step, answer, strict=True):
        for end in ((tokens == EOS) & free).nonzero().flatten().tolist():
            after = free.clone()
            after[: end + 1] = False
            assert (step[after] <= step[end]).all()


@few
@given(**sizes, eos=eos, options=options)
def test_every_pass_reveals_something_that_the_model_said(seed, batch, length, eos, options):
    """What is given stays, passes are counted for each row, and none of them is for the fill alone."""
    _, sample, answer = both(seed, batch, length, eos, **options)
    xt = board(seed, batch, length)
    assert torch.equal(sample.tokens[~answer], xt[~answer]) and torch.equal(sample.reveal_step == -1, ~answer)
    for steps, nfe in zip(sample.reveal_step.tolist(), sample.nfe.tolist(), strict=True):
        assert set(steps) - {-1} == set(range(nfe))


@few
@given(**sizes, eos=eos, options=greedy)
def test_it_never_takes_more_passes(seed, batch, length, eos, options):
    """With a fixed pace. A threshold looks at predictions, which are others once EOS stands there."""
    without, sample, _ = both(seed, batch, length, eos, **options)
    assert (sample.nfe <= without.nfe).all()


@few
@given(**sizes, eos=eos, num_steps=st.integers(1, 6))
def test_it_never_takes_more_steps_than_were_given(seed, batch, length, eos, num_steps):
    without, sample, _ = both(seed, batch, length, eos, num_steps=num_steps)
    assert (sample.nfe <= without.nfe).all()


@few
@given(**sizes, options=options)
def test_without_an_eos_nothing_changes(seed, batch, length, options):
    """Not a bit: tokens, order, passes, and where the generator stands."""
    xt, model = board(seed, batch, length), Model(seed, length, eos=-1e9)
    generators = gen(seed), gen(seed)
    without = Sampler(**options)(model, xt, MASK, generators[0])
    sample = Sampler(**options, end_at_eos=True)(model, xt, MASK, generators[1], EOS)
    assert all(torch.equal(getattr(sample, n), getattr(without, n)) for n in ("tokens", "reveal_step", "nfe"))
    assert torch.equal(*(generator.get_state() for generator in generators))


@few
@given(**sizes, eos=st.sampled_from([-2.0, 0.0]), policy=st.sampled_from(POLICIES[:3]))
def test_a_row_without_an_eos_is_as_it_is_without(seed, batch, length, eos, policy):
    """Also beside rows with one, which leave the batch earlier; up to ties and draws, that others' leaving moves."""
    without, sample, answer = both(seed, batch, length, eos, policy=policy)
    for row in (~((without.tokens == EOS) & answer).any(1)).nonzero().flatten().tolist():
        for name in ("tokens", "reveal_step", "nfe"):
            assert torch.equal(getattr(sample, name)[row], getattr(without, name)[row])


@few
@given(**sizes, eos=eos, options=options)
def test_up_to_the_first_eos_that_is_revealed_the_chain_is_the_same(seed, batch, length, eos, options):
    """One row: whatever stood before its first EOS, in time, stands there too."""
    without, sample, answer = both(seed, 1, length, eos, **options)
    is_eos = (without.tokens == EOS) & answer
    if not is_eos.any():
        return
    first = without.reveal_step[is_eos].min()
    until = answer & (without.reveal_step <= first)
    assert torch.equal(sample.tokens[until], without.tokens[until])
    assert torch.equal(sample.reveal_step[until], without.reveal_step[until])


@few
@given(**sizes, eos=eos)
def test_from_the_left_the_text_is_the_same_and_its_passes_are_its_length(seed, batch, length, eos):
    """Where nothing before EOS is open, nothing is changed by what is filled in."""
    without, sample, answer = both(seed, batch, length, eos, policy=LeftToRight())
    for old, new, free, nfe in zip(without.tokens, sample.tokens, answer, sample.nfe.tolist(), strict=True):
        generated, expected = new[free].tolist(), old[free].tolist()
        size = expected.index(EOS) + 1 if EOS in expected else len(expected)
        assert generated == expected[:size] + [EOS] * (len(expected) - size) and nfe == size


@few
@given(**sizes, eos=eos, policy=st.sampled_from(POLICIES[:3]))
def test_a_model_that_does_not_look_writes_the_same_text(seed, batch, length, eos, policy):
    """What is before the first EOS can only change by what the model makes of the EOS after it."""
    without, sample, answer = both(seed, batch, length, eos, context=0.0, policy=policy)
    for old, new, free in zip(without.tokens, sample.tokens, answer, strict=True):
        old, new = old[free].tolist(), new[free].tolist()
        assert (*old, EOS).index(EOS) == (*new, EOS).index(EOS)
        assert old[: (*old, EOS).index(EOS)] == new[: (*new, EOS).index(EOS)]


def test_what_stands_after_an_eos_stays():
    """Positions by falling confidence: 4 (not EOS), then 2 (EOS), which reveals 3; then 1 and 0."""
    logits = torch.zeros(1, 5, V)
    for position, (token, certainty) in enumerate([(0, 5.0), (2, 6.0), (EOS, 8.0), (4, 7.0), (5, 9.0)]):
        logits[0, position, token] = certainty
    sample = Sampler(end_at_eos=True)(lambda xt: logits, torch.full((1, 5), MASK), MASK, eos_id=EOS)
    assert sample.tokens.tolist() == [[0, 2, EOS, EOS, 5]]
    assert sample.reveal_step.tolist() == [[3, 2, 1, 1, 0]] and sample.nfe.tolist() == [4]


def test_an_eos_that_is_given_ends_nothing():
    xt = torch.tensor([[EOS, MASK, MASK]])
    sevens = F.one_hot(torch.full((1, 3), 5), V).float()
    assert Sampler(end_at_eos=True)(lambda xt: sevens, xt, MASK, eos_id=EOS).tokens.tolist() == [[EOS, 5, 5]]


class Blocks(Model):
    """The same, as a block model: it looks at the block alone, and counts what it is asked."""

    asked = 0

    def read(self, tokens: Tensor, block_size: int) -> None:
        type(self).asked += len(tokens)

    def __call__(self, xt: Tensor) -> Tensor:
        type(self).asked += len(xt)
        return super().__call__(xt)


@few
@given(seed=sizes["seed"], batch=sizes["batch"], blocks=st.integers(1, 3), eos=eos, options=greedy)
def test_within_a_block_as_well(seed, batch, blocks, eos, options):
    """A row ends in the block of its first EOS as it did, for fewer passes; the blocks before are the same."""
    size = 4
    xt = board(seed, batch, blocks * size)
    samples = []
    for ends in (False, True):
        Blocks.asked = 0
        sampler = BlockSampler(Sampler(**options, end_at_eos=ends))
        samples.append(sampler(Blocks(seed, size, eos), xt, MASK, size, EOS, gen(seed)))
        if (xt[:, :size] == MASK).any(1).all():  # otherwise a given prompt is read in as many parts as there are
            assert Blocks.asked == samples[-1].nfe.sum()
    without, sample = samples
    if not isinstance(options["policy"], RandomOrder):
        assert (sample.nfe <= without.nfe).all()
        for old, new, free in zip(without.tokens, sample.tokens, xt == MASK, strict=True):
            ends = ((old == EOS) & free).nonzero().flatten().tolist()
            before = ends[0] // size * size if ends else len(old)
            assert torch.equal(old[:before], new[:before])


@pytest.mark.parametrize("within", [lambda sampler: sampler, BlockSampler], ids=["any order", "blocks"])
def test_an_end_at_an_eos_that_there_is_not_is_refused(within):
    xt, model = torch.full((1, 4), MASK), Blocks(0, 4)
    sampler = within(Sampler(end_at_eos=True))
    with pytest.raises(ValueError, match="end_at_eos: expected false where no token ends an answer, got true"):
        sampler(model, xt, MASK, **({"block_size": 4} if isinstance(sampler, BlockSampler) else {}))


def test_names_tell_them_apart():
    assert Sampler(end_at_eos=True, tokens_per_step=2).name == "confidence_2_eos"
    assert BlockSampler(Sampler(end_at_eos=True), length=8).name == "block_confidence_1_eos_L8"

"""The student's chain, and that it is the teacher's chain with other tokens."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from puma_lightning.chain.chains import Chains
from puma_lightning.chain.policies import Confidence, Entropy, LeftToRight, Margin, RandomOrder
from puma_lightning.chain.reveal import reveal
from puma_lightning.chain.student import Sampler
from puma_lightning.chain.teacher import ProgressiveUnmasking

V = 7
MASK = 3  # not the last token, so that nothing may rely on that
POLICIES = [Confidence(), Margin(), Entropy(), RandomOrder(), LeftToRight()]
seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=25, deadline=None)


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clean(seed: int, batch: int, length: int) -> Tensor:
    return torch.tensor([0, 1, 2, 4, 5, 6])[torch.randint(6, (batch, length), generator=gen(seed))]


def board(seed: int, batch: int, length: int) -> Tensor:
    """Prompts with the rest masked; perhaps nothing or everything is given."""
    given_ = torch.rand(batch, length, generator=gen(seed + 1)) < torch.rand(batch, 1, generator=gen(seed + 2))
    return clean(seed, batch, length).masked_fill(~given_, MASK)


class Model:
    """Logits that depend on the whole row, and on nothing but the row; the mask token is the likeliest of all."""

    def __init__(self, seed: int, length: int, mask_logit: float = 20.0) -> None:
        self.weight = torch.randn(length, V, length * V, generator=gen(seed), dtype=torch.float64)
        self.mask_logit = mask_logit
        self.calls = 0

    def __call__(self, xt: Tensor) -> Tensor:
        self.calls += 1
        assert self.calls < 1000, "the sampler does not end"
        row = torch.nn.functional.one_hot(xt, V).flatten(1).double()
        logits = torch.einsum("bi,lvi->blv", row, self.weight).float()
        return logits.index_fill(-1, torch.tensor([MASK]), self.mask_logit)


# --- what every sample is ---

samplers = st.builds(
    Sampler,
    policy=st.sampled_from(POLICIES),
    tokens_per_step=st.one_of(st.none(), st.integers(1, 9)),
    threshold=st.one_of(st.none(), st.floats(0.1, 1.0)),
    temperature=st.sampled_from([0.0, 0.5, 1.0]),
    top_p=st.sampled_from([0.3, 1.0]),
)
boards = given(seed=seeds, batch=st.integers(1, 4), length=st.integers(1, 8), sampler=samplers)


@few
@boards
def test_a_sample_keeps_its_prompt_and_holds_no_mask(seed, batch, length, sampler):
    """Whatever the sampler, even if the model puts nearly all probability on the mask token."""
    xt = board(seed, batch, length)
    before = xt.clone()
    sample = sampler(Model(seed, length), xt, MASK, gen(seed))
    assert torch.equal(xt, before)
    assert torch.equal(sample.tokens[xt != MASK], xt[xt != MASK])
    assert not (sample.tokens == MASK).any()


@few
@boards
def test_reveal_step_says_after_which_pass_a_position_was_revealed(seed, batch, length, sampler):
    """-1 where given, else 0..NFE-1 without gaps; NFE is per sequence, and the model is called no more often."""
    xt = board(seed, batch, length)
    model = Model(seed, length, mask_logit=float("-inf"))
    sample = sampler(model, xt, MASK, gen(seed))
    assert torch.equal(sample.reveal_step == -1, xt != MASK)
    for steps, nfe in zip(sample.reveal_step.tolist(), sample.nfe.tolist(), strict=True):
        assert set(steps) - {-1} == set(range(nfe))
    assert model.calls == sample.nfe.max()


@few
@boards
def test_a_sample_is_determined_by_its_generator(seed, batch, length, sampler):
    """Ties and draws included; the global generator is not used."""
    xt = board(seed, batch, length)
    before = torch.get_rng_state()
    a, b = (sampler(Model(seed, length, float("-inf")), xt, MASK, gen(seed)) for _ in "ab")
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.reveal_step, b.reveal_step)
    assert torch.equal(before, torch.get_rng_state())


# --- who is in the batch ---


class Remembering(Model):
    """Knows which rows it is asked about, and that there are masked positions in each of them."""

    def __init__(self, seed: int, xt: Tensor, static: bool = False) -> None:
        super().__init__(seed, xt.shape[1], float("-inf"))
        self.given, self.asked, self.static_shapes = xt, [], static

    def __call__(self, xt: Tensor) -> Tensor:
        known = self.given != MASK
        assert torch.equal(xt[known], self.given[known])
        self.asked.append((xt == MASK).any(1).tolist())
        return super().__call__(xt)

    def select(self, rows: Tensor) -> "Remembering":
        chosen = copy.copy(self)
        chosen.given = self.given[rows]
        return chosen


@few
@boards
def test_a_finished_row_is_not_asked_about_again(seed, batch, length, sampler):
    """Every pass is over the rows that still have something masked, and each pass of a row is one of its NFE."""
    xt = board(seed, batch, length)
    model = Remembering(seed, xt)
    sample = sampler(model, xt, MASK, gen(seed))
    assert all(all(rows) and rows for rows in model.asked)
    assert sum(map(len, model.asked)) == sample.nfe.sum()


@few
@boards
def test_a_model_of_static_shapes_is_always_asked_about_all_rows(seed, batch, length, sampler):
    """And counts the passes of a row as the other does."""
    xt = board(seed, batch, length)
    model = Remembering(seed, xt, static=True)
    sample = sampler(model, xt, MASK, gen(seed))
    assert all(len(rows) == batch for rows in model.asked)
    assert torch.equal(torch.tensor(model.asked, dtype=torch.long).reshape(-1, batch).sum(0), sample.nfe)


def test_a_function_that_cannot_select_rows_sees_the_whole_batch():
    """It may know more of its rows than is in xt."""
    sizes = []
    xt = torch.tensor([[MASK, MASK, MASK], [0, 1, MASK]])
    Sampler()(lambda xt: sizes.append(len(xt)) or Model(0, 3)(xt), xt, MASK)
    assert sizes == [2, 2, 2]


@few
@given(
    seed=seeds,
    batch=st.integers(1, 4),
    length=st.integers(1, 8),
    policy=st.sampled_from([Confidence(), Margin(), Entropy(), LeftToRight()]),
    threshold=st.one_of(st.none(), st.floats(0.1, 1.0)),
)
def test_a_row_does_not_depend_on_the_others(seed, batch, length, policy, threshold):
    """Whoever else is in the batch, and whether finished rows leave it."""
    xt = board(seed, batch, length)
    sampler = Sampler(policy, threshold=threshold)
    whole = sampler(Remembering(seed, xt, static=True), xt, MASK)
    leaving = sampler(Remembering(seed, xt), xt, MASK)
    alone = [sampler(Remembering(seed, row[None]), row[None], MASK) for row in xt]
    for name in ("tokens", "reveal_step", "nfe"):
        assert torch.equal(getattr(whole, name), getattr(leaving, name))
        assert torch.equal(getattr(whole, name), torch.cat([getattr(sample, name) for sample in alone]))


# --- the pace ---


@few
@given(seed=seeds, batch=st.integers(1, 4), length=st.integers(1, 9), pace=st.integers(1, 10))
def test_tokens_per_step_positions_are_revealed_in_each_pass(seed, batch, length, pace):
    """All passes but a sequence's last reveal exactly that many."""
    xt = board(seed, batch, length)
    sample = Sampler(tokens_per_step=pace)(Model(seed, length), xt, MASK)
    size = (xt == MASK).sum(1)
    assert torch.equal(sample.nfe, (size + pace - 1) // pace)
    for steps, total in zip(sample.reveal_step, size.tolist(), strict=True):
        counts = torch.bincount(steps[steps >= 0]).tolist()
        assert sum(counts) == total and all(count == pace for count in counts[:-1])


@few
@given(seed=seeds, batch=st.integers(1, 4), length=st.integers(1, 9), num_steps=st.integers(1, 10))
def test_num_steps_spreads_the_positions_evenly(seed, batch, length, num_steps):
    """No pass reveals two more than another; there are never more passes than positions."""
    xt = board(seed, batch, length)
    sample = Sampler(num_steps=num_steps)(Model(seed, length), xt, MASK)
    size = (xt == MASK).sum(1)
    assert torch.equal(sample.nfe, size.clamp_max(num_steps))
    for steps in sample.reveal_step:
        counts = torch.bincount(steps[steps >= 0]).tolist()
        assert not counts or max(counts) - min(counts) <= 1


def test_one_position_per_pass_is_the_default():
    """NFE is the answer length."""
    assert Sampler()(Model(0, 6), torch.full((2, 6), MASK), MASK).nfe.tolist() == [6, 6]


def test_the_threshold_reveals_every_confident_position_at_once():
    """Here positions 1, 3 and 4 exceed it, the others follow one by one."""
    logits = torch.zeros(1, 6, V).index_fill(2, torch.tensor([MASK]), float("-inf"))
    logits[0, [1, 3, 4], 0] = 9.0
    sample = Sampler(LeftToRight(), threshold=0.9)(lambda xt: logits, torch.full((1, 6), MASK), MASK)
    assert sample.reveal_step.tolist() == [[0, 0, 1, 0, 0, 2]]
    assert sample.nfe.tolist() == [3]


def test_the_threshold_shortens_num_steps_too():
    """It comes on top of the even pace."""
    logits = 50 * torch.nn.functional.one_hot(clean(0, 2, 8), V).float()
    sample = Sampler(num_steps=4, threshold=0.9)(lambda xt: logits, torch.full((2, 8), MASK), MASK)
    assert sample.nfe.tolist() == [1, 1]


@few
@given(seed=seeds, length=st.integers(1, 7), policy=st.sampled_from([Confidence(), Margin(), Entropy()]))
def test_greedy_rows_do_not_depend_on_their_batch_mates(seed, length, policy):
    """Each row alone gives the row of the batch: tokens, order and NFE."""
    xt = board(seed, 4, length)
    model = Model(seed, length, float("-inf"))
    together = Sampler(policy)(model, xt, MASK)
    for i in range(4):
        alone = Sampler(policy)(model, xt[i : i + 1], MASK)
        for name in ("tokens", "reveal_step", "nfe"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[i])


# --- teacher and student ---


def knows(x0: Tensor, seed: int):
    """A model whose likeliest tokens are x0, with a certainty that changes with what is uncovered."""
    doubt = Model(seed, x0.shape[1])

    def model(xt: Tensor) -> Tensor:
        logits = doubt(xt).index_fill(-1, torch.tensor([MASK]), float("-inf"))
        spread = logits.masked_fill(torch.nn.functional.one_hot(x0, V).bool(), float("-inf")).amax(-1, keepdim=True)
        best = spread + 0.1 + logits.gather(-1, x0[..., None]).abs()
        return logits.scatter(-1, x0[..., None], best)

    return model


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("threshold", [None, 0.7])
@pytest.mark.parametrize("pace", [1, 2])
def test_teacher_and_student_unmask_in_the_same_order(policy, threshold, pace):
    """If the model's draws equal x0, revealing x0 and revealing draws is one chain, position by position."""
    x0 = clean(0, 5, 8)
    model = knows(x0, 1)
    prompt = torch.rand(5, 8, generator=gen(2)) < 0.3
    start = x0.masked_fill(~prompt, MASK)

    sample = Sampler(policy, tokens_per_step=pace, threshold=threshold)(model, start, MASK, gen(3))

    generator, xt, order, step = gen(3), start, torch.where(prompt, -1, 0), 0
    while (masked := xt == MASK).any():
        logits = model(xt)
        also = None if threshold is None else logits.softmax(-1).amax(-1) > threshold
        xt = reveal(xt, x0, policy(logits, xt), torch.full((5,), pace), MASK, also, generator)
        order = torch.where(masked & (xt != MASK), step, order)
        step += 1
    assert torch.equal(sample.tokens, x0)
    assert torch.equal(sample.reveal_step, order)


@pytest.mark.parametrize("policy", [Confidence(), Margin(), Entropy(), LeftToRight()], ids=repr)
def test_the_training_chain_uncovers_what_the_sampler_would_have_revealed_first(policy):
    """ProgressiveUnmasking from a fully masked board: what is uncovered is always a prefix of the sampler's order."""
    x0 = clean(0, 6, 9)
    logits = knows(x0, 1)(torch.full_like(x0, MASK))  # fixed, so that several positions per step change nothing
    blank = torch.full_like(x0, MASK)
    order = Sampler(policy)(lambda xt: logits, blank, MASK).reveal_step
    process = ProgressiveUnmasking(6, policy)
    chains = Chains.fully_masked(x0, torch.zeros_like(x0).bool(), MASK, 6)
    for step in range(5):
        chains = process.advance(chains, logits, step, gen(step))
        shown = ~chains.masked
        assert torch.equal(shown, order < shown.sum(1, keepdim=True))
    assert (shown.sum(1) >= 7).all()


# --- arguments ---


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"tokens_per_step": 2, "num_steps": 3}, "tokens_per_step: .* num_steps"),
        ({"tokens_per_step": 0}, "tokens_per_step.* 0"),
        ({"num_steps": -1}, "num_steps.*-1"),
        ({"threshold": 0}, "threshold.* 0"),
        ({"threshold": 1.1}, "threshold.*1.1"),
        ({"temperature": -1}, "temperature.*-1"),
        ({"top_p": 0}, "top_p.* 0"),
        ({"top_p": 1.2}, "top_p.*1.2"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_by_name(bad, message):
    """When the sampler is made."""
    with pytest.raises(ValueError, match=message):
        Sampler(**bad)


@pytest.mark.parametrize("bad", [{"temperature": float("nan")}], ids=str)
def test_nan_arguments_are_refused_by_name(bad):
    """NaN is not in range."""
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampler(**bad)


def test_a_sampler_has_a_name_for_logs():
    """Policy, pace, and whatever else is not the default."""
    assert Sampler().name == "confidence_1"
    assert Sampler(Margin(), num_steps=8).name == "margin_steps8"
    assert Sampler(threshold=0.9, tokens_per_step=2).name == "confidence_2_tau0.9"
    assert Sampler(temperature=0.5, top_p=0.9).name == "confidence_1_T0.5_p0.9"


def test_an_infinite_temperature_is_refused():
    with pytest.raises(ValueError, match="temperature: expected a finite number"):
        Sampler(temperature=float("inf"))

"""Recorded passes: the same samples to the last bit, replayed by later batches, with few looks at values."""

import copy
import gc
import pickle
import warnings
import weakref
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recorder import Recorder, use_recorder
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from puma_lightning import MaskedDiffusion, TransformerBackbone, graphs
from puma_lightning.chain.policies import Confidence, Entropy, LeftToRight, Margin, Policy, RandomOrder
from puma_lightning.chain.student import Sampler, any_order, recorded
from puma_lightning.chain.student.recorded import Passes, RecordedPasses
from puma_lightning.modules.masked_diffusion import Canvas
from puma_lightning.output.prediction import Prediction

V, MASK, EOS, LENGTH = 23, 11, 3, 12
POLICIES = [Confidence(), Margin(), Entropy(), RandomOrder(), LeftToRight(), lambda logits, xt: -logits[..., 0]]
FIELDS = ("tokens", "reveal_step", "nfe")


def module(large=False, shifted=False, seed=0, build=MaskedDiffusion, **options):
    """A model whose predictions tell positions apart: some are surer than the thresholds, and scores are no ties."""
    torch.manual_seed(seed)
    sizes = dict(hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, max_length=LENGTH)
    backbone = TransformerBackbone(V, **sizes, learned_positions=True, **options)
    for parameter in backbone.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.4)
    made = build(backbone, MASK, shifted=shifted, eos_id=EOS, captured="auto")
    made.large_vocabulary = 1 if large else None
    return made


def batch(seed=0, rows=5, padded=False):
    """Tokens, a prompt mask and an attention mask; a row may be all given."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randint(V - 1, (rows, LENGTH), generator=generator)
    x0 += x0 >= MASK
    prompt = torch.arange(LENGTH) < torch.randint(1, LENGTH + 1, (rows, 1), generator=generator)
    real = torch.arange(LENGTH) < torch.randint(LENGTH // 2, LENGTH + 1, (rows, 1), generator=generator)
    return x0, prompt, real if padded else None


def blank(seed=0, rows=5, padded=False):
    """The same with all masked but the first position."""
    x0, _, real = batch(seed, rows, padded)
    return x0, (torch.arange(LENGTH) < 1).expand(rows, -1), real


def sample(model, sampler, given, seed=0):
    x0, prompt, real = given
    return model.sample(x0, prompt, sampler, torch.Generator().manual_seed(seed), real)


def alike(one, other):
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in FIELDS)


@pytest.fixture
def recording(monkeypatch):
    """What is recorded while a test runs; all of it on the CPU, in place of CUDA."""
    use_recorder(monkeypatch)
    made, record = [], graphs.record
    monkeypatch.setattr(graphs, "record", lambda function, *rest: made.append(function) or record(function, *rest))
    return made


def unrecorded(monkeypatch, sampling):
    """The sample of the same driver whose passes are taken as they are."""
    with monkeypatch.context() as patch:
        patch.setattr(RecordedPasses, "_record", RecordedPasses._pass)
        patch.setattr(Canvas, "passes", property(lambda canvas: Passes()))
        return sampling()


SAMPLERS = {
    "a token": {},
    "three tokens": {"tokens_per_step": 3},
    "steps": {"num_steps": 5},
    "threshold": {"threshold": 0.2},
    "threshold, steps": {"threshold": 0.3, "num_steps": 9},
    "drawn": {"temperature": 0.8},
    "drawn, top p": {"temperature": 1.2, "top_p": 0.7, "threshold": 0.4},
    "eos": {"end_at_eos": True},
    "eos, drawn, threshold": {"end_at_eos": True, "temperature": 2.0, "threshold": 0.5},
}


@pytest.mark.parametrize("options", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: getattr(policy, "__name__", repr(policy)))
@pytest.mark.parametrize("large", [False, True], ids=["logits", "large vocabulary"])
def test_recorded_passes_give_the_same_sample_to_the_last_bit(monkeypatch, recording, policy, options, large):
    """In the first batch, in which they are recorded, and in later ones; with padding and without."""
    model, sampler = module(large), Sampler(policy, **options)
    for padded in (False, True):
        for seed in range(3):
            given_ = batch(seed, padded=padded)
            expected = unrecorded(monkeypatch, lambda: sample(model, sampler, given_, seed))  # noqa: B023
            assert alike(sample(model, sampler, given_, seed), expected)
    assert (expected.tokens != MASK).all() and 2 <= len(recording) <= 2 * 2


@pytest.mark.parametrize("options", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("policy", [Confidence(), Margin(), LeftToRight()], ids=repr)
def test_it_is_the_sample_of_the_cpu_where_nothing_is_drawn(monkeypatch, recording, policy, options, padded):
    """Whose rows leave the batch as they are finished, and which looks at values in every pass."""
    model, sampler = module(), Sampler(policy, **{**options, "temperature": 0.0})
    batches = [batch(seed, padded=padded) for seed in range(3)]
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "can_record", lambda device: False)
        expected = [sample(model, sampler, each) for each in batches]
    assert not recording
    assert all(alike(sample(model, sampler, each), one) for each, one in zip(batches, expected, strict=True))
    assert recording


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**20), rows=st.integers(1, 6), policy=st.sampled_from(POLICIES), shifted=st.booleans(),
    options=st.sampled_from(list(SAMPLERS.values())), large=st.booleans(), padded=st.booleans(),
)  # fmt: skip
def test_any_batch_is_sampled_alike(seed, rows, policy, shifted, options, large, padded):
    with pytest.MonkeyPatch.context() as patch:
        use_recorder(patch)
        model, sampler = module(large, shifted, seed), Sampler(policy, **options)
        for each in (seed, seed + 1):
            given_ = batch(each, rows, padded)
            expected = unrecorded(patch, lambda: sample(model, sampler, given_, each))  # noqa: B023
            assert alike(sample(model, sampler, given_, each), expected)


def test_no_generator_is_the_devices_own(monkeypatch, recording):
    model, sampler = module(), Sampler(temperature=1.0)
    x0, prompt, _ = batch()
    for seed in range(3):
        torch.manual_seed(seed)
        expected = unrecorded(monkeypatch, lambda: model.sample(x0, prompt, sampler))
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        assert alike(model.sample(x0, prompt, sampler), expected)
        assert torch.equal(torch.get_rng_state(), after)
        sample(model, sampler, batch())  # with one, which is recorded for itself
    assert len(recording) == 2


def test_a_generator_goes_on_from_batch_to_batch(monkeypatch, recording):
    """As it does where nothing is recorded."""
    model, sampler = module(), Sampler(temperature=1.0)
    x0, prompt, _ = batch()
    found = []
    for take in (lambda f: unrecorded(monkeypatch, f), lambda f: f()):
        generator = torch.Generator().manual_seed(5)
        found.append([take(lambda: model.sample(x0, prompt, sampler, generator)) for _ in range(3)])  # noqa: B023
    assert all(alike(one, other) for one, other in zip(*found, strict=True))
    assert not alike(found[0][0], found[0][1])


# --- what is recorded, and for how long ---


def test_later_batches_of_a_shape_replay_what_the_first_recorded(monkeypatch, recording):
    """Other shapes, samplers, precisions and masks are recorded for themselves; no Python of the model is run else."""
    model, sampler, calls = module(), Sampler(), []
    forward = MaskedDiffusion.forward
    monkeypatch.setattr(
        MaskedDiffusion, "forward", lambda *given, **padding: calls.append(1) or forward(*given, **padding)
    )
    for seed in range(4):
        sample(model, sampler, blank(seed))
        assert len(recording) == 1 and len(calls) == 4  # three before it is recorded
    others = [
        lambda: sample(model, sampler, blank(rows=3)),
        lambda: sample(model, sampler, blank(padded=True)),
        lambda: sample(model, Sampler(temperature=1.0), blank()),
        lambda: sample(model, Sampler(temperature=1.0, top_p=0.5), blank()),
        lambda: sample(model, Sampler(threshold=0.999), blank()),
        lambda: sample(model, Sampler(tokens_per_step=2), blank()),
        lambda: sample(model, Sampler(num_steps=9), blank()),
        lambda: sample(model, Sampler(POLICIES[1]), blank()),
        lambda: Sampler()(Canvas(model.eval()), torch.full((2, LENGTH), MASK), MASK, None),
        lambda: sample(model, Sampler(LeftToRight(), end_at_eos=True), blank()),
    ]
    for count, sampling in enumerate(others, 2):
        for _ in range(2):
            sampling()
            assert len(recording) == count and len(calls) == 4 * count
    with torch.autocast("cpu", torch.bfloat16):
        sample(model, sampler, blank())
    assert len(recording) == len(others) + 2
    sample(model, Sampler(), blank())  # alike, if another object
    assert len(recording) == len(others) + 2


def test_a_sampler_that_is_changed_is_another(monkeypatch, recording):
    """What was recorded, and is still to be, is of the settings that it had."""
    model, sampler = module(True), Sampler(tokens_per_step=2)
    monkeypatch.setattr(any_order, "POSITIONS", 10)
    few = (batch()[0], (torch.arange(LENGTH) >= 2).expand(5, -1), None)
    before = sample(model, sampler, few)
    sampler.tokens_per_step, sampler.unmasking.policy = 1, LeftToRight()
    assert not alike(sample(model, sampler, few), before)
    all_masked = (batch()[0], torch.zeros(5, LENGTH, dtype=torch.bool), None)
    expected = unrecorded(monkeypatch, lambda: sample(model, Sampler(tokens_per_step=2), all_masked))
    again = Sampler(sampler_policy := Confidence(), tokens_per_step=2)
    assert alike(sample(model, again, all_masked), expected) and again.unmasking.policy is sampler_policy
    assert alike(sample(model, Sampler(tokens_per_step=2), all_masked), expected)


class Favours(Policy):
    """A policy of one's own with a state."""

    def __init__(self):
        self.token, self.by_position = 0, torch.zeros(LENGTH)

    def __call__(self, logits, xt):
        return logits[..., self.token] + self.by_position


def test_a_policy_that_is_changed_is_another(monkeypatch, recording):
    """Numbers that it has, and tensors that are others or that are changed."""
    model, policy = module(), Favours()
    changes = [
        lambda: None,
        lambda: setattr(policy, "token", 5),
        lambda: setattr(policy, "by_position", torch.arange(12.0)),
        lambda: policy.by_position.mul_(-1),
    ]
    orders = []
    for change in changes:
        change()
        expected = unrecorded(monkeypatch, lambda: sample(model, Sampler(policy), blank()))
        found = sample(model, Sampler(policy), blank())
        assert alike(found, expected) and not any(torch.equal(found.reveal_step, other) for other in orders)
        orders.append(found.reveal_step)
    assert len(recording) == 3


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("large", [False, True], ids=["logits", "large vocabulary"])
def test_weights_that_are_changed_in_place_are_used_by_what_was_recorded(monkeypatch, recording, large, precision):
    """By an optimizer, or when those of a checkpoint are loaded; also where autocast keeps copies of them."""
    model, sampler = module(large), Sampler(tokens_per_step=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    given_, found = (batch()[0], batch()[1] & False, None), []
    for _ in range(3):
        with torch.autocast("cpu", precision, enabled=precision is not None):
            expected = unrecorded(monkeypatch, lambda: sample(model, sampler, given_))
            found.append(sample(model, sampler, given_))
        assert alike(found[-1], expected)
        model(given_[0]).square().mean().backward()
        optimizer.step()
    assert len(recording) == 1
    assert not torch.equal(found[0].tokens, found[1].tokens) and not torch.equal(found[1].tokens, found[2].tokens)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.double(),
        lambda model: setattr(model.backbone.norm, "weight", nn.Parameter(torch.linspace(-1, 1, 16))),
        lambda model: setattr(model, "backbone", module(seed=9).backbone),
        lambda model: setattr(model, "shifted", True),
        lambda model: setattr(model.backbone.norm, "eps", 100.0),
    ],
    ids=["dtype", "a weight", "backbone", "attribute", "attribute of a part"],
)
def test_what_lies_elsewhere_or_is_another_is_recorded_anew(monkeypatch, recording, change):
    model, sampler = module(), Sampler()
    before = sample(model, sampler, batch())
    change(model)
    expected = unrecorded(monkeypatch, lambda: sample(model, sampler, batch()))
    assert alike(sample(model, sampler, batch()), expected) and len(recording) == 2
    if model.dtype == torch.float32:
        assert not alike(before, expected)


def test_the_mode_of_a_model_is_part_of_what_was_recorded(recording):
    """A canvas may be sampled from with dropout on."""
    model, sampler = module(dropout=0.5), Sampler()
    xt = torch.full((3, LENGTH), MASK)
    model.eval()
    sampler(Canvas(model), xt, MASK)
    model.train()
    assert not torch.equal(sampler(Canvas(model), xt, MASK).tokens, sampler(Canvas(model), xt, MASK).tokens)
    assert len(recording) == 2


def test_in_inference_mode_and_out_of_it(monkeypatch, recording):
    """A Trainer validates in it; what was recorded in one is replayed in the other."""
    model, sampler = module(), Sampler(temperature=1.0)
    for seed, inference in enumerate([True, False, True]):
        with torch.inference_mode(inference):
            given_ = blank(seed, padded=True)
            expected = unrecorded(monkeypatch, lambda: sample(model, sampler, given_))  # noqa: B023
            assert alike(sample(model, sampler, given_), expected)
            assert len(recording) == 1


def test_what_is_recorded_ends_with_the_model_and_is_not_copied(recording):
    model = module()
    sample(model, Sampler(), batch())
    assert len(vars(model)["_passes"]) == 1
    again = [copy.deepcopy(model)]
    assert len(pickle.loads(pickle.dumps(vars(model)["_passes"]))) == 0
    assert all(len(vars(each)["_passes"]) == 0 for each in again)
    expected = sample(model, Sampler(), batch())
    assert all(alike(sample(each, Sampler(), batch()), expected) for each in again)
    ends = weakref.ref(model)
    recording.clear()
    del model, again
    gc.collect()
    assert ends() is None


def test_a_shallow_copy_is_another_model(monkeypatch, recording):
    """It has the same weights, and what was recorded; but its Python may say something else."""
    model = module()
    sample(model, Sampler(), batch())
    other = copy.copy(model)
    other.shifted = True
    expected = unrecorded(monkeypatch, lambda: sample(other, Sampler(), batch()))
    assert alike(sample(other, Sampler(), batch()), expected)


def test_there_is_an_end_to_what_is_kept(monkeypatch, recording):
    monkeypatch.setattr(Passes, "MOST", 3)
    model = module()
    for rows in range(1, 9):
        sample(model, Sampler(), batch(rows=rows))
        assert len(vars(model)["_passes"]) <= 3


def test_large_vocabularies_have_a_graph_for_each_number_of_positions(monkeypatch, recording):
    """The output layer runs on a multiple of so many positions, all in one memory pool."""
    numbers, pools = [], []
    monkeypatch.setattr(any_order, "POSITIONS", 8)
    monkeypatch.setattr(recorded, "memory_pool", lambda device: "pool")
    graph = recorded.Graph
    monkeypatch.setattr(recorded, "Graph", lambda *given: pools.append(given[-1]) or graph(*given))
    predict = Canvas.predict_masked
    monkeypatch.setattr(
        Canvas, "predict_masked", lambda *given, number: numbers.append(number) or predict(*given, number=number)
    )
    model = module(large=True)
    everything = (batch(rows=4)[0], torch.zeros(4, LENGTH, dtype=torch.bool), None)
    for _ in range(4):
        found = sample(model, Sampler(), everything)
    assert (found.tokens != MASK).all()
    assert set(numbers) == {48, 40, 32, 24, 16, 8}  # of 48, 44, 40, ... masked positions
    assert len(recording) == 6 and set(pools) == {"pool"}
    numbers.clear()
    sample(model, Sampler(), everything)
    assert numbers == []  # replayed


# --- how often the host looks at values ---


class Looks(TorchDispatchMode):
    """Counts looks at values, and lists that are made of tensors."""

    def __init__(self, patch) -> None:
        super().__init__()
        self.count = 0
        tolist = Tensor.tolist
        patch.setattr(Tensor, "tolist", lambda tensor: [setattr(self, "count", self.count + 1), tolist(tensor)][1])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        try:
            graphs.refuse_look(func, args)
        except graphs.Look:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("large", [False, True], ids=["logits", "large vocabulary"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("options", "told"),
    [({}, True), ({"num_steps": 7}, True), ({"temperature": 1.0, "top_p": 0.5}, True),
     ({"threshold": 0.999}, False), ({"end_at_eos": True}, False)],
)  # fmt: skip
def test_the_host_looks_at_the_start_and_every_eighth_pass(monkeypatch, recording, options, told, padded, large):
    """Not even that where the pace says how many passes there are."""
    model, sampler = module(large).eval(), Sampler(**options)
    x0, _, real = batch(padded=padded)
    xt = torch.full_like(x0, MASK)
    for _ in range(2):
        canvas, generator = Canvas(model, real), torch.Generator().manual_seed(0)
        with monkeypatch.context() as patch, Looks(patch) as looks:
            found = sampler(canvas, xt, MASK, generator, EOS)
        assert looks.count <= (1 if told else 1 + int(found.nfe.max()) // 8 + (int(found.nfe.max()) < 8))
    assert len(recording) >= 1


def test_a_model_that_is_not_recorded_is_looked_at_as_seldom(monkeypatch, recording):
    """A function of one's own; passes after the end change nothing and are not counted."""
    logits = 50 * torch.nn.functional.one_hot(torch.zeros(2, 40, dtype=torch.long), V).float()
    logits[:, 20:] = 0.0
    calls = []
    with monkeypatch.context() as patch, Looks(patch) as looks:
        sampled = Sampler(threshold=0.9)(lambda xt: calls.append(1) or logits, torch.full((2, 40), MASK), MASK)
    assert sampled.nfe.tolist() == [21, 21] and sampled.reveal_step.amax() == 20 and not recording
    assert looks.count == 3 and len(calls) == 21  # from what was left after 16 passes the end is known
    logits[:, 20:] = logits[:, :20]
    calls.clear()
    sampled = Sampler(threshold=0.9)(lambda xt: calls.append(1) or logits, torch.full((2, 40), MASK), MASK)
    assert sampled.nfe.tolist() == [1, 1] and sampled.reveal_step.amax() == 0 and len(calls) == 8


# --- what cannot be recorded ---


class Peeking(MaskedDiffusion):
    """A model of one's own that looks at a value."""

    def forward(self, xt: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        logits = super().forward(xt, attention_mask)
        return logits * 2 if (xt == MASK).sum().item() > 9 else logits


def by_a_look(logits: Tensor, xt: Tensor) -> Tensor:
    return logits.amax(-1) * (2 if xt.float().mean() > 3 else 1)


def by_a_draw(logits: Tensor, xt: Tensor) -> Tensor:
    """Looks at nothing; that it cannot be recorded is seen when it is."""
    scores = torch.rand(xt.shape)
    if isinstance(_get_current_dispatch_mode(), Recorder):
        raise RuntimeError("operation not permitted when stream is capturing")
    return scores


CANNOT = {
    "model": (Peeking, Confidence(), "Peeking"),
    "policy": (MaskedDiffusion, by_a_look, "by_a_look"),
    "recording": (MaskedDiffusion, by_a_draw, "by_a_draw"),
}


@pytest.mark.parametrize(("build", "policy", "named"), CANNOT.values(), ids=CANNOT)
@pytest.mark.parametrize("own", [False, True], ids=["no generator", "generator"])
def test_what_looks_at_values_is_sampled_from_as_it_is(monkeypatch, recording, build, policy, named, own):
    """The same sample, and a warning that names it, once."""
    model, sampler = module(build=build), Sampler(policy, temperature=1.0)
    x0, prompt, _ = blank()
    said = []
    for seed in range(3):
        drawn = []
        for take in (lambda f: unrecorded(monkeypatch, f), lambda f: f()):
            torch.manual_seed(seed)
            generator = torch.Generator().manual_seed(seed) if own else None
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                drawn.append(take(lambda: model.sample(x0, prompt, sampler, generator)))  # noqa: B023
            said += [str(warning.message) for warning in warned]
        assert alike(*drawn)
    assert len(said) == 1 and named in said[0] and "expected" in said[0] and "got" in said[0]
    assert len(recording) == (policy is by_a_draw)  # looks are found before anything is recorded


def test_an_error_of_the_model_is_raised_as_it_is(recording):
    model = module()

    def fails(logits, xt):
        raise RuntimeError("no such thing")

    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="no such thing"):
        warnings.simplefilter("error")
        sample(model, Sampler(fails), batch())
    with pytest.raises(ValueError, match="NaN"):
        sample(model, Sampler(lambda logits, xt: logits.amax(-1) * float("nan")), batch())
    assert not recording


class Knows(MaskedDiffusion):
    def select(self, rows):
        return self


class Own(Sampler):
    pass


@pytest.mark.parametrize(
    ("build", "sampler", "change"),
    [
        (Knows, Sampler(), lambda model: None),
        (MaskedDiffusion, Own(), lambda model: None),
        (MaskedDiffusion, Sampler(), lambda model: model.backbone.norm.register_forward_hook(lambda *given: None)),
        (MaskedDiffusion, Sampler(), lambda model: model.backbone.register_forward_pre_hook(lambda *given: None)),
        (
            MaskedDiffusion,
            Sampler(),
            lambda model: setattr(
                model.backbone.norm, "weight", type("Shard", (nn.Parameter,), {})(model.backbone.norm.weight.data)
            ),
        ),
    ],
    ids=["rows", "subclass", "hook", "pre-hook", "shards"],
)
def test_what_a_replay_would_leave_out_is_not_recorded(recording, build, sampler, change):
    """The model knows of its rows, the sampler is one's own, hooks are run, weights are gathered."""
    model = module(build=build)
    change(model)
    for seed in range(2):
        assert (sample(model, sampler, batch(seed)).tokens != MASK).all()
    assert not recording


def test_compiled_layers_are_still_compiled(monkeypatch, recording):
    """Looks are looked for in a pass that is not compiled, which must not keep later ones from being."""
    compiled = []
    model = module()
    for layer in model.backbone.layers:
        layer.compile(backend=lambda graph, inputs: compiled.append(1) or graph)
    expected = unrecorded(monkeypatch, lambda: sample(module(), Sampler(), batch()))
    assert torch.equal(sample(model, Sampler(), batch()).tokens, expected.tokens)
    assert compiled and len(recording) == 1


def test_a_prediction_that_does_as_well_as_logits_is_no_bound(recording):
    """A policy that needs logits of all positions has one graph, whatever is masked."""
    model = module(large=True)
    assert Canvas(model).per_position and isinstance(
        Canvas(model).predict_masked(
            torch.full((1, 4), MASK), torch.ones(1, 4, dtype=torch.bool), ("log_prob",), 0.0, 1.0, None, number=4
        ),
        Prediction,
    )
    sampler = Sampler(partial(lambda logits, xt: logits[..., 0]))
    for seed in range(3):
        sample(model, sampler, blank(seed))
    assert len(recording) == 1

"""The output layer in chunks, against the plain formula, which is written here only."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from puma_lightning.chain.policies import Confidence, Entropy, Margin
from puma_lightning.graphs import NoLooks
from puma_lightning.output import head
from puma_lightning.output.head import (
    ALIGNMENT,
    CHUNK_BYTES,
    linear_cross_entropy,
    predict,
    predict_where,
    rows_per_chunk,
)
from puma_lightning.output.prediction import exclude_token

STATISTICS = ("token", "log_prob", "margin", "entropy")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
MASK = 3

few = settings(max_examples=40, deadline=None)
sizes = {"positions": st.integers(0, 9), "vocab": st.integers(5, 40), "width": st.integers(1, 6)}
devices = pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
sharpness = st.sampled_from([0.3, 1.0, 5.0])


@pytest.fixture(scope="module", autouse=True, params=["as on a CPU", "as on a GPU"])
def passes(request):
    """Take the passes over the logits that a CPU takes, and those that a GPU takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "softmax_overwrites", lambda device: request.param == "as on a CPU")
        yield


class Problem:
    """Hidden states, a head and what to predict."""

    def __init__(self, seed=0, positions=7, vocab=19, width=5, sharpness=1.0, dtype=torch.float32, device="cpu"):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

        self.hidden = (sharpness * normal(positions, width)).requires_grad_()
        self.weight = normal(vocab, width).requires_grad_()
        self.bias = normal(vocab).requires_grad_()
        target = torch.randint(vocab - 1, (positions,), generator=generator)
        self.target = (target + (target >= MASK)).to(device)
        self.position_weights = torch.rand(positions, generator=generator, dtype=torch.float64).to(device, dtype)

    def inputs(self, with_bias=True):
        return (self.hidden, self.weight, self.bias) if with_bias else (self.hidden, self.weight)

    def ours(self, with_bias=True, **options):
        bias = self.bias if with_bias else None
        return linear_cross_entropy(self.hidden, self.weight, self.target, self.position_weights, bias, MASK, **options)

    def logits(self, with_bias=True):
        return exclude_token(F.linear(self.hidden, self.weight, self.bias if with_bias else None), MASK)

    def plain(self, with_bias=True):
        """Loss, nll and statistics by the plain formula, from logits of all positions."""
        logits = self.logits(with_bias)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        nll = F.cross_entropy(logits, self.target, reduction="none")
        log_p = logits.detach().log_softmax(-1)
        top = log_p.topk(2, -1)
        probability = top.values.exp()
        statistics = {
            "token": top.indices[:, 0],
            "log_prob": top.values[:, 0],
            "margin": probability[:, 0] - probability[:, 1],
            "entropy": torch.special.entr(log_p.exp()).sum(-1),
        }
        return (self.position_weights.to(nll.dtype) * nll).sum(), nll.detach(), statistics


@few
@given(st.integers(0, 2**31 - 1), st.booleans(), sharpness, st.fixed_dictionaries(sizes))
def test_loss_gradients_and_statistics_are_those_of_the_plain_formula(seed, with_bias, sharpness, size):
    """In float32 to 1e-5; also for no positions at all."""
    problem = Problem(seed, sharpness=sharpness, **size)
    loss, prediction = problem.ours(with_bias, statistics=STATISTICS, chunk_rows=3)
    expected_loss, expected_nll, expected = problem.plain(with_bias)
    torch.testing.assert_close(loss, expected_loss, **CLOSE)
    torch.testing.assert_close(prediction.nll, expected_nll, **CLOSE)
    for name in STATISTICS:
        torch.testing.assert_close(getattr(prediction, name), expected[name], **CLOSE)
    inputs = problem.inputs(with_bias)
    gradients = torch.autograd.grad(loss, inputs)
    for gradient, expected_gradient in zip(gradients, torch.autograd.grad(expected_loss, inputs), strict=True):
        torch.testing.assert_close(gradient, expected_gradient, **CLOSE)


@pytest.mark.parametrize("with_bias", [True, False])
def test_gradcheck(with_bias):
    """In float64, and with a factor on the loss as gradient accumulation and a GradScaler put it there."""
    problem = Problem(dtype=torch.float64)
    inputs = problem.inputs(with_bias)

    def loss(hidden, weight, bias=None):
        return (
            3
            * linear_cross_entropy(hidden, weight, problem.target, problem.position_weights, bias, MASK, chunk_rows=3)[
                0
            ]
        )

    assert torch.autograd.gradcheck(loss, inputs)


def test_a_gradient_is_made_for_what_wants_one_only():
    """Frozen heads, frozen bodies."""
    for chosen in range(3):
        problem = Problem(positions=2, width=40)
        for i, tensor in enumerate(problem.inputs()):
            tensor.requires_grad_(i == chosen)
        (expected,) = torch.autograd.grad(problem.plain()[0], problem.inputs()[chosen])
        with Largest() as largest:
            problem.ours()[0].backward()
        assert (largest.elements >= problem.weight.numel()) == (chosen == 1)
        for i, tensor in enumerate(problem.inputs()):
            assert (tensor.grad is not None) == (i == chosen)
        torch.testing.assert_close(problem.inputs()[chosen].grad, expected, **CLOSE)


def test_backward_twice_gives_the_same_gradient_twice():
    """With retain_graph=True."""
    problem = Problem()
    loss, _ = problem.ours()
    first = torch.autograd.grad(2 * loss, problem.weight, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(2 * loss, problem.weight)[0], first)


def test_a_tied_head_gets_both_gradients():
    """Of the embedding and of the output layer."""
    embedding = torch.nn.Parameter(Problem().weight.detach())
    tokens = torch.tensor([0, 5, 5, 2])
    target, weights = torch.tensor([1, 5, 0, 2]), torch.full((4,), 0.25)
    loss, _ = linear_cross_entropy(F.embedding(tokens, embedding), embedding, target, weights, chunk_rows=2)
    plain = F.cross_entropy(F.embedding(tokens, embedding) @ embedding.t(), target)
    (gradient,), (expected,) = (torch.autograd.grad(value, embedding) for value in (loss, plain))
    torch.testing.assert_close(gradient, expected, **CLOSE)


@few
@given(st.integers(0, 2**31 - 1), st.integers(1, 12), st.fixed_dictionaries(sizes))
def test_chunks_change_nothing_but_rounding(seed, chunk_rows, size):
    """Loss, gradients, statistics and draws."""
    problem = Problem(seed, **size)

    def run(rows):
        loss, prediction = problem.ours(statistics=STATISTICS, chunk_rows=rows)
        drawn = predict(
            problem.hidden, problem.weight, mask_id=MASK, temperature=1.3, chunk_rows=rows,
            generator=torch.Generator().manual_seed(seed),
        ).drawn  # fmt: skip
        gradients = torch.autograd.grad(loss, problem.inputs())
        return [loss, *gradients, prediction.nll, *(getattr(prediction, name) for name in STATISTICS), drawn]

    for ours, whole in zip(run(chunk_rows), run(None), strict=True):
        torch.testing.assert_close(ours, whole, **CLOSE)


@few
@given(st.integers(0, 2**31 - 1))
def test_statistics_give_the_order_of_the_policies(seed):
    """What Confidence, Margin and Entropy make of the logits, position by position."""
    problem = Problem(seed, positions=30, sharpness=0.5, dtype=torch.float64)
    found = predict(problem.hidden, problem.weight, problem.bias, MASK, statistics=STATISTICS, chunk_rows=4)
    logits, xt = problem.logits().detach()[None], torch.full((1, 30), MASK)
    scores = {Confidence(): found.log_prob, Margin(): found.margin, Entropy(): -found.entropy}
    for policy, score in scores.items():
        # The policies work in float32: neighbours closer than that may swap.
        expected = policy(logits, xt)[0].double()
        apart = expected[score.argsort(descending=True)].diff()
        assert (apart <= 1e-6).all(), policy


def test_only_what_was_asked_for_is_returned():
    """And nothing of it has a gradient but the loss."""
    problem = Problem()
    loss, prediction = problem.ours(statistics=["margin"])
    assert loss.requires_grad
    assert not prediction.nll.requires_grad and not prediction.margin.requires_grad
    assert prediction.token is prediction.log_prob is prediction.entropy is prediction.drawn is None
    found = predict(problem.hidden, problem.weight, statistics=["entropy"])
    assert found.nll is None and not found.entropy.requires_grad


def test_without_gradient_the_loss_is_the_same():
    """In validation."""
    problem = Problem()
    with torch.no_grad():
        loss, prediction = problem.ours(statistics=STATISTICS)
    expected, with_gradient = problem.ours(statistics=STATISTICS)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(vars(prediction), vars(with_gradient))


def test_no_positions_give_zero_and_zero_gradients():
    """A rank without masked positions still takes part in DDP's reduction."""
    problem = Problem(positions=0)
    loss, prediction = problem.ours(statistics=STATISTICS)
    loss.backward()
    assert loss == 0
    assert prediction.token.shape == (0,) and prediction.token.dtype == torch.long
    for tensor in problem.inputs():
        assert tensor.grad.shape == tensor.shape and not tensor.grad.any()


@few
@given(st.integers(0, 2**31 - 1), st.sampled_from([0.0, 1e-3, 1.0, 30.0]), st.sampled_from([0.1, 0.9, 1.0]))
def test_the_mask_token_is_never_predicted(seed, temperature, top_p):
    """However large its logit would be; neither has it a gradient."""
    problem = Problem(seed)
    with torch.no_grad():
        problem.bias[MASK] = 1e4
    loss, prediction = problem.ours(statistics=["token"])
    loss.backward()
    assert loss.isfinite() and (prediction.token != MASK).all()
    assert not problem.weight.grad[MASK].any() and problem.bias.grad[MASK] == 0
    drawn = predict(
        problem.hidden, problem.weight, problem.bias, MASK, temperature=temperature, top_p=top_p,
        generator=torch.Generator().manual_seed(seed),
    ).drawn  # fmt: skip
    assert (drawn != MASK).all() and ((drawn >= 0) & (drawn < 19)).all()


def test_at_temperature_0_and_at_a_tiny_one_the_most_likely_token_is_drawn():
    """And with a tiny top_p. Logits in the thousands are no infinities at any of them."""
    problem = Problem(sharpness=3e3)
    most_likely = problem.logits().argmax(-1)
    for options in ({"temperature": 0.0}, {"temperature": 1e-36}, {"temperature": 1.0, "top_p": 1e-6}):
        found = predict(problem.hidden, problem.weight, problem.bias, MASK, **options)
        assert torch.equal(found.drawn, most_likely), options


@pytest.mark.parametrize("mask_id", [0, 18])
@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_ends_of_the_unit_interval_draw_tokens_with_a_probability(monkeypatch, uniform, mask_id):
    """The first or the last of the vocabulary has none."""
    problem = Problem(positions=50)
    monkeypatch.setattr(torch, "rand", lambda size, **_: torch.full((size,), uniform))
    found = predict(problem.hidden, problem.weight, mask_id=mask_id, temperature=1.0)
    others = [token for token in range(19) if token != mask_id]
    assert (found.drawn == (others[0] if uniform == 0 else others[-1])).float().mean() > 0.9
    assert (found.drawn != mask_id).all()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (2.0, 0.8)])
def test_draws_follow_the_tempered_and_truncated_distribution(temperature, top_p):
    """Shares of 40,000 draws within 5 standard errors."""
    count = 40_000
    problem = Problem(positions=1, vocab=9)
    found = predict(
        problem.hidden.expand(count, -1), problem.weight, problem.bias, MASK, statistics=["log_prob"],
        temperature=temperature, top_p=top_p, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    probability = (problem.logits()[0].detach() / temperature).softmax(-1)
    ordered, order = probability.sort(descending=True)
    kept = ordered.cumsum(0) - ordered < top_p
    probability[order[~kept]] = 0
    probability /= probability.sum()
    share = found.drawn.bincount(minlength=9) / count
    assert ((share - probability).abs() <= 5 * (probability / count).sqrt()).all()
    assert not share[probability == 0].any()
    # The statistics are those of temperature 1.
    torch.testing.assert_close(found.log_prob[0], problem.plain()[2]["log_prob"][0], **CLOSE)


@devices
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_products_take_its_dtype_and_the_rest_is_float32(dtype, with_bias, device):
    """Parameters stay float32; results are as near to the exact ones as the plain formula's under autocast."""
    problem = Problem(positions=64, vocab=200, width=32, sharpness=0.3, device=device)
    exact_loss, exact_nll, exact = problem.plain(with_bias)
    exact_gradients = torch.autograd.grad(exact_loss, problem.inputs(with_bias))
    products = Products()
    with torch.autocast(device, dtype), products:
        loss, prediction = problem.ours(with_bias, statistics=STATISTICS, chunk_rows=20)
    assert dtype in products.dtypes
    gradients = torch.autograd.grad(loss, problem.inputs(with_bias))
    with torch.autocast(device, dtype):
        plain_loss, plain_nll, plain = problem.plain(with_bias)
    plain_gradients = torch.autograd.grad(plain_loss, problem.inputs(with_bias))

    def far(values, exact):
        return max((value.double() - e.double()).norm() / e.double().norm() for value, e in zip(values, exact))  # noqa: B905

    assert loss.dtype == prediction.nll.dtype == prediction.entropy.dtype == torch.float32
    assert far([prediction.nll], [exact_nll]) <= 1.5 * far([plain_nll], [exact_nll])
    for name in ("log_prob", "margin", "entropy"):
        assert far([getattr(prediction, name)], [exact[name]]) <= 1.5 * far([plain[name]], [exact[name]]), name
    for gradient, plain_gradient, exact_gradient in zip(gradients, plain_gradients, exact_gradients, strict=True):
        assert gradient.dtype == torch.float32
        assert far([gradient], [exact_gradient]) <= 1.5 * far([plain_gradient], [exact_gradient])


@devices
def test_small_gradients_survive_float16(device):
    """A probability of 1e-5 times a weight of 1e-4 is 0 in float16; a scaler on the loss comes too late."""
    hidden = torch.full((4, 8), 0.1, device=device).half().requires_grad_()
    weight = torch.zeros(100_000, 8, device=device, requires_grad=True)
    target, weights = torch.arange(4, device=device), torch.full((4,), 1e-4, device=device)
    with torch.autocast(device, torch.float16):
        loss, _ = linear_cross_entropy(hidden, weight, target, weights)
    (2.0**16 * loss).backward()
    expected = 2.0**16 * 4 * 1e-4 * float(hidden.detach()[0, 0]) / 100_000
    torch.testing.assert_close(weight.grad[4:], torch.full((99_996, 8), expected, device=device), rtol=1e-2, atol=0)


@devices
def test_large_sums_survive_float16(device):
    """300 positions with the same target and large hidden states."""
    hidden = torch.full((300, 4), 20.0, device=device)
    weight = torch.zeros(50, 4, device=device, requires_grad=True)
    target = torch.zeros(300, dtype=torch.long, device=device)
    with torch.autocast(device, torch.float16):
        loss, _ = linear_cross_entropy(hidden, weight, target, torch.ones(300, device=device))
    loss.backward()
    torch.testing.assert_close(weight.grad[0].cpu(), torch.full((4,), -300 * 20 * 49 / 50), rtol=1e-2, atol=0)


def test_bfloat16_parameters_get_bfloat16_gradients():
    """As with precision bf16-true; sums over chunks are float32 until then."""
    problem = Problem(dtype=torch.bfloat16)
    loss, _ = problem.ours(chunk_rows=2)
    loss.backward()
    assert loss.dtype == torch.float32
    for tensor in problem.inputs():
        assert tensor.grad.dtype == torch.bfloat16
    expected = torch.autograd.grad(problem.plain()[0], problem.weight)[0]
    torch.testing.assert_close(problem.weight.grad, expected, atol=2e-2, rtol=5e-2)


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation makes, views apart."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        old = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, torch.Tensor)}
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in old:
                self.elements = max(self.elements, tensor.numel())
        return out


class Products(TorchDispatchMode):
    """Records the dtypes that matrices are multiplied in."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket is torch.ops.aten.mm:
            self.dtypes.add(args[0].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_larger_than_a_chunk_of_logits(dtype):
    """Neither in training nor in evaluation nor in sampling; the weight apart."""
    positions, vocab, rows = 60, 331, 4
    problem = Problem(positions=positions, vocab=vocab, width=2)
    chunk = rows * (vocab + -vocab % ALIGNMENT)
    with Largest() as largest, torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        problem.ours(statistics=STATISTICS, chunk_rows=rows)[0].backward()
    assert vocab * 2 < largest.elements == chunk < positions * vocab
    with Largest() as largest:
        predict(
            problem.hidden, problem.weight, problem.bias, MASK, problem.target, STATISTICS, temperature=0.7, top_p=0.9,
            chunk_rows=rows,
        )  # fmt: skip
    assert largest.elements == chunk


@given(st.integers(0, 10**6), st.integers(1, 300_000), st.sampled_from(["cpu", "cuda"]))
def test_a_chunk_keeps_to_its_memory(positions, vocab, device):
    """Its logits fit into CHUNK_BYTES unless a single row does not, and the last chunk is about as large as others."""
    rows = rows_per_chunk(positions, vocab, torch.device(device))
    assert rows >= 1
    assert rows == 1 or 4 * rows * (vocab + -vocab % ALIGNMENT) <= CHUNK_BYTES[device]
    chunks = math.ceil(positions / rows)
    if rows > 1 and chunks > 1:
        # No fewer chunks would do.
        assert 4 * math.ceil(positions / (chunks - 1)) * (vocab + -vocab % ALIGNMENT) > CHUNK_BYTES[device]


def test_mistakes_are_named():
    """Shapes and statistics."""
    problem = Problem()
    hidden, weight, target, weights = problem.hidden, problem.weight, problem.target, problem.position_weights
    with pytest.raises(ValueError, match=r"hidden states \(N, D\)"):
        linear_cross_entropy(hidden[None], weight, target, weights)
    with pytest.raises(ValueError, match=r"target: expected \(N,\) = \(7,\), got \(3,\)"):
        linear_cross_entropy(hidden, weight, target[:3], weights)
    with pytest.raises(ValueError, match=r"position_weights: expected \(N,\)"):
        linear_cross_entropy(hidden, weight, target, weights[:, None])
    with pytest.raises(ValueError, match=r"bias: expected \(V,\) = \(19,\)"):
        linear_cross_entropy(hidden, weight, target, weights, bias=problem.bias[:4])
    with pytest.raises(ValueError, match="got confidence"):
        predict(hidden, weight, statistics=["confidence"])


def test_softmax_may_overwrite_its_logits():
    logits = 9 * torch.randn(7, 5003, generator=torch.Generator().manual_seed(0))
    logits[:, MASK] = float("-inf")
    expected = logits.softmax(-1)
    torch.testing.assert_close(torch.softmax(logits, -1, out=logits), expected, **CLOSE)
    assert (logits[:, MASK] == 0).all()


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (0.8, 1.0), (0.8, 0.7)])
@pytest.mark.parametrize("more", [0, 1, 5])
def test_with_a_bound_on_their_number_positions_are_predicted_without_a_look(temperature, top_p, more):
    """As without it; what stands at other positions means nothing."""
    where = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    states = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))
    layer = torch.nn.Linear(4, 11, bias=False)
    wanted = (where, states, layer, MASK, ("log_prob", "margin"), temperature, top_p)
    without, number = predict_where(*wanted, torch.Generator().manual_seed(2)), int(where.sum()) + more
    with NoLooks():
        found = predict_where(*wanted, torch.Generator().manual_seed(2), number=number)
    for name in ("log_prob", "margin", "drawn"):
        torch.testing.assert_close(getattr(found, name)[where], getattr(without, name)[where])

"""The paper's propositions (arXiv 2602.10314, section 3), exactly: all states of small chains with their probabilities.

Data are an arbitrary table p(x0) over all sequences of a tiny vocabulary. The chains run the package's own code on
every state at once, and what that code draws at random (targets, ties) is enumerated too. Nothing is sampled, so
distributions agree to rounding or they don't.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from puma_lightning.chain.chains import Chains
from puma_lightning.chain.policies import Confidence, Entropy, LeftToRight, Margin, RandomOrder
from puma_lightning.chain.reveal import reveal
from puma_lightning.chain.teacher import ProgressiveUnmasking
from puma_lightning.output.losses import masked_cross_entropy

LENGTH = 3
EXACT = 1e-12
POLICIES = [Confidence(), Margin(), Entropy(), RandomOrder(), LeftToRight()]
policies = pytest.mark.parametrize("policy", POLICIES, ids=repr)
thresholds = pytest.mark.parametrize("threshold", [None, 0.6], ids=["top-k", "threshold"])
stages = pytest.mark.parametrize("num_stages", [1, 2, 3])
prompts = pytest.mark.parametrize("given", [0, 1], ids=["no prompt", "prompt"])


class Enumerated:
    """In place of ``torch.rand``: all that it can lead to, once for each copy of every state.

    Targets change at multiples of K / 2A only, which are multiples of 1/12 here. Ties are broken by an argsort of the
    numbers of a row, so that all permutations stand for all rows.
    """

    def __init__(self) -> None:
        targets = (torch.arange(12) + 0.5) / 12
        orders = torch.tensor(list(itertools.permutations(range(LENGTH))), dtype=torch.float) / LENGTH
        self.targets = targets.repeat_interleave(len(orders))
        self.orders = orders.repeat(len(targets), 1)
        self.copies = len(self.targets)

    def __call__(self, shape, **_) -> Tensor:
        values = self.targets if len(shape) == 1 else self.orders
        return values.repeat(shape[0] // self.copies, *[1] * (values.dim() - 1))


@pytest.fixture(autouse=True)
def enumerated(monkeypatch) -> Enumerated:
    every = Enumerated()
    monkeypatch.setattr(torch, "rand", every)
    return every


@dataclass
class Toy:
    """All sequences of V tokens, their probabilities, and all partly masked ones; V is the mask token."""

    p: Tensor  # (V ** LENGTH,)
    vocab_size: int
    given: int  # positions of the prompt

    def __post_init__(self) -> None:
        every = range(self.vocab_size)
        self.x0 = torch.tensor(list(itertools.product(every, repeat=LENGTH)))
        self.xt = torch.tensor(list(itertools.product(range(self.vocab_size + 1), repeat=LENGTH)))
        self.mask_id = self.vocab_size
        same = (self.xt[:, None] == self.x0) | (self.xt[:, None] == self.mask_id)
        joint = same.all(2) * self.p
        # Of what cannot be met anything may be believed.
        self.posterior = torch.where(joint.sum(1, keepdim=True) > 0, joint, same.all(2).double())
        self.posterior /= self.posterior.sum(1, keepdim=True)  # p(x0 | xt): (states, sequences)
        self.conditionals = torch.einsum(
            "tx,xiv->tiv", self.posterior, torch.nn.functional.one_hot(self.x0, self.vocab_size).double()
        )  # p(x0_i | xt): (states, L, V)

    def number(self, rows: Tensor) -> Tensor:
        """Which of ``xt`` the rows are."""
        return rows @ (self.vocab_size + 1) ** torch.arange(LENGTH - 1, -1, -1)

    def true_logits(self) -> Tensor:
        return self.logits(self.conditionals.log())

    def logits(self, table: Tensor) -> Tensor:
        """(states, L, V + 1), the mask token at -inf."""
        return torch.nn.functional.pad(table, (0, 1), value=float("-inf"))


def toy(seed: int = 0, vocab_size: int = 2, given: int = 0, independent: bool = False) -> Toy:
    """An arbitrary distribution with correlations and some sequences that never occur, or one without correlations."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.empty(vocab_size**LENGTH, dtype=torch.double).exponential_(generator=generator) ** 2
    if independent:
        each = torch.empty(LENGTH, vocab_size, dtype=torch.double).exponential_(generator=generator)
        weights = torch.einsum("a,b,c->abc", *each).flatten()
    elif vocab_size > 2:
        weights[torch.randperm(len(weights), generator=generator)[:7]] = 0
    return Toy(weights / weights.sum(), vocab_size, given)


Predict = Callable[[Tensor], Tensor]  # the number of xt, (N,), to logits, (N, L, V + 1)


class Chain:
    """The exact distribution over (x0, xt, stage, done) of a chain.

    Args:
        toy: The data.
        process: The forward process.
        logits: What the model says of every xt, (states, L, V + 1).
        enumerated: All random numbers.
        peeking: A policy of x0, (N, L) to scores (N, L), instead of the process's.
    """

    def __init__(
        self, toy: Toy, process: ProgressiveUnmasking, logits: Tensor, enumerated: Enumerated, peeking=None
    ) -> None:
        self.toy, self.process, self.table, self.every, self.peeking = toy, process, logits, enumerated, peeking
        self.num_stages = process.num_stages_at(0)
        self.sizes = (len(toy.x0), len(toy.xt), self.num_stages, 2)
        number = torch.arange(len(toy.x0))
        prompt = torch.zeros(len(number), LENGTH, dtype=torch.bool)
        prompt[:, : toy.given] = True
        x0, prompt, number, weight = map(self.copied, (toy.x0, prompt, number, toy.p))
        stage = torch.zeros(len(x0), dtype=torch.long)
        chains = process.start(Chains.fully_masked(x0, prompt, toy.mask_id, self.num_stages, stage))
        self.state = self.collected(number, chains.xt, stage, stage, weight)

    def copied(self, values: Tensor) -> Tensor:
        return values.repeat_interleave(self.every.copies, 0)

    def collected(self, x0: Tensor, xt: Tensor, stage: Tensor, done: Tensor, weight: Tensor) -> Tensor:
        """Probabilities (sequences, states, K, 2) of copies with weights."""
        place = ((x0 * self.sizes[1] + self.toy.number(xt)) * self.sizes[2] + stage) * 2 + done
        total = torch.zeros(torch.Size(self.sizes).numel(), dtype=torch.double)
        return total.index_add(0, place, weight / self.every.copies).view(self.sizes)

    def advance(self, draws: str = "teacher") -> None:
        """A step of all chains that are not done.

        Args:
            draws: Where revealed tokens come from: ``teacher`` takes those of x0; ``joint`` and ``independent`` draw
                x0 anew first, from p(x0 | xt) or from the product of the model's marginals.
        """
        state = self.state
        running = state[..., 0]
        if draws != "teacher":
            running = torch.einsum("tk,tx->xtk", running.sum(0), self.drawn(draws))
        x0, xt, stage = running.nonzero().T
        weight = running[x0, xt, stage]
        rows = [self.copied(value) for value in (x0, xt, stage, weight)]
        moved, done = self.move(*rows[:3])
        after = self.collected(rows[0], moved.xt, moved.stage, done.long(), rows[3])
        after[..., 1] += state[..., 1]
        self.state = after

    def drawn(self, draws: str) -> Tensor:
        """(states, sequences)."""
        if draws == "joint":
            return self.toy.posterior
        each = self.table.softmax(-1)[..., :-1]  # (states, L, V)
        masked = self.toy.xt == self.toy.mask_id
        fixed = torch.nn.functional.one_hot(self.toy.xt, self.toy.vocab_size + 1)[..., :-1].double()
        each = torch.where(masked[..., None], each, fixed)
        chosen = torch.stack([each[:, i, self.toy.x0[:, i]] for i in range(LENGTH)])
        return chosen.prod(0)

    def move(self, number: Tensor, xt: Tensor, stage: Tensor) -> tuple[Chains, Tensor]:
        x0, mask_id = self.toy.x0[number], self.toy.mask_id
        prompt = torch.zeros_like(x0, dtype=torch.bool)
        prompt[:, : self.toy.given] = True
        process = self.process
        if self.peeking is not None:
            process = ProgressiveUnmasking(self.num_stages, lambda *_: self.peeking(x0), process.unmasking.threshold)
        chains = replace(Chains.fully_masked(x0, prompt, mask_id, self.num_stages, stage), xt=self.toy.xt[xt])
        moved = process.advance(chains, self.table[xt], 0)
        return moved, moved.done

    def boards(self) -> Tensor:
        """The distribution of (xt, stage, done)."""
        return self.state.sum(0)

    def visits(self, longest: int = 60, models: Iterator[Tensor] | None = None) -> Tensor:
        """How often a chain is at (x0, xt) on average, all its steps together: (sequences, states).

        With ``models`` every step is taken by another one, as in a pool, where a chain waits while the model learns.
        """
        total = torch.zeros(self.sizes[:2], dtype=torch.double)
        for _ in range(longest):
            running = self.state[..., 0].sum(-1)
            if running.sum() < EXACT:
                break
            total += running
            if models is not None:
                self.table = next(models)
            self.advance()
        assert self.state[..., 0].sum() < EXACT, "chains are still going on"
        return total


def ever_other_models(data: Toy) -> Iterator[Tensor]:
    """What one model after another says of every xt, (states, L, V + 1)."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield data.logits(2 * torch.randn(*data.conditionals.shape, dtype=torch.double, generator=generator))


def largest_first(x0: Tensor) -> Tensor:
    """A policy that peeks: the positions of the largest tokens are revealed first."""
    return x0.float()


def distance(a: Tensor, b: Tensor) -> float:
    """Total variation."""
    return float((a - b).abs().sum() / 2)


def agreement(
    data: Toy, process, logits, enumerated, draws: str, peeking=None, steps: int = 6, models=None
) -> list[float]:
    """Of the teacher's chain and a student's, at every step."""
    teacher, student = (Chain(data, process, logits, enumerated, peeking) for _ in "ab")
    found = [distance(teacher.boards(), student.boards())]
    for _ in range(steps):
        if models is not None:
            teacher.table = student.table = next(models)
        teacher.advance()
        student.advance(draws)
        found.append(distance(teacher.boards(), student.boards()))
    return found


# --- The chain visits what idealised inference visits ---


@policies
@thresholds
@prompts
@stages
@pytest.mark.parametrize(("seed", "vocab_size"), [(0, 2), (1, 3)])
def test_teacher_and_idealised_inference_visit_the_same_boards(
    policy, threshold, given, num_stages, seed, vocab_size, enumerated
):
    """With the true posterior, and tokens revealed together drawn together, at every step."""
    data = toy(seed, vocab_size, given)
    process = ProgressiveUnmasking(num_stages, policy, threshold)
    assert max(agreement(data, process, data.true_logits(), enumerated, "joint")) < EXACT


@policies
@pytest.mark.parametrize("vocab_size", [2, 3])
def test_drawn_one_by_one_tokens_need_not_be_drawn_together(policy, vocab_size, enumerated):
    """One position a step, drawn from the model's own prediction: plain sampling visits what the teacher visits."""
    data = toy(2, vocab_size)
    chain = Chain(data, ProgressiveUnmasking(1, policy), data.true_logits(), enumerated)

    def one_step(weights: Tensor) -> Tensor:
        """Weights of (x0, xt) to those of the boards one position further, (sequences, states)."""
        x0, xt = weights.nonzero().T
        rows = [chain.copied(v) for v in (x0, xt, weights[x0, xt])]
        boards, scores = data.xt[rows[1]], policy(chain.table[rows[1]], data.xt[rows[1]])
        after = reveal(boards, data.x0[rows[0]], scores, torch.ones(len(boards), dtype=torch.long), data.mask_id)
        return chain.collected(rows[0], after, 0 * rows[0], 0 * rows[0], rows[2]).sum((2, 3))

    blank = data.number(torch.full((1, LENGTH), data.mask_id))
    teacher = torch.zeros(len(data.x0), len(data.xt), dtype=torch.double).index_add(1, blank, data.p[:, None])
    student = teacher
    for _ in range(LENGTH):
        teacher = one_step(teacher)
        student = one_step(student.sum(0)[:, None].mul(chain.drawn("independent")).T)
        assert distance(teacher.sum(0), student.sum(0)) < EXACT
    assert teacher.sum() == pytest.approx(1)


@policies
def test_the_price_of_parallel_decoding_is_what_independent_draws_cost(policy, enumerated):
    """Several positions a step, each drawn on its own: the boards differ, unless the data have no correlations."""
    process = ProgressiveUnmasking(2, policy)
    correlated, independent = toy(3, 3), toy(3, 3, independent=True)
    price = max(agreement(correlated, process, correlated.true_logits(), enumerated, "independent"))
    assert price > 0.02
    assert max(agreement(independent, process, independent.true_logits(), enumerated, "independent")) < EXACT


@thresholds
def test_a_policy_that_peeks_visits_other_boards(threshold, enumerated):
    """The control: scores of x0 instead of the prediction. It takes two reveals, of which the second knows too much."""
    data = toy(4, 3)
    process = ProgressiveUnmasking(3, Confidence(), threshold)
    logits = data.true_logits()
    assert max(agreement(data, process, logits, enumerated, "joint", largest_first)) > 0.02


@policies
@thresholds
def test_a_chain_that_waits_visits_what_inference_by_the_models_of_then_visits(policy, threshold, enumerated):
    """In a pool each step of a chain is taken by another model: it is aligned with those, not with the last one."""
    data = toy(1, 3)
    process = ProgressiveUnmasking(3, policy, threshold)
    logits = data.true_logits()
    every = ever_other_models(data)
    assert max(agreement(data, process, logits, enumerated, "joint", models=every)) < EXACT


# --- The chain keeps the posterior ---


def posterior_error(data: Toy, process, logits, enumerated, peeking=None, steps: int = 6, models=None) -> float:
    """The largest difference of p(x0 | xt) under the chain from that of the data, at every step and stage."""
    chain = Chain(data, process, logits, enumerated, peeking)
    worst = 0.0
    for _ in range(steps):
        running = chain.state[..., 0].permute(1, 2, 0)  # (states, K, sequences)
        seen = running.sum(-1)
        under_chain = running / seen[..., None]
        error = (under_chain - data.posterior[:, None]).abs().amax(-1)
        if (seen > EXACT).any():
            worst = max(worst, float(error[seen > EXACT].max()))
        if models is not None:
            chain.table = next(models)
        chain.advance()
    return worst


@policies
@thresholds
@prompts
@stages
@pytest.mark.parametrize("believed", ["truth", "anything"])
def test_what_is_masked_is_distributed_as_in_the_data(policy, threshold, given, num_stages, believed, enumerated):
    """Given what is revealed, whatever the model believes: the policy has seen no more than that."""
    data = toy(4, 3, given)
    logits = data.true_logits()
    if believed == "anything":
        generator = torch.Generator().manual_seed(0)
        logits = data.logits(2 * torch.randn(*data.conditionals.shape, dtype=torch.double, generator=generator))
    process = ProgressiveUnmasking(num_stages, policy, threshold)
    assert posterior_error(data, process, logits, enumerated) < EXACT


@policies
@thresholds
@stages
def test_so_it_is_whichever_model_moves_a_chain_when(policy, threshold, num_stages, enumerated):
    """As in a pool, whose chains wait while the model learns."""
    data = toy(4, 3)
    process = ProgressiveUnmasking(num_stages, policy, threshold)
    assert posterior_error(data, process, data.true_logits(), enumerated, models=ever_other_models(data)) < EXACT


def test_a_policy_that_peeks_changes_the_posterior(enumerated):
    """The control: a masked position is then known to hold no large token."""
    data = toy(4, 3)
    process = ProgressiveUnmasking(2)
    assert posterior_error(data, process, data.true_logits(), enumerated, largest_first) > 0.2


# --- The loss keeps its minimiser ---


def puma_loss(data: Toy, visits: Tensor, logits: Tensor) -> Tensor:
    """The expected loss of a step, over the boards that chains are at."""
    x0, xt = visits.nonzero().T
    each = masked_cross_entropy(logits[xt].double(), data.x0[x0], data.xt[xt] == data.mask_id)
    return (each * visits[x0, xt]).sum() / visits.sum()


def gradient_at_truth(data: Toy, process, enumerated, peeking=None, models=None) -> float:
    """The largest entry of the loss's gradient in the logits of a model that knows the conditionals."""
    believed = data.conditionals.clamp_min(1e-9).log().requires_grad_()
    logits = data.logits(believed)
    visits = Chain(data, process, logits.detach(), enumerated, peeking).visits(models=models)
    puma_loss(data, visits, logits).backward()
    return float(believed.grad.abs().max())


@policies
@thresholds
@prompts
@stages
def test_at_the_true_conditionals_the_loss_has_no_gradient(policy, threshold, given, num_stages, enumerated):
    """So they are its minimum: in the logits it is convex."""
    data = toy(5, 3, given)
    process = ProgressiveUnmasking(num_stages, policy, threshold)
    # The loss is in float32.
    assert gradient_at_truth(data, process, enumerated) < 1e-7


@policies
@thresholds
@stages
def test_so_it_has_whichever_model_moves_a_chain_when(policy, threshold, num_stages, enumerated):
    """The minimiser of a pool's loss is that of every other."""
    data = toy(5, 3)
    process = ProgressiveUnmasking(num_stages, policy, threshold)
    assert gradient_at_truth(data, process, enumerated, models=ever_other_models(data)) < 1e-7


def learned_error(data: Toy, process, enumerated, peeking=None, steps: int = 300) -> float:
    """How far from the true conditionals a table is, at the worst of the boards that 1% of its own chains visit."""
    table = torch.zeros_like(data.conditionals, requires_grad=True)
    optimizer = torch.optim.Adam([table], lr=0.2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        logits = data.logits(table)
        visits = Chain(data, process, logits.detach(), enumerated, peeking).visits()
        optimizer.zero_grad()
        puma_loss(data, visits, logits).backward()
        optimizer.step()
        schedule.step()
    visits = Chain(data, process, data.logits(table.detach()), enumerated, peeking).visits()
    seen = visits.sum(0) > 0.01
    masked = data.xt == data.mask_id
    error = (table.detach().softmax(-1) - data.conditionals).abs().amax(-1)
    return float(error[seen[:, None] & masked].max())


@pytest.mark.parametrize("policy", [Confidence(), Entropy(), RandomOrder()], ids=repr)
@thresholds
def test_a_model_trained_on_its_own_chain_learns_the_true_conditionals(policy, threshold, enumerated):
    """Wherever that chain takes it, though the chain changes with what it has learned."""
    data = toy(6, 3)
    assert learned_error(data, ProgressiveUnmasking(2, policy, threshold), enumerated) < 0.02


def test_a_policy_that_peeks_moves_the_minimum(enumerated):
    """The control, of both."""
    process = ProgressiveUnmasking(2)
    assert gradient_at_truth(toy(5, 3), process, enumerated, largest_first) > 1e-3
    assert learned_error(toy(6, 2), process, enumerated, largest_first) > 0.1

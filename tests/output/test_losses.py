"""The masked diffusion loss."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puma_lightning.output.losses import masked_cross_entropy


def problem(seed, batch, length, vocab=5):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, length, vocab, generator=generator, requires_grad=True)
    x0 = torch.randint(vocab, (batch, length), generator=generator)
    masked = torch.rand(batch, length, generator=generator) < 0.5
    masked[:, 0] = True
    return logits, x0, masked


problems = given(seed=st.integers(0, 2**31 - 1), batch=st.integers(1, 4), length=st.integers(1, 6))
few = settings(max_examples=40, deadline=None)


@few
@problems
def test_loss_is_the_plain_formula(seed, batch, length):
    """(1 / n) * sum over masked i of -log p(x0_i | xt), for each sequence by itself."""
    logits, x0, masked = problem(seed, batch, length)
    log_p = logits.double().log_softmax(-1)
    expected = []
    for row in range(batch):
        positions = [i for i in range(length) if masked[row, i]]
        expected.append(sum(-log_p[row, i, x0[row, i]] for i in positions) / len(positions))
    loss = masked_cross_entropy(logits, x0, masked)
    torch.testing.assert_close(loss.double(), torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert loss.dtype == torch.float32


@few
@problems
def test_only_masked_positions_have_a_gradient(seed, batch, length):
    """What is given or already uncovered teaches nothing."""
    logits, x0, masked = problem(seed, batch, length)
    masked_cross_entropy(logits, x0, masked).sum().backward()
    assert (logits.grad[~masked] == 0).all()
    assert (logits.grad[masked].abs().sum(-1) > 0).all()


@few
@problems
def test_every_sequence_weighs_the_same(seed, batch, length):
    """A sequence's loss doesn't depend on its batch mates."""
    logits, x0, masked = problem(seed, batch, length)
    alone = [masked_cross_entropy(logits[i : i + 1], x0[i : i + 1], masked[i : i + 1]) for i in range(batch)]
    torch.testing.assert_close(masked_cross_entropy(logits, x0, masked), torch.cat(alone))


def test_a_uniform_prediction_costs_log_of_the_number_of_tokens():
    """The mask token at -inf is not one of them, and gives no NaN in loss or gradient."""
    logits = torch.zeros(2, 3, 5)
    logits[..., 4] = float("-inf")
    logits.requires_grad_()
    loss = masked_cross_entropy(logits, torch.randint(4, (2, 3)), torch.ones(2, 3, dtype=torch.bool))
    torch.testing.assert_close(loss, torch.full((2,), 4.0).log())
    loss.sum().backward()
    assert logits.grad.isfinite().all()


def test_half_precision_logits_are_summed_in_float32():
    """bfloat16 logits give the loss of the same numbers in float32."""
    logits, x0, masked = problem(0, 3, 6)
    logits = logits.detach().bfloat16()
    assert torch.equal(masked_cross_entropy(logits, x0, masked), masked_cross_entropy(logits.float(), x0, masked))

"""The host does not wait for a GPU to learn what to queue next, except for the end of the last forward pass."""

from contextlib import nullcontext
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from puma_lightning import (
    BlockDiffusion,
    Confidence,
    Entropy,
    LeftToRight,
    Margin,
    MaskedDiffusion,
    MixedMasking,
    ProgressiveUnmasking,
    RandomMasking,
    RandomOrder,
    SelfAlignedMasking,
    TransformerBackbone,
)
from puma_lightning.chain.chains import Chains
from puma_lightning.output.head import _Head, true_positions
from puma_lightning.training.sequences import CleanSequences
from puma_lightning.training.stream import Stream

V, MASK, LENGTH, B = 23, 11, 12, 4

PROCESSES = {
    "random": RandomMasking(),
    **{repr(policy): ProgressiveUnmasking(3, policy) for policy in (RandomOrder(), LeftToRight(), Margin(), Entropy())},
    "threshold": ProgressiveUnmasking(3, Confidence(), threshold=0.5),
    "schedule": ProgressiveUnmasking([[0, 3], [1, 4]], threshold=0.5),
    "mixed": MixedMasking(0.5, 3, threshold=0.5),
    "self-aligned": SelfAlignedMasking(),
    "function": ProgressiveUnmasking(3, lambda logits, xt: logits.amax(-1)),
}
MODELS = {"whole": MaskedDiffusion, "blocks": partial(BlockDiffusion, block_size=3)}


def module(model, process, large, shifted, **options):
    backbone = TransformerBackbone(V, 16, 24, num_layers=2, num_heads=2, max_length=LENGTH, **options)
    made = MODELS[model](backbone, MASK, forward_process=process, scheduler=None, shifted=shifted)
    made.large_vocabulary = 1 if large else None
    return made


@pytest.mark.parametrize("large", [False, True], ids=["logits", "statistics"])
@pytest.mark.parametrize("shifted", [False, True], ids=["aligned", "shifted"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("process", PROCESSES)
def test_no_value_of_the_device_is_looked_at_by_loss_or_chain(monkeypatch, process, model, shifted, large):
    """On the meta device, where tensors have no values, a look at one is an error."""
    # The meta device has no autocast.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(_Head, "no_autocast", lambda head: nullcontext())
    process = PROCESSES[process]
    step = module(model, process, large, shifted).to("meta")
    size = 3 if model == "blocks" else LENGTH
    x0 = torch.zeros(B, LENGTH, dtype=torch.long, device="meta")
    chains = Chains.fully_masked(x0, x0.bool(), MASK, 3, block_size=size)
    weights = torch.zeros(B * LENGTH // size, device="meta")
    loss, predictions = step.loss(chains, weights, process.reads(), num_masked=17)
    loss.backward()
    for optimizer_step in (0, 1):
        assert process.advance(chains, predictions, optimizer_step).xt.shape == chains.xt.shape


def test_the_positions_found_by_their_number_are_those_found_without():
    mask = torch.rand(7, 13, generator=torch.Generator().manual_seed(0)) < 0.4
    assert torch.equal(true_positions(mask, int(mask.sum())), true_positions(mask))
    assert len(true_positions(torch.zeros(2, 3, dtype=torch.bool), 0)) == 0


def test_positions_that_are_not_masked_have_no_weight_whatever_their_number_is_said_to_be():
    step = module("whole", PROCESSES["random"], large=True, shifted=False)
    x0 = torch.randint(MASK, (B, LENGTH), generator=torch.Generator().manual_seed(0))
    given = torch.rand(B, LENGTH, generator=torch.Generator().manual_seed(1)) >= 0.5
    chains, weights = Chains.fully_masked(x0, given, MASK), torch.full((B,), 1 / B)
    counted, said = (step.loss(chains, weights, num_masked=n)[0] for n in (None, LENGTH * B))
    torch.testing.assert_close(counted, said)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU works while the host goes on")
@pytest.mark.parametrize("large", [False, True], ids=["logits", "statistics"])
@pytest.mark.parametrize("model", MODELS)
def test_on_a_gpu_no_value_is_looked_at_by_a_step_and_the_refill_before_it(model, large):
    """CUDA's own debug mode is the judge; it lets a wait for an event pass."""

    def strictly(function):
        def call(*args, **kwargs):
            # In the first step Lightning makes what it will log to.
            torch.cuda.set_sync_debug_mode("error" if step.global_step else "default")
            try:
                return function(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return call

    class Strict(pl.Callback):
        def on_train_start(self, trainer, module):
            module.stream._refilled = strictly(module.stream._refilled)

    x0 = torch.randint(MASK, (64, LENGTH))
    given = torch.arange(LENGTH) < 2
    step = module(model, ProgressiveUnmasking(3, threshold=0.5), large, shifted=False)
    step.training_step = strictly(step.training_step)
    trainer = pl.Trainer(
        accelerator="gpu", devices=1, max_steps=12, logger=False, enable_checkpointing=False, log_every_n_steps=1000,
        enable_progress_bar=False, callbacks=[Strict()],
    )  # fmt: skip
    trainer.fit(step, DataLoader([{"input_ids": row, "prompt_mask": given} for row in x0], batch_size=B, shuffle=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU works while the host goes on")
def test_on_a_gpu_the_refill_does_not_wait_for_what_was_queued_after_advance():
    """Such as the backward pass: the host is through before a long kernel queued after ``advance`` is."""
    device = torch.device("cuda")
    rows = DataLoader([{"input_ids": row} for row in torch.randint(MASK, (64, LENGTH))], batch_size=B)
    stream = Stream(CleanSequences(rows, MASK, V), ProgressiveUnmasking(2), MASK, B, 100, device=device)
    logits = torch.randn(B, LENGTH, V, device=device)
    for _ in stream:
        stream.advance(logits, 0)
        torch.cuda.synchronize()
        torch.cuda._sleep(10**9)
        slept = torch.cuda.Event()
        slept.record()
        batch, number = stream.peek(), stream._on_host[0]()[1].sum()
        assert not slept.query()
        assert number == (batch["xt"] == MASK).sum().cpu()
        if stream.step == 6:
            break

"""With a large vocabulary the output layer is run on the positions that count alone; nothing else changes."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from puma_lightning import (
    AutoregressiveLM,
    BlockDiffusion,
    BlockSampler,
    Confidence,
    Entropy,
    LeftToRight,
    Margin,
    MaskedDiffusion,
    ProgressiveUnmasking,
    RandomMasking,
    Sampler,
    TransformerBackbone,
)
from puma_lightning.modules.generative import GenerativeModule

V, MASK, EOS, LENGTH = 23, 11, 0, 12


class Seen(pl.Callback):
    """Losses, and the boards that were trained on."""

    def __init__(self):
        self.losses, self.boards = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())
        self.boards.append(batch["xt"])


def rows(seed=0):
    x0 = torch.randint(V - 1, (24, LENGTH), generator=torch.Generator().manual_seed(seed))
    x0 += x0 >= MASK
    given = torch.arange(LENGTH) < 2
    return [{"input_ids": row, "prompt_mask": given} for row in x0]


def backbone(**options):
    torch.manual_seed(0)
    net = TransformerBackbone(V, 16, 24, num_layers=2, num_heads=2, max_length=32, **options)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return net


def masked(process, **options):
    return lambda: MaskedDiffusion(backbone(tie_embeddings=True), MASK, process, **options, **OPTIMISER)


def blocks(process, **options):
    return lambda: BlockDiffusion(backbone(), MASK, 4, EOS, process, **options, **OPTIMISER)


OPTIMISER = dict(optimizer=partial(torch.optim.SGD, lr=0.02), scheduler=None)
MODELS = {
    "baseline": masked(RandomMasking()),
    "confidence": masked(ProgressiveUnmasking(4)),
    "margin": masked(ProgressiveUnmasking(4, Margin())),
    "entropy, threshold": masked(ProgressiveUnmasking(4, Entropy(), threshold=0.3)),
    "left to right": masked(ProgressiveUnmasking(4, LeftToRight())),
    "own policy": masked(ProgressiveUnmasking(4, lambda logits, xt: logits.softmax(-1).square().sum(-1))),
    "shifted": masked(ProgressiveUnmasking(4, threshold=0.3), shifted=True),
    "blocks": blocks(ProgressiveUnmasking(3, threshold=0.3)),
    "shifted blocks": blocks(RandomMasking(), shifted=True),
    "autoregressive": lambda: AutoregressiveLM(backbone(causal=True), MASK, EOS, **OPTIMISER),
}


def run(build, large, monkeypatch, **options):
    monkeypatch.setattr(GenerativeModule, "large_vocabulary", 1 if large else None)
    pl.seed_everything(0)
    model, seen = build(), Seen()
    assert (model.head() is not None) == large
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=8, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[seen], **options,
    )  # fmt: skip
    trainer.fit(model, DataLoader(rows(), batch_size=4, shuffle=True), DataLoader(rows(1), batch_size=8))
    return model, seen, trainer.callback_metrics["val/loss"]


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_the_output_layer_on_masked_positions_trains_the_same_model(build, monkeypatch):
    """The same losses, boards, weights and NELBO."""
    small, large = (run(build, large, monkeypatch) for large in (False, True))
    assert large[1].losses == pytest.approx(small[1].losses, rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(small[1].boards, large[1].boards, strict=True))
    torch.testing.assert_close(large[2], small[2], rtol=1e-5, atol=1e-6)
    for a, b in zip(small[0].parameters(), large[0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_micro_batches_add_up_as_ever(monkeypatch):
    build, options = MODELS["entropy, threshold"], {"accumulate_grad_batches": 2}
    small, large = (run(build, large, monkeypatch, **options) for large in (False, True))
    assert large[1].losses == pytest.approx(small[1].losses, rel=1e-5)


class Capped(TransformerBackbone):
    def forward(self, input_ids, cache=None):
        return 5 * (super().forward(input_ids, cache) / 5).tanh()


class Sharp(Confidence):
    def __call__(self, logits, xt):
        return -super().__call__(logits, xt)


def test_what_somebody_changed_is_not_passed_over(monkeypatch):
    """Another forward of the backbone, a hook, another call of a policy: their logits are made."""
    monkeypatch.setattr(GenerativeModule, "large_vocabulary", 1)
    assert MaskedDiffusion(Capped(V, 16, 24, 1, 2), MASK).head() is None
    hooked = backbone()
    hooked.lm_head.register_forward_hook(lambda module, args, out: 2 * out)
    assert MaskedDiffusion(hooked, MASK).head() is None
    compiled = backbone()
    compiled.compile(backend="eager")
    assert MaskedDiffusion(compiled, MASK).head() is None
    assert MaskedDiffusion(backbone(), MASK).head() is not None
    assert ProgressiveUnmasking(4, Sharp()).reads() is None
    assert ProgressiveUnmasking(4, Confidence(), 0.5).reads() == ("log_prob",)
    assert set(ProgressiveUnmasking(4, Margin(), 0.5).reads()) == {"margin", "log_prob"}


@pytest.mark.parametrize("large", [False, True])
def test_weights_of_positions_are_exact_in_half_precision(large, monkeypatch):
    """Lightning's half precision changes the default dtype, in which 1 / 24 / 137 is off by a third of a percent."""
    monkeypatch.setattr(GenerativeModule, "large_vocabulary", 1 if large else None)
    model = MaskedDiffusion(backbone(), MASK, RandomMasking())
    given = []
    model.loss = lambda chains, weights, *rest: given.append(weights) or (weights.sum(), chains.xt)
    x0 = torch.ones(24, 139, dtype=torch.long)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model.evaluation_loss({"input_ids": x0, "prompt_mask": x0 == 0}, torch.Generator().manual_seed(0))
    finally:
        torch.set_default_dtype(torch.float32)
    assert given[0].dtype == torch.float32
    assert given[0].sum() == pytest.approx(1, rel=1e-6)


def test_half_precision_trains_too(monkeypatch):
    """On random masks: the order of a policy depends on every rounding."""
    small, large = (run(MODELS["baseline"], large, monkeypatch, precision="bf16-mixed") for large in (False, True))
    assert large[1].losses == pytest.approx(small[1].losses, rel=0.03)


@pytest.mark.parametrize(
    "policy", [Confidence(), Margin(), Entropy(), LeftToRight(), lambda logits, xt: -logits[..., 0]]
)
@pytest.mark.parametrize("options", [{}, {"threshold": 0.2}, {"num_steps": 3}])
@pytest.mark.parametrize("kind", ["whole", "blocks"])
def test_samples_are_the_same(kind, policy, options, monkeypatch):
    model = MODELS["shifted" if kind == "whole" else "shifted blocks"]()
    sampler = Sampler(policy, **options)
    x0 = torch.stack([row["input_ids"] for row in rows()])
    prompt = torch.arange(LENGTH) < torch.arange(1, 25)[:, None] % (LENGTH - 1) + 1
    samples = []
    for large in (False, True):
        monkeypatch.setattr(GenerativeModule, "large_vocabulary", 1 if large else None)
        generator = torch.Generator().manual_seed(0)
        samples.append(model.sample(x0, prompt, sampler if kind == "whole" else BlockSampler(sampler), generator))
    for name in ("tokens", "reveal_step", "nfe"):
        assert torch.equal(getattr(samples[0], name), getattr(samples[1], name))


def test_draws_follow_the_temperature(monkeypatch):
    """Not the same numbers, but the same distribution, and never the mask token."""
    model = MODELS["baseline"]()
    x0 = rows()[0]["input_ids"].expand(4000, LENGTH)
    prompt = (torch.arange(LENGTH) < LENGTH - 1).expand(4000, LENGTH)
    shares = []
    for large in (False, True):
        monkeypatch.setattr(GenerativeModule, "large_vocabulary", 1 if large else None)
        sampler = Sampler(temperature=1.5, top_p=0.9)
        drawn = model.sample(x0, prompt, sampler, torch.Generator().manual_seed(0)).tokens[:, -1]
        shares.append(torch.bincount(drawn, minlength=V) / 4000)
    assert shares[1][MASK] == 0
    assert (shares[0] - shares[1]).abs().max() < 0.05
    assert (shares[1] > 0.02).sum() > 2


def test_no_logits_of_all_positions_are_made(monkeypatch):
    monkeypatch.setattr(GenerativeModule, "large_vocabulary", 1)
    model = MODELS["confidence"]()
    sizes = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, w, b=None: sizes.append((*x.shape[:-1], len(w))) or linear(x, w, b)
    )
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(rows(), batch_size=4), DataLoader(rows(1), batch_size=8))
    model.sample(torch.stack([row["input_ids"] for row in rows()]), (torch.arange(LENGTH) < 3).expand(24, LENGTH))
    # The check of the first batch looks at one row.
    assert [size for size in sizes if size[-1] == V] == [(1, LENGTH, V)]

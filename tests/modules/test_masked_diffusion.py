"""Masked diffusion under Lightning: it trains on anyone's data and model, measures the NELBO, and refuses mistakes."""

import itertools
import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from puma_lightning import CellAccuracy, GenerationEvaluation, UnmaskingTrajectory
from puma_lightning.chain.policies import LeftToRight
from puma_lightning.chain.student import Sampler
from puma_lightning.chain.teacher import ForwardProcess, ProgressiveUnmasking, RandomMasking
from puma_lightning.models import TransformerBackbone
from puma_lightning.modules import MaskedDiffusion
from puma_lightning.output.losses import masked_cross_entropy
from puma_lightning.training.optim import WarmupCosine

V = 6
MASK = V - 1
LENGTH = 8


class Rows(Dataset):
    """Random sequences, of which the first positions are given."""

    def __init__(self, size: int = 24, given: int = 2, length: int = LENGTH) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x0 = torch.randint(MASK, (size, length), generator=generator)
        self.prompt = torch.arange(length) < given

    def __len__(self) -> int:
        return len(self.x0)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.x0[i], "prompt_mask": self.prompt}


class OwnBackbone(nn.Module):
    """All that a user's own model needs: vocab_size, and token ids to logits."""

    def __init__(self, vocab_size: int = V) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.embed = nn.Embedding(vocab_size, 8)
        self.out = nn.Linear(8, vocab_size)

    def forward(self, xt: Tensor) -> Tensor:
        h = self.embed(xt)
        return self.out(h + h.mean(1, keepdim=True))


class ByCount(nn.Module):
    """A known model: every masked position gets token 0 a logit that only depends on the number masked."""

    vocab_size = V

    def __init__(self, scale: float = 0.3) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, xt: Tensor) -> Tensor:
        logit = self.scale * (xt == MASK).sum(1)[:, None, None]
        return torch.cat([logit.expand(*xt.shape, 1), xt.new_zeros(*xt.shape, V - 1).float()], dim=-1)


def trainer(**options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(**{**quiet, "enable_checkpointing": False, "max_steps": 4, **options})


def loader(rows: Dataset | None = None, **options: Any) -> DataLoader:
    return DataLoader(rows or Rows(), **{"batch_size": 4, **options})


def model(process: ForwardProcess | None = None, backbone: nn.Module | None = None, **options: Any) -> MaskedDiffusion:
    return MaskedDiffusion(
        backbone or OwnBackbone(),
        MASK,
        process or ProgressiveUnmasking(3),
        **{"scheduler": None, "optimizer": partial(torch.optim.AdamW, lr=0.05), **options},
    )


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []
        self.validations: list[tuple[int, float, float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.values.append(outputs["loss"].item())

    def on_validation_end(self, trainer, pl_module) -> None:
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        self.validations.append((trainer.global_step, metrics["val/loss"], metrics["val/perplexity"]))


PROCESSES = {
    "puma": ProgressiveUnmasking(3),
    "threshold": ProgressiveUnmasking(3, threshold=0.5),
    "mdm": RandomMasking(),
}
processes = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


# --- it trains ---


@processes
def test_it_trains_from_a_plain_loader(process):
    """trainer.fit(model, DataLoader) lowers the loss; PUMA and the baseline differ in one argument."""
    pl.seed_everything(0)
    losses = Losses()
    rows = Rows()
    rows.x0[:] = rows.x0[:, :1]
    trainer(max_steps=60, callbacks=[losses]).fit(model(process), loader(rows, shuffle=True))
    assert len(losses.values) == 60
    assert losses.values[0] > 1 and sum(losses.values[-10:]) / 10 < losses.values[0] / 2


@processes
def test_it_trains_from_anyones_data_module(process):
    """One that knows nothing of streams and only returns a DataLoader."""

    class Own(pl.LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            return loader(shuffle=True)

        def val_dataloader(self) -> DataLoader:
            return loader()

    run = trainer(max_steps=6)
    run.fit(model(process), datamodule=Own())
    assert run.global_step == 6
    assert {"train/loss", "val/loss", "val/perplexity"} <= set(run.callback_metrics)


@processes
def test_it_trains_the_transformer(process):
    """With the package's own backbone and scheduler."""
    backbone = TransformerBackbone(V, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2)
    run = trainer()
    run.fit(model(process, backbone, scheduler=partial(WarmupCosine, warmup_steps=2)), loader(), loader())
    assert run.global_step == 4
    assert run.lr_scheduler_configs[0].scheduler.total_steps == 4


def test_the_whole_trajectory_is_fixed_by_the_seed():
    """seed_everything decides weights, data order and masks; another seed gives another run."""

    def run(seed: int) -> list[float]:
        pl.seed_everything(seed)
        losses = Losses()
        trainer(callbacks=[losses]).fit(model(), loader(shuffle=True))
        return losses.values

    assert run(0) == run(0) != run(1)


def test_validation_does_not_disturb_training():
    """The same losses with and without validation."""

    def run(**options: Any) -> list[float]:
        pl.seed_everything(0)
        losses = Losses()
        trainer(callbacks=[losses], max_steps=9, **options).fit(model(), loader(shuffle=True), loader())
        return losses.values

    assert run(val_check_interval=2) == run(limit_val_batches=0)


def test_one_step_sees_each_sequence_once_and_costs_one_forward_pass():
    """There is no second pass for the policy: one per micro-batch, and one look at the first batch."""
    calls = []
    backbone = OwnBackbone()
    backbone.register_forward_hook(lambda *_: calls.append(1))
    trainer(max_steps=5, accumulate_grad_batches=2).fit(model(backbone=backbone), loader())
    assert len(calls) == 1 + 10


# --- steps are steps ---


@processes
def test_epochs_and_limits_count_steps(process):
    """24 sequences in batches of 4 are 6 steps an epoch, however long a sequence stays in its slot."""

    def steps(**options: Any) -> tuple[int, int]:
        run = trainer(**{"max_steps": -1, **options})
        run.fit(model(process), loader())
        return run.global_step, run.current_epoch

    assert steps(max_epochs=2) == (12, 2)
    assert steps(max_epochs=2, limit_train_batches=4) == (8, 2)
    assert steps(max_epochs=2, limit_train_batches=0.5) == (6, 2)
    assert steps(max_epochs=1, accumulate_grad_batches=2) == (3, 1)
    assert steps(max_steps=8, max_epochs=-1)[0] == 8
    assert steps(fast_dev_run=True) == (1, 1)
    assert steps(fast_dev_run=3) == (3, 1)


def test_val_check_interval_counts_steps():
    """Also inside an epoch and over its end."""
    losses = Losses()
    run = trainer(max_steps=10, callbacks=[losses], val_check_interval=4, check_val_every_n_epoch=None,
                  num_sanity_val_steps=0)  # fmt: skip
    run.fit(model(), loader(), loader())
    assert [step for step, *_ in losses.validations] == [4, 8]


# --- what is measured ---


@processes
def test_a_uniform_model_costs_log_of_the_number_of_tokens(process):
    """The mask token is never predicted, so it is V - 1 and not V; in training and in validation."""
    losses = Losses()
    options = {"optimizer": partial(torch.optim.SGD, lr=0.0)}
    trainer(callbacks=[losses]).fit(model(process, ByCount(0.0), **options), loader(), loader())
    assert losses.values == pytest.approx([math.log(V - 1)] * 4, abs=1e-5)
    assert losses.validations[-1][1:] == pytest.approx((math.log(V - 1), V - 1), abs=1e-4)


def test_validation_loss_is_the_exact_nelbo_of_a_known_model():
    """(1 / A) * sum over n of the loss with n masked, here with prompts, and A rows a batch."""
    answer = LENGTH - 2
    rows = Rows(answer)
    rows.x0[:] = 0
    (metrics,) = trainer().validate(model(backbone=ByCount(0.3)), loader(rows, batch_size=answer), verbose=False)
    each = [math.log(math.exp(0.3 * n) + V - 2) - 0.3 * n for n in range(1, answer + 1)]
    assert metrics["val/loss"] == pytest.approx(sum(each) / answer, abs=1e-5)
    assert metrics["val/perplexity"] == pytest.approx(math.exp(metrics["val/loss"]), rel=1e-6)


def test_validation_loss_agrees_with_the_any_order_nelbo():
    """Of a model that looks at everything: the average over all n and all subsets, and over all orders."""
    torch.manual_seed(0)
    module = model(backbone=OwnBackbone()).eval()
    with torch.no_grad():
        module.backbone.embed.weight.mul_(3)
    x0 = torch.tensor([[0, 3, 1, 4]])
    by_subset, by_order = [], []
    with torch.no_grad():
        for n in range(1, 5):
            masks = torch.tensor([[i in chosen for i in range(4)] for chosen in itertools.combinations(range(4), n)])
            logits = module(x0.masked_fill(masks, MASK))
            by_subset.append(masked_cross_entropy(logits, x0.expand(len(masks), -1), masks).mean())
        for order in itertools.permutations(range(4)):
            masked = torch.ones(1, 4, dtype=torch.bool)
            for i in order:
                by_order.append(-module(x0.masked_fill(masked, MASK)).log_softmax(-1)[0, i, x0[0, i]])
                masked[0, i] = False
    exact = torch.stack(by_subset).mean().item()
    assert torch.stack(by_order).mean().item() == pytest.approx(exact, abs=1e-5)

    class Same(Dataset):
        def __len__(self) -> int:
            return 4000

        def __getitem__(self, i: int) -> dict[str, Tensor]:
            return {"input_ids": x0[0]}

    (metrics,) = trainer().validate(module, loader(Same(), batch_size=200), verbose=False)
    assert metrics["val/loss"] == pytest.approx(exact, rel=0.02)


def test_perplexity_is_of_the_same_validation():
    """exp(val/loss) at every validation of a run, not of the one before."""
    losses = Losses()
    trainer(max_steps=9, callbacks=[losses], val_check_interval=3).fit(model(), loader(), loader())
    assert len({loss for _, loss, _ in losses.validations}) > 2
    for _, loss, perplexity in losses.validations:
        assert perplexity == pytest.approx(math.exp(loss), rel=1e-6)


def test_validation_repeats_itself():
    """The same masks each time, whatever the global seed; test measures the same quantity."""
    module = model()
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        results.append(trainer().validate(module, loader(), verbose=False)[0]["val/loss"])
    results.append(trainer().test(module, loader(), verbose=False)[0]["test/loss"])
    assert len(set(results)) == 1


def test_two_validation_sets_are_told_apart():
    """The first has the plain names, which checkpoints watch; others end in their number, or their given name."""
    sets = [loader(), loader(Rows(12))]
    module = model(backbone=ByCount(0.3))

    def measured(**options: Any) -> dict[str, float]:
        parts = trainer().validate(module, verbose=False, **options)
        return {name: value for part in parts for name, value in part.items()}

    class Named(pl.LightningDataModule):
        val_names = ("easy", "hard")

        def val_dataloader(self) -> list[DataLoader]:
            return sets

    for metrics, second in ((measured(dataloaders=sets), "/1"), (measured(datamodule=Named()), "/hard")):
        assert set(metrics) == {f"val/{what}{name}" for what in ("loss", "perplexity") for name in ("", second)}
        for name in ("", second):
            assert metrics[f"val/perplexity{name}"] == pytest.approx(math.exp(metrics[f"val/loss{name}"]), rel=1e-6)
    assert metrics["val/loss"] == measured(dataloaders=sets[0])["val/loss"]


# --- prediction ---


def test_predict_completes_what_is_not_prompt():
    """tokens, reveal_step and NFE of every batch; mask tokens in the answer are as good as any others."""
    rows = Rows(8)
    rows.x0[:, 2:] = MASK
    out = trainer().predict(model(sampler=Sampler(tokens_per_step=2)), loader(rows))
    assert len(out) == 2
    for i, part in enumerate(out):
        assert set(part) == {"tokens", "reveal_step", "nfe"}
        assert torch.equal(part["tokens"][:, :2], rows.x0[4 * i : 4 * i + 4, :2])
        assert not (part["tokens"] == MASK).any()
        assert part["reveal_step"].min() == -1 and part["reveal_step"].max() == 2
        assert part["nfe"].tolist() == [3] * 4


def test_sample_reads_only_the_prompt():
    """Another answer in input_ids gives the same completion; another sampler can be given."""
    module, rows = model(), Rows(4)
    prompt = rows.prompt.expand(4, -1)
    others = torch.where(prompt, rows.x0, (rows.x0 + 1) % MASK)
    a, b = (module.sample(x0, prompt, generator=torch.Generator().manual_seed(0)) for x0 in (rows.x0, others))
    assert torch.equal(a.tokens, b.tokens) and a.nfe.tolist() == [6] * 4
    assert module.sample(rows.x0, prompt, Sampler(num_steps=1)).nfe.tolist() == [1] * 4


@pytest.mark.parametrize("large", [None, 1], ids=["logits", "head"])
def test_a_sample_ends_at_the_eos_of_the_module(large):
    """Whose text up to there is the same from the left, in as many passes as it is long."""
    torch.manual_seed(0)
    module = model(backbone=TransformerBackbone(V, 16, 24, 1, 2), eos_id=0).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    module.large_vocabulary = large
    xt, prompt = torch.randint(1, MASK, (16, 12)), torch.arange(12).expand(16, -1) < 2
    off, on = (module.sample(xt, prompt, Sampler(LeftToRight(), end_at_eos=ends)) for ends in (False, True))
    sizes = [(*row, 0).index(0) for row in off.tokens[:, 2:].tolist()]
    assert off.nfe.tolist() == [10] * 16 and on.nfe.tolist() == [min(size + 1, 10) for size in sizes]
    assert min(sizes) < 9 and max(sizes) == 10
    for old, new, size in zip(off.tokens[:, 2:].tolist(), on.tokens[:, 2:].tolist(), sizes, strict=True):
        assert new == old[:size] + [0] * (10 - size)


def test_forward_never_predicts_the_mask_token():
    """Its logit is -inf, all others are the backbone's."""
    module, xt = model(), torch.full((1, LENGTH), MASK)
    logits = module(xt)
    assert (logits[..., MASK] == float("-inf")).all()
    assert torch.equal(logits[..., :MASK], module.backbone(xt)[..., :MASK])


# --- mistakes are refused before any step ---


def refused(module: MaskedDiffusion, message: str, data: Any = None, **options: Any) -> None:
    before = {name: value.clone() for name, value in module.state_dict().items()}
    run = trainer(**options)
    with pytest.raises(ValueError, match=message):
        run.fit(module, loader() if data is None else data)
    assert run.global_step == 0
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def wrong_shape(logits: Tensor, xt: Tensor) -> Tensor:
    return logits.amax(-1).mean(1)


def not_a_number(logits: Tensor, xt: Tensor) -> Tensor:
    return torch.full(xt.shape, float("nan"))


def test_a_policy_of_another_shape_or_nan_is_refused():
    """By name, whether it trains or samples."""
    refused(model(ProgressiveUnmasking(3, wrong_shape)), r"\(B, L\) = \(4, 8\), got \(4,\) from .*wrong_shape")
    refused(model(ProgressiveUnmasking(3, not_a_number)), "NaN from .*not_a_number")
    refused(model(sampler=Sampler(wrong_shape)), "wrong_shape")


def test_an_end_at_an_eos_that_there_is_not_is_refused():
    """And an EOS that can't be one."""
    ends = Sampler(end_at_eos=True)
    refused(model(sampler=ends), "end_at_eos: expected false where no token ends an answer")
    evaluation = GenerationEvaluation({"cells": CellAccuracy()}, [ends])
    refused(model(), "end_at_eos: expected false", callbacks=[evaluation])
    for eos_id in (MASK, V, -1):
        with pytest.raises(ValueError, match=f"eos_id: expected a token in 0..5 .* got {eos_id}"):
            model(eos_id=eos_id)


def test_logits_of_another_shape_are_refused():
    """Expected and got are both named."""

    class Pooled(OwnBackbone):
        def forward(self, xt: Tensor) -> Tensor:
            return super().forward(xt).mean(1)

    class Wide(OwnBackbone):
        def forward(self, xt: Tensor) -> Tensor:
            return torch.cat([super().forward(xt)] * 2, dim=-1)

    refused(model(backbone=Pooled()), r"logits \(B, L, V\) = \(4, 8, 6\), got \(4, 6\)")
    refused(model(backbone=Wide()), r"got \(4, 8, 12\)")


def test_a_backbone_needs_vocab_size():
    """When the module is made."""
    with pytest.raises(ValueError, match=r"vocab_size.* from Linear"):
        MaskedDiffusion(nn.Linear(2, 2), 1)


@pytest.mark.parametrize("mask_id", [-1, V, 100])
def test_the_mask_token_must_be_in_the_vocabulary(mask_id):
    """When the module is made."""
    with pytest.raises(ValueError, match=rf"mask_id: expected a token in 0\.\.{V - 1}.*got {mask_id}"):
        MaskedDiffusion(OwnBackbone(), mask_id)


def test_there_must_be_a_sequence_for_every_row():
    """Batch size times accumulation is the number of slots."""
    refused(model(), "28 training sequences.* got 24", loader(batch_size=28))
    refused(
        model(),
        "32 training sequences.*batch size 8 x accumulation 4.* got 24",
        loader(batch_size=8),
        accumulate_grad_batches=4,
    )


def test_bad_data_are_refused():
    """A mask token in the data, something else than a DataLoader."""
    rows = Rows()
    rows.x0[:] = MASK
    refused(model(), "mask token", loader(rows))
    refused(model(), r"one torch\.utils\.data\.DataLoader, got list", [loader(), loader()])


@pytest.mark.parametrize("options", [{"reload_dataloaders_every_n_epochs": 1}], ids=str)
def test_trainer_options_that_work_on_loaders_are_refused(options):
    """Rather than silently doing something else."""
    refused(model(), next(iter(options)), **options)


@pytest.mark.parametrize("option", ["accumulate_grad_batches", "val_check_interval"])
def test_a_number_of_batches_that_is_zero_is_refused(option):
    """Lightning divides by it."""
    refused(model(), rf"{option}: expected at least one batch, got 0; ", **{option: 0})


def test_optimizers_and_clipping_that_spoil_training_in_silence_are_refused():
    """LBFGS takes a step in many looks at the batch, and each would move the chains."""
    lbfgs = MaskedDiffusion(OwnBackbone(), MASK, optimizer=partial(torch.optim.LBFGS, lr=0.1), scheduler=None)
    refused(lbfgs, "optimizer: expected one that looks at a batch once.*LBFGS")
    refused(model(), "gradient_clip_val: expected at least 0, got -1", gradient_clip_val=-1.0)


# --- a loss that is not finite ---


class TurnsBad(OwnBackbone):
    """Its loss is NaN from a training step on."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.left = step + 1  # the look at the first batch comes on top

    def forward(self, xt: Tensor) -> Tensor:
        self.left -= 1
        return super().forward(xt) * (float("nan") if self.left < 0 else 1.0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_nan_loss_stops_the_run_before_it_reaches_the_weights(tmp_path, accumulate):
    """The error names the step and the last good checkpoint, whose weights are still the model's."""
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    module = model(backbone=TurnsBad(3 * accumulate))
    run = trainer(max_steps=9, enable_checkpointing=True, callbacks=[save], accumulate_grad_batches=accumulate)
    with pytest.raises(ValueError, match=rf"not finite.* step 3; .*{tmp_path}/step=3\.ckpt"):
        run.fit(module, loader())
    assert run.global_step == 3
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[name]) for name, value in module.state_dict().items())
    assert all(value.isfinite().all() for value in saved.values())
    assert not (tmp_path / "step=4.ckpt").exists()


def test_a_nan_loss_without_a_checkpoint_says_so():
    """There is nothing to go on from."""
    with pytest.raises(ValueError, match=r"step 2; .*there is none yet"):
        trainer().fit(model(backbone=TurnsBad(2)), loader())


def test_the_gradient_is_clipped_by_the_trainer():
    """gradient_clip_val bounds the norm that the optimizer sees."""
    norms = []

    class Norm(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            norms.append(torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters()]).item())

    class Clipped(pl.Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer) -> None:
            if trainer.global_step:
                clipped.append(torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters()]).item())

    clipped: list[float] = []
    trainer(max_steps=4, gradient_clip_val=1e-3, callbacks=[Norm(), Clipped()]).fit(model(), loader())
    assert min(norms) > 1e-3
    assert clipped and max(clipped) <= 1.001e-3


def test_a_policy_may_leave_what_is_not_masked_without_a_score():
    """Scores of positions that are not masked are ignored, also before training starts."""

    def only_masked(logits: Tensor, xt: Tensor) -> Tensor:
        return torch.where(xt == MASK, logits.amax(-1), float("nan"))

    trainer(max_steps=3).fit(model(process=ProgressiveUnmasking(2, only_masked)), loader())


class Norms(pl.Callback):
    """What the gradients are when the step is over."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_zero_grad(self, trainer, pl_module, optimizer) -> None:
        gradients = [p.grad.norm() for p in pl_module.parameters() if p.grad is not None]
        if gradients:
            self.norms.append(float(torch.stack(gradients).norm()))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("algorithm", [None, "norm", "value"])
def test_gradients_are_clipped_in_every_precision(precision, fused, algorithm):
    """Lightning itself would stop at the first step of a fused optimizer in mixed precision."""
    norms = Norms()
    made = model(optimizer=partial(torch.optim.AdamW, fused=fused), scheduler=None)
    clip = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": algorithm}
    trainer(precision=precision, max_steps=3, callbacks=[norms], **clip).fit(made, loader())
    assert len(norms.norms) >= 2
    most = 1e-3 * (sum(p.numel() for p in made.parameters()) ** 0.5 if algorithm == "value" else 1)
    assert all(0 < norm <= most * 1.01 for norm in norms.norms)


@pytest.mark.parametrize("length", [1, 2, 6])
@pytest.mark.parametrize("num_stages", [7, [(0, 2), (2, 7)]])
@pytest.mark.parametrize("threshold", [None, 0.9])
def test_answers_may_be_shorter_than_k(length, num_stages, threshold):
    """They meet some boards more than once, and their chains end like others."""
    rows = Rows(given=LENGTH - length)
    losses = Losses()
    process = ProgressiveUnmasking(num_stages, threshold=threshold)
    trainer(max_steps=20, callbacks=[losses]).fit(model(process), loader(rows))
    assert len(losses.values) == 20
    assert all(math.isfinite(loss) and loss > 0 for loss in losses.values)


def test_what_comes_after_a_fit_draws_from_the_seed_of_the_run():
    """Predictions of the same process are those of another; a second model does not start like the first."""
    pl.seed_everything(3)
    first = model()
    before = torch.random.get_rng_state()
    trainer().fit(first, loader(shuffle=True))
    assert torch.initial_seed() == 3
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_second_fit_has_an_order_of_its_own_and_another_model_the_same_as_the_first():
    """So that models can be compared in a notebook, and one trained a little more does not see the same again."""
    pl.seed_everything(3)

    def order(module: MaskedDiffusion) -> list[list[int]]:
        seen: list[list[int]] = []
        watch = LambdaCallback(on_train_batch_start=lambda t, m, batch, i: seen.extend(batch["input_ids"].tolist()))
        trainer(callbacks=[watch]).fit(module, loader(shuffle=True))
        return seen

    first = model(RandomMasking())
    one, more, other = order(first), order(first), order(model(RandomMasking()))
    assert one == other
    assert one != more


@pytest.mark.parametrize("bad", [0, 1])
def test_all_processes_stop_if_the_loss_of_one_is_not_finite(bad, monkeypatch):
    """When a checkpoint is saved: whoever stopped alone would leave the others waiting for its chains."""
    made = model()
    run = trainer(max_steps=2)
    run.fit(made, loader())
    if bad == 0:
        made.finite._unseen.append((1, torch.tensor(math.nan)))
    gathered = []

    def gather(states: list[Any], state: dict[str, Any]) -> None:
        gathered.append(state)
        states[:] = [state, {**state, "finite": bad != 1}]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    monkeypatch.setattr(type(run), "world_size", 2)
    with pytest.raises(ValueError, match="not finite"):
        made.on_save_checkpoint({})
    assert len(gathered) == 1


def test_a_process_stops_with_another_whose_loss_is_not_finite(monkeypatch):
    """Both at the step in which they look."""
    made = model()
    run = trainer(max_steps=2)
    run.fit(made, loader())
    monkeypatch.setattr(type(run), "world_size", 2)
    monkeypatch.setattr(run.strategy, "reduce_boolean_decision", lambda finite: False)
    with pytest.raises(ValueError, match="not finite"):
        made.finite.observe(torch.tensor(1.0), run)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "32-true"])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("fused", [False, True])
def test_a_fused_optimizer_that_cannot_be_clipped_is_refused(precision, clip, fused):
    """Before training starts, where Lightning would stop at the first step."""
    made = model(optimizer=lambda params: torch.optim.AdamW(params, fused=fused), scheduler=None)
    made.trainer = SimpleNamespace(precision=precision, gradient_clip_val=clip)
    if fused and clip and precision == "16-mixed":
        with pytest.raises(ValueError, match="fused to false"):
            made.configure_optimizers()
    else:
        assert isinstance(made.configure_optimizers(), torch.optim.AdamW)


def test_what_a_data_module_offers_wrongly_is_refused_before_training():
    """Although it is not needed before the first validation."""

    class Misnamed(pl.LightningDataModule):
        val_names = ("one", "two", "three")

        def train_dataloader(self):
            return loader()

        def val_dataloader(self):
            return [loader(), loader()]

    refused(
        model(), "val_names: expected a different name for each of 2 val loaders", Misnamed(), num_sanity_val_steps=0
    )


def test_what_nobody_uses_is_not_looked_at():
    """A DataModule may have a decode of its own that has nothing to do with ours."""

    class Own(pl.LightningDataModule):
        def train_dataloader(self):
            return loader()

        def decode(self, tokens):
            return tokens

    run = trainer(max_steps=1)
    run.fit(model(), Own())
    assert run.global_step == 1
    sampled = UnmaskingTrajectory(num_examples=1)
    refused(model(), "decode: expected a function", Own(), callbacks=[sampled])


def test_a_module_may_refuse_more_than_we_do():
    class Stricter(MaskedDiffusion):
        def preflight(self) -> None:
            super().preflight()
            raise ValueError("not today")

    made = model()
    made.__class__ = Stricter
    refused(made, "not today")


def test_a_model_may_know_the_rows_of_its_batch():
    """It is asked for the rows that are left; see ``Canvas``."""
    asked = []

    class Knows(MaskedDiffusion):
        def select(self, rows):
            asked.append(rows.tolist())
            return self

    made = model()
    made.__class__ = Knows
    x0 = torch.zeros(2, 8, dtype=torch.long)
    made.sample(x0, torch.arange(8) < torch.tensor([[4], [6]]))
    assert asked == [[0]]

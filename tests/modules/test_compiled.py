"""With compiled layers nothing is compiled again once training, validation and sampling have each been seen.

A compiled module, ``trainer.fit(torch.compile(module))``, does what the module does.
"""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.data import DataLoader

from puma_lightning import (
    AutoregressiveLM,
    BlockDiffusion,
    Confidence,
    GenerationEvaluation,
    MaskedDiffusion,
    ProgressiveUnmasking,
    RandomMasking,
    Sampler,
    SudokuSolved,
    TransformerBackbone,
)

V, MASK, LENGTH = 9, 8, 16


def rows(number: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Prompts of every length."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randint(MASK, (number, LENGTH), generator=generator)
    return [{"input_ids": row, "prompt_mask": torch.arange(LENGTH) < i % 9} for i, row in enumerate(x0)]


class Compilations(pl.Callback):
    """How many there had been at each validation's end and before the first step; masked positions of training batches;
    rows of all batches.
    """

    def __init__(self, counter: CompileCounter) -> None:
        self.counter, self.seen, self.masked, self.rows = counter, [], [], []
        self.before: list[int] = []

    def on_train_start(self, trainer, module):
        def count(embedding, inputs, output):
            if trainer.global_step:  # the check of the first batch is over
                self.rows.append(len(inputs[0]))

        module.backbone.embed_tokens.register_forward_hook(count)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.before.append(self.counter.frame_count)
        self.masked.append(int((batch["xt"] == MASK).sum()))

    def on_validation_end(self, trainer, module):
        self.seen.append(self.counter.frame_count)


@pytest.mark.parametrize("large", [False, True], ids=["logits", "statistics"])
@pytest.mark.parametrize("model", [MaskedDiffusion, BlockDiffusion])
def test_nothing_is_compiled_after_the_first_validation(model, large):
    """However many positions are masked, and as samples of a batch end one by one."""
    torch._dynamo.reset()
    counter = CompileCounter()
    backbone = TransformerBackbone(V, 16, 24, num_layers=2, num_heads=2, max_length=LENGTH)
    for layer in backbone.layers:
        layer.compile(backend=counter)
    blocks = {"block_size": 4} if model is BlockDiffusion else {}
    module = model(backbone, MASK, forward_process=ProgressiveUnmasking(4, Confidence(), 0.5), scheduler=None, **blocks)
    module.large_vocabulary = 1 if large else None
    compilations = Compilations(counter)
    callbacks: list[pl.Callback] = [compilations]
    if not blocks:
        callbacks.append(GenerationEvaluation({"solved": SudokuSolved()}, [Sampler(threshold=0.2)]))
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=24, val_check_interval=6, check_val_every_n_epoch=None, num_sanity_val_steps=0,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(module, DataLoader(rows(40, 0), batch_size=4, shuffle=True), DataLoader(rows(10, 1), batch_size=4))
    assert len(set(compilations.masked)) > 5
    if not blocks:
        assert set(compilations.rows) == {4, 2}
    if not blocks:
        assert compilations.before[0] == 0  # the trial of the first batch has another shape
    assert compilations.seen[0] > 0
    assert compilations.seen == compilations.seen[:1] * 4


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.train: dict[int, float] = {}

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.train[trainer.fit_loop.epoch_loop.total_batch_idx] = outputs["loss"].item()


def a_module(kind: str) -> pl.LightningModule:
    torch.manual_seed(0)
    backbone = TransformerBackbone(
        V, 16, 24, num_layers=2, num_heads=2, max_length=LENGTH, causal=kind == "autoregressive"
    )
    given = {"optimizer": partial(torch.optim.AdamW, lr=0.01), "scheduler": None}
    puma = ProgressiveUnmasking(4, Confidence(), 0.5)
    if kind == "autoregressive":
        return AutoregressiveLM(backbone, MASK, **given)
    if kind == "block":
        return BlockDiffusion(backbone, MASK, 4, forward_process=puma, **given)
    module = MaskedDiffusion(backbone, MASK, RandomMasking() if kind == "random" else puma, **given)
    module.large_vocabulary = 1 if kind == "statistics" else None
    return module


def a_trainer(steps: int = 8, folder=None) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", max_steps=steps, val_check_interval=4, check_val_every_n_epoch=None, logger=False,
        accumulate_grad_batches=2, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[Losses()], default_root_dir=folder,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("random", "eager"),
        ("puma", "eager"),
        *(
            pytest.param(*more, marks=pytest.mark.slow)
            for more in (
                ("block", "eager"),
                ("statistics", "eager"),
                ("autoregressive", "eager"),
                ("puma", "aot_eager"),
                ("block", "aot_eager"),
            )
        ),
    ],
)
def test_a_compiled_module_trains_resumes_and_predicts_as_the_module_does(tmp_path, kind, backend):
    """The host's part of a step, seeds and chains and logs, stays out of the graph; its checkpoint is the module's."""

    def results(prepared):
        torch._dynamo.reset()
        pl.seed_everything(0, verbose=False)
        given = 1 if kind == "autoregressive" else 0
        train, val = ([{**row, "prompt_mask": row["prompt_mask"] | (torch.arange(LENGTH) < given)} for row in part]
                      for part in (rows(40, 0), rows(10, 1)))  # fmt: skip
        loaders = DataLoader(train, batch_size=4, shuffle=True), DataLoader(val, batch_size=4)
        losses: dict[int, float] = {}
        for steps, path in ((4, None), (8, tmp_path / "4.ckpt")):
            trainer, module = a_trainer(steps, tmp_path), prepared(a_module(kind))
            trainer.fit(module, *loaders, ckpt_path=path)
            trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
            losses |= trainer.callbacks[0].train
            validated = trainer.validate(module, loaders[1], verbose=False)
        assert len(losses) == 16
        predicted = [batch["tokens"] for batch in trainer.predict(module, loaders[1])]
        return losses, validated, torch.cat(predicted), torch.load(tmp_path / "8.ckpt", weights_only=True)["state_dict"]

    plain, compiled = results(lambda module: module), results(partial(torch.compile, backend=backend))
    assert compiled[3].keys() == plain[3].keys()
    if backend == "eager":
        assert compiled[:2] == plain[:2] and torch.equal(compiled[2], plain[2])
        assert all(torch.equal(compiled[3][name], weight) for name, weight in plain[3].items())
    else:
        assert compiled[0] == pytest.approx(plain[0], rel=1e-3)


def test_a_compiled_step_is_one_graph():
    """What is compiled of a step is its whole forward pass, once; nothing of it is compiled again."""
    torch._dynamo.reset()
    counter = CompileCounter()
    module = a_module("puma")
    trainer = a_trainer(6)
    trainer.limit_val_batches = 0
    trainer.fit(torch.compile(module, backend=counter), DataLoader(rows(40, 0), batch_size=4))
    assert counter.frame_count == 1

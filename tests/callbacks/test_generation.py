"""Evaluation by generating."""

import lightning.pytorch as pl
import pytest
import torch
from recorder import record

from puma_lightning import (
    CellAccuracy,
    GenerationEvaluation,
    Margin,
    MaskedDiffusion,
    RandomMasking,
    Sampler,
    SudokuDataModule,
    SudokuSolved,
    TransformerBackbone,
    UnmaskingTrajectory,
    graphs,
)
from puma_lightning.chain.student.recorded import RecordedPasses


class Oracle(torch.nn.Module):
    """Knows the solutions: looks a board up by its clues."""

    vocab_size = 6

    def __init__(self, loader):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.solutions = torch.cat([batch["input_ids"] for batch in loader])

    def forward(self, xt):
        fits = ((xt[:, None] == self.solutions) | (xt[:, None] == 5)).all(-1)
        return 9.0 * torch.nn.functional.one_hot(self.solutions[fits.float().argmax(1)], 6) + self.weight


@pytest.fixture
def data(tmp_path):
    module = SudokuDataModule(
        order=4, num_train=40, num_val=20, num_test=20, eval_batch_size=8, cache_dir=str(tmp_path / "cache")
    )
    module.prepare_data()
    module.setup("validate")
    return module


def validate(data, callback, loaders=None):
    loaders = loaders or data.val_dataloader()
    backbone = Oracle(loaders[0] if isinstance(loaders, list) else loaders)
    module = MaskedDiffusion(backbone, 5, RandomMasking())
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, callbacks=[callback], enable_progress_bar=False, enable_model_summary=False
    )
    trainer.validate(module, loaders, verbose=False)
    return trainer.callback_metrics


def test_a_model_that_knows_the_solutions_solves_everything(data):
    samplers = [Sampler(), Sampler(Margin(), tokens_per_step=3)]
    callback = GenerationEvaluation({"solved": SudokuSolved(), "cells": CellAccuracy()}, samplers)
    metrics = validate(data, callback)
    for sampler in ("confidence_1", "margin_3"):
        assert metrics[f"val/solved/{sampler}"] == 1
        assert metrics[f"val/cells/{sampler}"] == 1
    assert metrics["val/nfe/confidence_1"] == 10  # 6 clues
    assert metrics["val/nfe/margin_3"] == 4
    assert all("(20 sequences" in line for line in callback.summary)
    assert "solved 100.0%" in callback.summary[0]


class Loosely:
    """Batches as somebody's own loader may yield them."""

    def __init__(self, loader, change):
        self.loader, self.change = loader, change

    def __iter__(self):
        return map(self.change, self.loader)

    def __len__(self):
        return len(self.loader)


LOOSELY = {
    "0 and 1": lambda batch: {**batch, "prompt_mask": batch["prompt_mask"].long()},
    "int32": lambda batch: {**batch, "input_ids": batch["input_ids"].int()},
    "nothing given": lambda batch: {"input_ids": batch["input_ids"]},
}


@pytest.mark.parametrize("change", LOOSELY.values(), ids=LOOSELY)
def test_batches_that_training_accepts_are_judged_and_drawn(data, change, tmp_path):
    callback = GenerationEvaluation({"cells": CellAccuracy()}, [Sampler()])
    trajectory = UnmaskingTrajectory(num_examples=1)
    plain = data.val_dataloader()
    module = MaskedDiffusion(Oracle(plain), 5, RandomMasking())
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, callbacks=[callback, trajectory], enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.validate(module, Loosely(plain, change), verbose=False)
    given = "prompt_mask" in change(next(iter(plain)))
    assert trainer.callback_metrics["val/nfe/confidence_1"] == (10 if given else 16)
    assert (trainer.callback_metrics["val/cells/confidence_1"] == 1) == given
    assert trajectory.history


def test_num_examples_limits_the_work(data):
    callback = GenerationEvaluation({"solved": SudokuSolved()}, [Sampler()], num_examples=11)
    validate(data, callback)
    assert "(11 sequences" in callback.summary[0]


def test_several_sets_are_told_apart(data):
    loader = data.val_dataloader()
    callback = GenerationEvaluation({"solved": SudokuSolved()}, [Sampler()])
    metrics = validate(data, callback, [loader, loader])
    assert metrics["val/solved/confidence_1"] == metrics["val/solved/confidence_1/1"] == 1


def test_nothing_that_could_mislead_is_accepted():
    solved = {"solved": SudokuSolved()}
    for arguments in (
        {"samplers": []},
        {"samplers": [Sampler(), Sampler()]},
        {"samplers": [Sampler()], "num_examples": 0},
    ):
        with pytest.raises(ValueError, match=r"sampler|num_examples"):
            GenerationEvaluation(solved, **arguments)


def test_later_validations_replay_what_the_first_recorded(data, tmp_path, monkeypatch):
    """With the weights of then, in the precision of the run: the same is logged to the last bit, text and all."""

    class Logged(pl.Callback):
        def on_validation_epoch_end(self, trainer, module):
            values.append({name: value.item() for name, value in trainer.callback_metrics.items()})

    data.setup("fit")
    made = []
    init = RecordedPasses.__init__
    monkeypatch.setattr(RecordedPasses, "__init__", lambda *given, **o: made.append(given[0]) or init(*given, **o))
    runs = []
    for replayed in (True, False):
        pl.seed_everything(0)
        values = []
        backbone = TransformerBackbone(6, 16, 24, num_layers=1, num_heads=2, max_length=16)
        module = MaskedDiffusion(
            backbone, 5, RandomMasking(), captured="auto", optimizer=lambda p: torch.optim.SGD(p, 0.5)
        )
        samplers = [Sampler(), Sampler(threshold=0.3), Sampler(temperature=1.0, tokens_per_step=2)]
        trainer = pl.Trainer(
            accelerator="cpu", precision="bf16-mixed", max_epochs=3, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, limit_train_batches=2,
            callbacks=[GenerationEvaluation({"cells": CellAccuracy()}, samplers), Logged()],
        )  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(graphs, "can_record", lambda device: True)
            patch.setattr(graphs, "record", record)
            if not replayed:
                patch.setattr(RecordedPasses, "_record", RecordedPasses._pass)
            made.clear()
            trainer.fit(module, data.train_dataloader(), data.val_dataloader())
        assert len(made) == 3 * 2  # samplers, and shapes: of 20 sequences in batches of 8 the last has 4
        runs.append(values)
    assert runs[0] == runs[1] and len(runs[0]) == 4
    assert len({values["val/cells/confidence_1"] for values in runs[0][1:]}) > 1

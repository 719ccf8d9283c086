"""Recorded training steps: on a CPU a recorder stands in for CUDA graphs, which refuses what they refuse."""

import subprocess
import sys
import tempfile
import warnings
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import EMAWeightAveraging, LambdaCallback, ModelCheckpoint
from recorder import use_recorder
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from puma_lightning import (
    AutoregressiveLM,
    BlockDiffusion,
    ChainDiagnostics,
    ComplementaryMasking,
    ForwardProcess,
    MaskedDiffusion,
    MixedMasking,
    ProgressiveUnmasking,
    RandomMasking,
    SelfAlignedMasking,
    ShortStays,
    TransformerBackbone,
    WarmupCosine,
    pad_collate,
)
from puma_lightning.training import averaging
from puma_lightning.training import captured as captured_module
from puma_lightning.training.captured import RowsOnDevice
from puma_lightning.training.sequences import CleanSequences
from puma_lightning.training.supply import DeviceSupply

MASK, LENGTH, BATCH = 9, 12, 4
ROWS = [
    {"input_ids": row, "prompt_mask": torch.arange(LENGTH) < 2}
    for row in torch.randint(MASK, (64, LENGTH), generator=torch.Generator().manual_seed(3))
]
QUIET: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
AdamW = partial(torch.optim.AdamW, lr=1e-2, fused=True)
Schedule = partial(WarmupCosine, warmup_steps=3)


class EveryLoss(pl.Callback):
    every_step = True

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))


class Endless(IterableDataset):
    def __iter__(self):
        yield from ROWS

    def __len__(self):
        return len(ROWS)

    one_length = True


class Drops(nn.Module):
    """A backbone with dropout, whose numbers are a function of the step."""

    vocab_size = MASK + 1

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(MASK + 1, 16), nn.Dropout(0.3), nn.Linear(16, MASK + 1))

    def forward(self, input_ids):
        return self.layers(input_ids)


class Buffered(Drops):
    """With buffers that change, of which one is of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("moving", torch.zeros(3))

    def forward(self, input_ids):
        if self.training:
            self.seen.add_(1)
            self.moving.add_(0.25)
        return super().forward(input_ids)


def transformer(**options: Any) -> TransformerBackbone:
    return TransformerBackbone(MASK + 1, 16, 24, num_layers=2, num_heads=2, max_length=LENGTH, **options)


@pytest.fixture
def recorded(monkeypatch):
    """Have work be recorded on the CPU, and return the rows of all runs."""
    use_recorder(monkeypatch)
    made: list[RowsOnDevice] = []
    begin = RowsOnDevice.__init__

    def noting(rows, *arguments):
        begin(rows, *arguments)
        made.append(rows)

    monkeypatch.setattr(RowsOnDevice, "__init__", noting)
    return made


def is_recorded(rows: RowsOnDevice) -> bool:
    """Whether refill, which a pool has none of, and step have been replayed."""
    groups, pooled = list(rows._groups.values()), rows.stream.pool_name is not None
    return all(g.refill.recorded != pooled and any(work.recorded for work in g.work.values()) for g in groups) and bool(
        groups
    )


def run(
    captured: bool | str,
    process: ForwardProcess | None = None,
    model: Any = MaskedDiffusion,
    backbone: Any = transformer,
    data: Any = ROWS,
    large: bool = False,
    steps: int = 20,
    callbacks: Any = (),
    ckpt: Any = None,
    optimizer: Any = AdamW,
    scheduler: Any = Schedule,
    executions: int = 1,
    shuffle: bool = True,
    accelerator: str = "cpu",
    **options: Any,
) -> tuple[list[float], dict[str, Tensor], pl.Trainer]:
    pl.seed_everything(1, verbose=False)
    mine = {} if process is None else {"forward_process": process}
    module = model(
        backbone(), MASK, optimizer=optimizer, scheduler=scheduler, captured=captured, steps_per_execution=executions,
        **mine,
    )  # fmt: skip
    module.large_vocabulary = 1 if large else None
    losses = EveryLoss()
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    options = {"enable_checkpointing": saves, "gradient_clip_val": 0.5, **options}
    options |= {"accelerator": accelerator, "devices": 1, "max_steps": steps, "callbacks": [losses, *callbacks]}
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(**QUIET, default_root_dir=folder, **options)
        loader = DataLoader(data, BATCH, shuffle=shuffle and not isinstance(data, IterableDataset))
        trainer.fit(module, loader, DataLoader(ROWS[:8], 4), ckpt_path=ckpt)
    return losses.losses, module.state_dict(), trainer


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


PROCESSES = {
    "puma": ProgressiveUnmasking(4),
    "threshold": ProgressiveUnmasking(4, threshold=0.2),
    "schedule": ProgressiveUnmasking([[0, 3], [8, 5]], threshold=0.2),
    "random": RandomMasking(),
    "mixed": MixedMasking(0.5, 3),
    "self-aligned": SelfAlignedMasking(),
    "complementary": ComplementaryMasking(),
    "short stays": ShortStays(0.3, 4, threshold=0.2),
    "a policy of one's own": ProgressiveUnmasking(4, lambda logits, xt: logits.amax(-1)),
    "a pool": ProgressiveUnmasking([[0, 3], [8, 5]], threshold=0.2, pool=24),
    "a pool of all": ProgressiveUnmasking([[0, 3], [8, 5]], pool="all"),
}
SETUPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 3},
    "executions": {"executions": 4},
    "both": {"accumulate_grad_batches": 2, "executions": 2, "steps": 16},
    "half precision": {"precision": "bf16-mixed"},
    "double precision": {"precision": "64-true"},
    "dropout": {"backbone": Drops},
    "clipping by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "validations": {"val_check_interval": 5, "check_val_every_n_epoch": None},
    "short epochs": {"limit_train_batches": 5, "accumulate_grad_batches": 2},
    "an iterable data set": {"data": Endless(), "limit_train_batches": 16},
    "in order": {"shuffle": False},
    # Which has Lightning drop the gradients of the batches before it.
    "a validation within a step": {"accumulate_grad_batches": 3, "val_check_interval": 4, "limit_train_batches": 12},
}


@pytest.mark.parametrize("process", PROCESSES)
def test_a_recorded_run_computes_the_same_to_the_last_bit(recorded, process):
    """Whatever moves the chains: losses, weights, and how many sequences were taken."""
    losses, weights, trainer = run(False, PROCESSES[process])
    again, same_weights, other = run(True, PROCESSES[process])
    assert again == losses and same(weights, same_weights)
    assert [is_recorded(rows) for rows in recorded] == [True]
    modules = [t.lightning_module for t in (trainer, other)]
    assert modules[0].stream.sequences.position == modules[1].stream.sequences.position


@pytest.mark.parametrize("setup", SETUPS)
def test_so_it_does_in_every_set_up(recorded, setup):
    options = {"process": ProgressiveUnmasking(3, threshold=0.2), **SETUPS[setup]}
    losses, weights, _ = run(False, **options)
    again, same_weights, _ = run(True, **options)
    assert again == losses and same(weights, same_weights)
    assert [is_recorded(rows) for rows in recorded] == [True]


@pytest.mark.parametrize("group_bytes", [1, 2**26])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"update_every_n_steps": 3},
        {"update_starting_at_step": 7},
        {"update_starting_at_epoch": 0, "update_starting_at_step": 100},
        {"update_starting_at_epoch": 0, "update_starting_at_step": 18},
        {"use_buffers": True},
        {"device": "cpu"},
        {"precision": "bf16-true"},
    ],
    ids=str,
)
def test_averaged_weights_are_those_of_lightning(monkeypatch, recorded, options, group_bytes):
    """The average is part of the step, and the callback knows of it; so do validations, which use it."""
    monkeypatch.setattr(averaging, "GROUP_BYTES", group_bytes)
    found = []
    for captured in (False, True):
        given = {name: value for name, value in options.items() if name != "precision"}
        average = EMAWeightAveraging(**{"decay": 0.8, "use_buffers": False, **given})
        losses, weights, trainer = run(
            captured,
            ProgressiveUnmasking(3),
            callbacks=[average],
            accumulate_grad_batches=2,
            backbone=Buffered,
            precision=options.get("precision", "32-true"),
        )
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        state = average._average_model.state_dict()
        found.append((losses, metrics, average.state_dict()))
        found[-1] += tuple({name: value.tolist() for name, value in each.items()} for each in (weights, state))
    assert found[0] == found[1]
    assert [is_recorded(rows) for rows in recorded] == [True] and len(recorded[0]._averages) == 1


@pytest.mark.parametrize("block_size", [3, [[0, 3], [9, 6]]], ids=["blocks", "a curriculum of blocks"])
@pytest.mark.parametrize("pool", [None, 16, "all"])
def test_so_do_block_models(recorded, block_size, pool):
    model = partial(BlockDiffusion, block_size=block_size)
    losses, weights, _ = run(False, ProgressiveUnmasking(2, pool=pool), model)
    again, same_weights, _ = run(True, ProgressiveUnmasking(2, pool=pool), model)
    assert again == losses and same(weights, same_weights) and is_recorded(recorded[0])


@pytest.mark.parametrize("large", [False, True])
def test_so_do_autoregressive_models(recorded, large):
    model, backbone = partial(AutoregressiveLM, eos_id=0), partial(transformer, causal=True)
    losses, weights, _ = run(False, None, model, backbone, large=large)
    again, same_weights, _ = run(True, None, model, backbone, large=large)
    assert is_recorded(recorded[0])
    assert again == pytest.approx(losses, rel=1e-5)
    assert large or (again == losses and same(weights, same_weights))


def test_a_large_vocabulary_is_recorded_for_buckets_of_masked_positions(monkeypatch, recorded):
    """With rows of no weight, so that sums may differ in their last bits; and one recording for a bucket."""
    monkeypatch.setattr(captured_module, "BUCKET", 8)
    losses, weights, _ = run(False, ProgressiveUnmasking(3, threshold=0.2), large=True, steps=30)
    again, same_weights, _ = run(True, ProgressiveUnmasking(3, threshold=0.2), large=True, steps=30)
    assert again == pytest.approx(losses, rel=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, same_weights[name], rtol=1e-3, atol=1e-5)
    buckets = [key[-1] for key in recorded[0]._groups[0].work if key[:-1] == (1, True, True, False)]
    assert len(buckets) == len(set(buckets)) > 2 and all(number % 8 == 0 for number in buckets)


@settings(max_examples=8, deadline=None)
@given(
    at=st.integers(1, 15),
    before=st.booleans(),
    after=st.booleans(),
    executions=st.sampled_from([1, 2, 4]),
    accumulate=st.sampled_from([1, 2]),
    process=st.sampled_from(["threshold", "schedule", "a pool", "a pool of all"]),
    data=st.sampled_from([ROWS, Endless()]),
)
def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path_factory, at, before, after, executions, accumulate, process, data
):
    """Wherever it was saved, with steps recorded or not before and after, and with any number in an execution."""
    folder = tmp_path_factory.mktemp("run")
    data = ROWS if process == "a pool of all" else data
    options = {"process": PROCESSES[process], "accumulate_grad_batches": accumulate, "data": data, "steps": 16}
    if isinstance(data, Endless):
        options["limit_train_batches"] = 16
    with pytest.MonkeyPatch.context() as patch:
        use_recorder(patch)
        losses, weights, _ = run(False, **options)
        saves = ModelCheckpoint(folder, "saved", every_n_train_steps=at)
        saves.on_train_batch_end = partial(_save_at, saves, at)
        first, _, _ = run(before, callbacks=[saves], **options)
        assert first == losses
        second, same_weights, _ = run(after, ckpt=folder / "saved.ckpt", executions=executions, **options)
    assert second == losses[len(losses) - len(second) :] and len(second) == len(losses) - at * accumulate
    assert same(weights, same_weights)


def _save_at(saves: ModelCheckpoint, at: int, trainer: pl.Trainer, *_: Any) -> None:
    whole = trainer.fit_loop.epoch_loop.batch_progress.total.processed % trainer.accumulate_grad_batches == 0
    if trainer.global_step == at and whole:
        trainer.save_checkpoint(f"{saves.dirpath}/saved.ckpt")


class OwnStep(MaskedDiffusion):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx)


class OwnTransfer(MaskedDiffusion):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch


class WatchesGradients(pl.Callback):
    def on_before_optimizer_step(self, trainer, module, optimizer):
        pass


class LooksAtXt(ProgressiveUnmasking):
    recordable = True

    def advance(self, chains, predictions, step, generator=None):
        assert chains.masked.any()
        return super().advance(chains, predictions, step, generator)


class DependsOnTheStep(ProgressiveUnmasking):
    def advance(self, chains, predictions, step, generator=None):
        return super().advance(chains, predictions, step, generator)


class LooksAtTokens(Drops):
    def forward(self, input_ids):
        return super().forward(input_ids) * (2 if (input_ids == MASK).any() else 1)


def _hooked(how: str) -> Drops:
    made = Drops()
    {"register_hook": made.layers[0].weight, "register_forward_hook": made.layers}[how].__getattribute__(how)(
        lambda *_: None
    )
    return made


def _with_hook(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


OBSTACLES = {
    "looks, says the backbone": ({"backbone": LooksAtTokens}, "the backbone LooksAtTokens, which looks at a value"),
    "looks, says the policy": (
        {"process": ProgressiveUnmasking(3, lambda logits, xt: logits.amax(-1) + float(xt.sum()))},
        "the policy <function .*which looks at a value",
    ),
    "looks, says the process": ({"process": LooksAtXt(3)}, "advance of LooksAtXt, which looks at a value"),
    "a process of one's own": ({"process": DependsOnTheStep(3)}, "advance of DependsOnTheStep, which does not say"),
    "a step of one's own": ({"model": OwnStep}, "training_step of OwnStep"),
    "a transfer of one's own": ({"model": OwnTransfer}, "on_after_batch_transfer of OwnTransfer"),
    "a callback within it": ({"callbacks": [WatchesGradients()]}, "on_before_optimizer_step of WatchesGradients"),
    "a hook": ({"backbone": lambda: _hooked("register_forward_hook")}, "a hook on backbone.layers"),
    "a hook on a gradient": ({"backbone": lambda: _hooked("register_hook")}, "a hook on the gradient of .*layers.0"),
    "a callback made of functions": (
        {"callbacks": [LambdaCallback(on_before_optimizer_step=lambda *_: None)]},
        "on_before_optimizer_step of LambdaCallback",
    ),
    "a hook on the optimizer": ({"optimizer": lambda params: _with_hook(AdamW(params))}, "a hook on the step of AdamW"),
    "a scheduler of more than the rate": (
        {"scheduler": partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.01, total_steps=40)},
        "the scheduler OneCycleLR with cycle_momentum",
    ),
    "anomalies": ({"detect_anomaly": True}, "detect_anomaly"),
    "an optimizer": ({"optimizer": partial(torch.optim.SGD, lr=0.1)}, "the optimizer SGD, which is not capturable"),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_what_stands_in_the_way_is_named_before_training(recorded, obstacle):
    """With ``captured: true`` it is an error, with ``auto`` it is said once, and the run is the one without."""
    options, message = OBSTACLES[obstacle]
    with pytest.raises(ValueError, match=f"captured: expected .* recorded, got {message}.*set captured to false"):
        run(True, **options)
    losses, weights, _ = run(False, **options)
    module_losses, same_weights, _ = run("auto", **options)
    assert module_losses == losses and same(weights, same_weights) and not recorded


def test_a_data_module_that_changes_batches_stands_in_the_way(recorded):
    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(ROWS, BATCH)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch

    module = MaskedDiffusion(transformer(), MASK, optimizer=AdamW, scheduler=None, captured=True)
    trainer = pl.Trainer(accelerator="cpu", max_steps=2, enable_checkpointing=False, **QUIET)
    with pytest.raises(ValueError, match="got on_after_batch_transfer of the DataModule"):
        trainer.fit(module, datamodule=Data())


def test_auto_says_what_stands_in_the_way(recorded):
    module = MaskedDiffusion(Drops(), MASK, optimizer=partial(torch.optim.SGD, lr=0.1), scheduler=None, captured="auto")
    trainer = pl.Trainer(accelerator="cpu", max_steps=2, enable_checkpointing=False, **QUIET)
    with pytest.warns(UserWarning, match="captured: steps are not recorded.*the optimizer SGD"):
        trainer.fit(module, DataLoader(ROWS, BATCH))


def test_sequences_of_different_lengths_are_an_obstacle(recorded):
    module = MaskedDiffusion(transformer(), MASK, scheduler=None, optimizer=AdamW, captured=True)
    rows = [{"input_ids": row["input_ids"][: 8 + i % 3]} for i, row in enumerate(ROWS)]
    trainer = pl.Trainer(accelerator="cpu", max_steps=2, enable_checkpointing=False, **QUIET)
    with pytest.raises(ValueError, match="got sequences of different lengths, or padding"):
        trainer.fit(module, DataLoader(rows, BATCH, collate_fn=pad_collate))


class LaterPadded(Dataset):
    """Of one length as stored, as those of text are; what follows some answers is padding."""

    one_length = True

    def __init__(self, first: int, shorter: bool) -> None:
        self.first, self.shorter = first, shorter

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        real = torch.arange(LENGTH) < (LENGTH if index < self.first else LENGTH - 3)
        if not self.shorter and index % 2:
            real = torch.ones(LENGTH, dtype=torch.bool)
        return {**ROWS[index], "attention_mask": real.long()}


@pytest.mark.parametrize("first", [8, 33, 50])
@pytest.mark.parametrize("shorter", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_where_other_lengths_come_later_the_run_goes_on_without(recorded, first, shorter, accumulate):
    """As if nothing had been recorded; or it ends, where it must record."""
    options: dict[str, Any] = {"data": LaterPadded(first, shorter), "shuffle": False, "steps": 60 // accumulate}
    options |= {"process": ProgressiveUnmasking(3, threshold=0.2), "accumulate_grad_batches": accumulate}
    losses, weights, one = run(False, **options)
    again, same_weights, other = run("auto", **options)
    assert again == losses and same(weights, same_weights) and len(recorded) == 1
    positions = [trainer.lightning_module.stream.sequences.position for trainer in (one, other)]
    assert positions[0] == positions[1]
    with pytest.raises(ValueError, match=r"captured: expected .*got sequences of different lengths, or padding"):
        run(True, **options)


def test_on_a_cpu_auto_is_the_run_without_and_true_is_refused():
    losses, weights, _ = run(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, same_weights, _ = run("auto")
    assert again == losses and same(weights, same_weights)
    with pytest.raises(ValueError, match=r"captured: expected .*got a run on a device of type cpu.*captured to false"):
        run(True)
    with pytest.raises(ValueError, match="captured: expected true, false or auto, got 'yes'"):
        run("yes")


class FailsToRecord(Drops):
    """Looks at a value while it is trained, so that only the recording finds out."""

    def forward(self, input_ids):
        if self.training:
            assert (input_ids >= 0).any()
        return super().forward(input_ids)


class FailsToStart(ProgressiveUnmasking):
    """Looks at a value when it starts chains in training, so that only the recording finds out."""

    recordable = True
    trained = False

    def start(self, chains, generator=None):
        assert not self.trained or chains.masked.any()
        return super().start(chains, generator)

    def advance(self, chains, predictions, step, generator=None):
        self.trained = step > 0
        return super().advance(chains, predictions, step, generator)


def test_so_has_one_of_the_refill(recorded):
    processes = [FailsToStart(3, threshold=0.2) for _ in range(3)]
    losses, weights, _ = run(False, processes[0])
    again, same_weights, _ = run("auto", processes[1])
    assert again == losses and same(weights, same_weights) and len(recorded) == 1
    with pytest.raises(ValueError, match=r"got a forward process that cannot: Look"):
        run(True, processes[2])


@pytest.mark.parametrize("setup", ["plain", "accumulation", "executions"])
def test_a_recording_that_fails_has_done_nothing(recorded, setup):
    """The run goes on without, as if nothing had been tried; or, where it must record, ends."""
    options = {"backbone": FailsToRecord, "process": ProgressiveUnmasking(3, threshold=0.2), **SETUPS[setup]}
    losses, weights, _ = run(False, **options)
    again, same_weights, _ = run("auto", **options)
    assert again == losses and same(weights, same_weights) and len(recorded) == 1
    with pytest.raises(ValueError, match=r"captured: expected a training step that can be recorded.*Look"):
        run(True, **options)


def test_a_run_leaves_trainer_and_stream_as_they_were(recorded):
    """So a second fit of the same module and Trainer trains, and so it does without recordings."""
    found = []
    for captured in (False, True):
        _, _, trainer = run(captured, steps=6)
        module = trainer.lightning_module
        assert "run" not in vars(trainer.fit_loop.epoch_loop.automatic_optimization)
        assert module.stream.on_device is None
        batch = module.stream.peek()
        trainer.fit_loop.epoch_loop.max_steps = 12
        trainer.fit(module, DataLoader(ROWS, BATCH, shuffle=True))
        assert trainer.global_step == 12
        found.append((batch["xt"].tolist(), module.state_dict()["backbone.embed_tokens.weight"].tolist()))
    assert found[0] == found[1]


@pytest.mark.parametrize("model", [MaskedDiffusion, partial(BlockDiffusion, block_size=[[0, 3], [9, 6]])])
def test_what_the_chains_did_is_seen_although_no_step_is_watched(recorded, model):
    """All that ``ChainDiagnostics`` logs, at several validations, one of them before all rows are in use."""
    found = []
    options = {"val_check_interval": 5, "check_val_every_n_epoch": None, "accumulate_grad_batches": 2}
    for captured in (False, True):
        watches = ChainDiagnostics(num_sequences=4)
        losses, _, _ = run(captured, ProgressiveUnmasking(3, threshold=0.2), model, callbacks=[watches], **options)
        found.append((losses, watches.history))
    assert found[0] == found[1] and len(found[0][1]) == 8
    assert {"loss_1", "by_count", "length", "sequences", "mismatch"} <= set(found[0][1][-1])
    assert is_recorded(recorded[0])


def test_a_loss_that_is_no_number_stops_a_recorded_run(recorded):
    """With the step in which it appeared, and not only in the last of its execution."""

    class Spoils(pl.Callback):
        every_step = True

        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == 13:
                module.backbone.layers[2].bias.data.fill_(torch.nan)

    with pytest.raises(ValueError, match=r"got one that is not finite.*by optimizer step 13; go on from"):
        run(True, RandomMasking(), backbone=Drops, callbacks=[Spoils()], executions=4)
    assert is_recorded(recorded[0])


def test_hooks_are_given_what_has_been_trained_on(recorded):
    """Although the rows move on in place; and at the start of the next batch they hold the next sequences."""

    class Notes(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            chains = batch["chains"]
            shown = (batch["input_ids"], batch["prompt_mask"], batch["xt"], chains.xt, chains.stage, chains.done)
            self.seen.append([tensor.tolist() for tensor in shown])

    notes = [Notes(), Notes()]
    for captured, each in zip((False, True), notes, strict=True):
        run(captured, ProgressiveUnmasking(3, threshold=0.2), callbacks=[each], accumulate_grad_batches=2)
    assert notes[0].seen == notes[1].seen and len(notes[0].seen) == 40


IN_TWO_PROCESSES = """
import sys, torch, lightning.pytorch as pl
from torch.utils.data import DataLoader
from puma_lightning import MaskedDiffusion, TransformerBackbone, graphs
graphs.can_record = lambda device: True
graphs.record = None  # must not be called
rows = [{"input_ids": row} for row in torch.randint(9, (48, 12), generator=torch.Generator().manual_seed(0))]
weights = []
for captured in (False, "auto", True):
    pl.seed_everything(1)
    backbone = TransformerBackbone(10, 16, 24, num_layers=1, num_heads=2, max_length=12)
    module = MaskedDiffusion(backbone, 9, captured=captured)
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp_notebook", max_steps=6, logger=False,
                         enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(module, DataLoader(rows, 4, shuffle=True))
    weights.append(torch.cat([p.flatten() for p in module.parameters()]))
    if captured == "auto":
        print("same:", torch.equal(*weights))
"""


def test_two_processes_train_as_they_do_without_and_say_so(tmp_path):
    """Nothing is recorded around the exchange of gradients."""
    (tmp_path / "run.py").write_text(IN_TWO_PROCESSES)
    command = [sys.executable, "run.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert "same: True" in done.stdout, done.stderr[-2000:]
    where = "2 process(es) under DDPStrategy, which share gradients within it"
    assert f"steps are not recorded, and a GPU may wait for the host: {where}" in done.stderr
    assert f"captured: expected a training step that can be recorded, got {where}" in done.stderr
    assert done.returncode


class Freezes(pl.Callback):
    """Has a layer not trained from some step on, and trained again later."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step in (9, 17):
            module.backbone.layers[2].requires_grad_(trainer.global_step == 17)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_which_weights_are_trained_may_change(recorded, accumulate):
    """What was recorded before would train the others, and is recorded anew."""
    options = {"backbone": Drops, "accumulate_grad_batches": accumulate, "steps": 28}
    losses, weights, _ = run(False, ProgressiveUnmasking(3), callbacks=[Freezes()], **options)
    again, same_weights, _ = run(True, ProgressiveUnmasking(3), callbacks=[Freezes()], **options)
    assert again == losses and same(weights, same_weights) and is_recorded(recorded[0])


def test_steps_that_can_never_be_recorded_are_told(recorded):
    """As one setting of the optimizer changes in all of them."""

    class Changes(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            trainer.optimizers[0].param_groups[0]["weight_decay"] = trainer.global_step * 1e-3

    found = []
    for captured in (False, "auto"):
        pl.seed_everything(1, verbose=False)
        module = MaskedDiffusion(transformer(), MASK, optimizer=AdamW, scheduler=None, captured=captured)
        trainer = pl.Trainer(
            accelerator="cpu", max_steps=20, enable_checkpointing=False, callbacks=[Changes()], **QUIET
        )
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer.fit(module, DataLoader(ROWS, BATCH, shuffle=True))
        told = [str(warning.message) for warning in said if "16 steps in a row" in str(warning.message)]
        found.append((module.state_dict(), told))
    assert same(found[0][0], found[1][0]) and (len(found[0][1]), len(found[1][1])) == (0, 1)


# --- on a GPU ---

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")


@on_a_gpu
@pytest.mark.parametrize("setup", ["plain", "accumulation", "executions", "half precision", "dropout", "validations"])
@pytest.mark.parametrize("process", ["threshold", "schedule", "random"])
def test_on_a_gpu_a_recorded_run_is_the_one_of_the_same_work_unrecorded(monkeypatch, process, setup):
    """Up to rounding: kernels may add up in another order."""
    options = {"process": PROCESSES[process], "accelerator": "gpu", "steps": 24, **SETUPS[setup]}
    losses, weights, _ = run(True, **options)
    monkeypatch.setattr(RowsOnDevice, "_is_usual", lambda rows, group: False)
    again, same_weights, _ = run(True, **options)
    assert again == pytest.approx(losses, rel=2e-2 if setup == "half precision" else 1e-3)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, same_weights[name], rtol=5e-2, atol=5e-3)


@on_a_gpu
@pytest.mark.parametrize("large", [False, True])
def test_on_a_gpu_a_resumed_recorded_run_is_the_uninterrupted_one(tmp_path, large):
    """The same sequences, masks and order of positions; losses up to rounding."""
    options = {"process": PROCESSES["threshold"], "accelerator": "gpu", "steps": 24, "large": large}
    saves = ModelCheckpoint(tmp_path, "saved", every_n_train_steps=9)
    saves.on_train_batch_end = partial(_save_at, saves, 9)
    losses, _, first = run(True, callbacks=[saves], **options)
    second, _, again = run(True, ckpt=tmp_path / "saved.ckpt", executions=3, **options)
    assert second == pytest.approx(losses[9:], rel=1e-3)
    positions = [trainer.lightning_module.stream.sequences.position for trainer in (first, again)]
    assert positions[0] == positions[1]


@on_a_gpu
def test_on_a_gpu_a_step_does_not_wait_before_it_is_recorded(monkeypatch):
    """CUDA's own debug mode is the judge of the steps that are taken as they are."""
    train = RowsOnDevice._train

    def strictly(rows, *arguments):
        torch.cuda.set_sync_debug_mode("error" if rows.step else "default")  # in the first, moments are made
        try:
            return train(rows, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(RowsOnDevice, "_train", strictly)
    losses, _, _ = run(True, PROCESSES["threshold"], accelerator="gpu", callbacks=[ChainDiagnostics()])
    assert len(losses) == 20


# --- the supply ---


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 99),
    batch=st.integers(1, 4),
    room=st.integers(2, 9),
    settled=st.lists(st.integers(0, 90), max_size=3),
)
def test_rows_take_the_sequences_of_the_supply_in_their_order(seed, batch, room, settled):
    """However many a step takes, and although the host learns of it late; none is left out or taken twice."""
    data = [{"input_ids": torch.full((3,), i % MASK)} for i in range(500)]
    sequences = CleanSequences(DataLoader(data, batch), MASK, MASK + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("puma_lightning.training.supply.STEPS", room)
        supply = DeviceSupply(sequences, batch, 3, torch.device("cpu"))
    draws, taken = torch.Generator().manual_seed(seed), 0
    for step in range(90):
        supply.make_ready()
        number = int(torch.randint(batch + 1, (), generator=draws))
        names = supply.upcoming()["input_ids"][:number, 0]
        assert names.tolist() == [i % MASK for i in range(taken, taken + number)]
        supply.take(torch.tensor(number))
        taken += number
        if torch.rand((), generator=draws) < 0.3:
            supply.note()
        if step in settled:
            supply.settle()
            assert sequences.position == taken
    supply.settle()
    sequences.give_back()
    assert sequences.position == taken
    assert sequences.take(5)["input_ids"][:, 0].tolist() == [i % MASK for i in range(taken, taken + 5)]

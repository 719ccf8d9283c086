"""What is told of the chains is what they did."""

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure
from torch.utils.data import DataLoader

from puma_lightning import (
    AutoregressiveLM,
    BlockDiffusion,
    ChainDiagnostics,
    Confidence,
    LeftToRight,
    MaskedDiffusion,
    ProgressiveUnmasking,
    RandomMasking,
    Sampler,
    TransformerBackbone,
)
from puma_lightning.callbacks.diagnostics import mismatch

V, MASK, LENGTH, B = 7, 6, 12, 8
few = settings(max_examples=25, deadline=None)


def rows(number: int = 64):
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(MASK, (number, LENGTH), generator=generator)
    return [{"input_ids": row, "prompt_mask": torch.arange(LENGTH) < 2 * (i % 3)} for i, row in enumerate(x0)]


class Steps(Callback):
    """The loss of every step, and its chains."""

    def __init__(self):
        self.losses, self.batches = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        self.batches.append({**batch, "chains": batch["chains"].map(torch.clone)})


def run(
    process,
    tmp_path,
    steps=24,
    every=24,
    diagnostics=True,
    model=MaskedDiffusion,
    batch_size=B,
    num_sequences=64,
    logger=False,
    **options,
):
    pl.seed_everything(0, verbose=False)
    backbone = TransformerBackbone(V, 16, 24, num_layers=1, num_heads=2, max_length=LENGTH)
    large = options.pop("large", None)
    module = model(backbone, MASK, forward_process=process, scheduler=None, **options)
    module.large_vocabulary = large
    callback, seen = ChainDiagnostics(num_sequences=num_sequences), Steps()
    if not logger:
        callback.draw = Figure  # an empty picture is quick to draw
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, val_check_interval=every, check_val_every_n_epoch=None,
        num_sanity_val_steps=0, logger=pl.loggers.CSVLogger(tmp_path) if logger else False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, max_epochs=-1, default_root_dir=tmp_path,
        callbacks=[callback, seen] if diagnostics else [seen],
    )  # fmt: skip
    data = DataLoader(rows(), batch_size=batch_size, shuffle=True)
    trainer.fit(module, data, DataLoader(rows(16), batch_size=B))
    return callback, seen, module, trainer


# --- mismatch ---


def orders(seed: int, given: torch.Tensor) -> torch.Tensor:
    """A sampler's order: passes of two positions."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.rand(given.shape, generator=generator).masked_fill(given, 2).argsort(1).argsort(1)
    return (ranks // 2).masked_fill(given, -1)


@few
@given(seed=st.integers(0, 10**6), passes=st.integers(0, 1))
def test_the_masks_of_the_sampler_itself_do_not_mismatch(seed, passes):
    given_ = torch.rand(6, 9, generator=torch.Generator().manual_seed(seed)) < 0.2
    order = orders(seed, given_)
    number = mismatch(~given_ & (order > passes), given_, order)
    assert number == pytest.approx(0, abs=1e-6)


def test_random_masks_mismatch_by_one_on_average_and_those_in_reverse_by_more():
    generator = torch.Generator().manual_seed(1)
    given_ = torch.rand(4000, 9, generator=generator) < 0.3
    order = orders(2, given_)
    assert mismatch(~given_ & (torch.rand(4000, 9, generator=generator) < 0.5), given_, order) == pytest.approx(
        1, abs=0.03
    )
    assert mismatch(~given_ & (order < 2), given_, order) > 1.3


def test_a_pass_that_is_only_partly_needed_counts_in_part():
    """Two of four positions revealed, where the sampler reveals three at once and then the last."""
    order, given_ = torch.tensor([[0, 0, 0, 1]]), torch.zeros(1, 4).bool()
    # Each of the three counts 2/3; by chance one position is shared, and two at best.
    assert mismatch(torch.tensor([[False, False, True, True]]), given_, order) == pytest.approx(1 - 1 / 3)
    assert mismatch(torch.tensor([[True, True, False, False]]), given_, order) == pytest.approx(1 + 1 / 3)


def test_sequences_without_an_order_are_left_out():
    order = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1]])
    masked = torch.tensor([[False, False, True, True]] * 2)
    assert mismatch(masked, torch.zeros(2, 4).bool(), order) == pytest.approx(0)


def test_the_sequences_compared_are_of_all_stages(tmp_path):
    """Though neighbouring slots share a stage as long as they live."""
    options = {"steps": 16, "every": 1, "batch_size": 32, "sampler": Sampler(LeftToRight())}
    few_, all_ = (
        run(ProgressiveUnmasking(8, LeftToRight()), tmp_path, num_sequences=number, **options)[0] for number in (8, 64)
    )
    for one, other in zip(few_.history[3:], all_.history[3:], strict=True):
        assert one["mismatch"] == pytest.approx(other["mismatch"], abs=0.3)


def test_validation_outside_of_a_fit_leaves_chains_alone(tmp_path):
    callback, _, module, trainer = run(ProgressiveUnmasking(4), tmp_path, steps=7, every=5)
    history = list(callback.history)
    trainer.validate(module, DataLoader(rows(16), batch_size=B), verbose=False)
    assert callback.history == history and [entry["step"] for entry in history] == [5]


def test_puma_masks_are_closer_to_the_samplers_than_random_ones(tmp_path):
    """Of an order that does not change, PUMA's are its own but for the first positions, which are random."""
    found = {}
    for name, process in {"random": RandomMasking(), "puma": ProgressiveUnmasking(8, LeftToRight())}.items():
        callback, *_ = run(process, tmp_path, every=2, batch_size=32, sampler=Sampler(LeftToRight()))
        found[name] = sum(entry["mismatch"] for entry in callback.history) / len(callback.history)
    assert found["puma"] < 0.6 and 0.8 < found["random"] < 1.2


# --- what chains did ---


@pytest.mark.parametrize("large", [None, 1], ids=["logits", "statistics"])
def test_without_a_threshold_a_chain_takes_k_steps(tmp_path, large):
    callback, *_ = run(ProgressiveUnmasking(4), tmp_path, large=large)
    entry = callback.history[-1]
    assert entry["length"] == 4
    assert entry["by_threshold"] == 0
    # From about A/2K revealed to A - A/2K in K - 1 steps.
    assert entry["by_count"] == pytest.approx(10 / 4, rel=0.15)


def test_a_threshold_that_always_fires_ends_a_chain_in_one_step(tmp_path):
    callback, *_ = run(ProgressiveUnmasking(4, threshold=1e-6), tmp_path)
    entry = callback.history[-1]
    assert entry["length"] == 1
    assert "by_count" not in entry  # no chain goes on


@pytest.mark.parametrize("threshold", [None, 0.3])
def test_revealed_positions_are_those_that_boards_of_one_sequence_differ_by(tmp_path, threshold):
    """Counted again from the batches: by count and by threshold together."""
    callback, seen, *_ = run(ProgressiveUnmasking(5, threshold=threshold), tmp_path, steps=20, every=20)
    revealed = steps = 0
    for before, after in zip(seen.batches, seen.batches[1:], strict=False):
        same = (before["input_ids"] == after["input_ids"]).all(1) & (
            (after["xt"] == MASK) <= (before["xt"] == MASK)
        ).all(1)
        revealed += int(((before["xt"] == MASK) & (after["xt"] != MASK))[same].sum())
        steps += int(same.sum())
    entry = callback.history[-1]
    # The last step is seen by the callback alone.
    assert entry["by_count"] + entry["by_threshold"] == pytest.approx(revealed / steps, rel=0.15)


@pytest.mark.parametrize("large", [None, 1], ids=["logits", "statistics"])
@pytest.mark.parametrize("process", [RandomMasking(), ProgressiveUnmasking(4)], ids=["random", "puma"])
def test_the_losses_of_the_parts_make_up_the_training_loss(tmp_path, process, large):
    """Weighed by the chains in each, which are about as many."""
    callback, seen, *_ = run(process, tmp_path, large=large)
    entry = callback.history[-1]
    parts = [entry[name] for name in sorted(entry) if name.startswith("loss_")]
    assert len(parts) == 4
    assert sum(parts) / len(parts) == pytest.approx(sum(seen.losses) / len(seen.losses), rel=0.05)


def test_it_does_not_disturb_training(tmp_path):
    process = ProgressiveUnmasking(4, Confidence(), threshold=0.4)
    with_, without = (run(process, tmp_path, every=6, diagnostics=on)[1] for on in (True, False))
    assert with_.losses == without.losses


def test_blocks_are_chains_of_their_own(tmp_path):
    callback, *_ = run(ProgressiveUnmasking(2), tmp_path, model=BlockDiffusion, block_size=4)
    entry = callback.history[-1]
    assert entry["length"] == 2
    assert entry["mismatch"] < 1.3


def test_a_picture_is_drawn_and_a_resumed_run_goes_on_with_it(tmp_path):
    callback, _, _, trainer = run(ProgressiveUnmasking(4, threshold=0.4), tmp_path, every=6, logger=True)
    assert [entry["step"] for entry in callback.history] == [6, 12, 18, 24]
    assert callback.path is not None and callback.path.read_bytes()[:4] == b"\x89PNG"
    assert {"chain/mismatch", "chain/loss_1", "chain/length"} <= set(trainer.callback_metrics)
    other = ChainDiagnostics()
    other.load_state_dict(callback.state_dict())
    assert other.history == callback.history


def test_sequences_are_counted(tmp_path):
    callback, *_ = run(RandomMasking(), tmp_path, steps=10, every=10)
    # A batch a step, and the one that is trained on next.
    assert callback.history[-1]["sequences"] == 11 * B


def test_an_autoregressive_model_has_no_chains(tmp_path):
    with pytest.raises(ValueError, match="diffusion model, got AutoregressiveLM"):
        backbone = TransformerBackbone(V, 16, 24, num_layers=1, num_heads=2, max_length=LENGTH, causal=True)
        trainer = pl.Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False,
                             enable_progress_bar=False, callbacks=[ChainDiagnostics()])  # fmt: skip
        trainer.fit(AutoregressiveLM(backbone, MASK, scheduler=None), DataLoader(rows(), batch_size=B))


@pytest.mark.parametrize("bad", [{"num_sequences": 0}, {"num_parts": 0}], ids=str)
def test_bad_arguments_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        ChainDiagnostics(**bad)

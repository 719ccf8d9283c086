"""What a train loader may be. With ``overfit_batches`` the chains are fed the first batches alone, again and again."""

from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, WeightedRandomSampler, get_worker_info

from puma_lightning import MaskedDiffusion, ProgressiveUnmasking, RandomMasking
from puma_lightning.training.sequences import CleanSequences

V, MASK, LENGTH, SIZE, BATCH = 11, 10, 4, 44, 4
PLACES = 10 ** torch.arange(LENGTH - 1, -1, -1)


def row(i: int) -> dict[str, Tensor]:
    """The i-th sequence spells i."""
    return {"input_ids": torch.tensor([i // 10**place % 10 for place in range(LENGTH - 1, -1, -1)])}


def names(x0: Tensor) -> list[int]:
    return (x0 @ PLACES).tolist()


class Rows(Dataset):
    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return row(i)


class Endless(IterableDataset):
    """Without a length or a state; its workers share the rows."""

    def __iter__(self):
        info = get_worker_info()
        first, every = (info.id, info.num_workers) if info else (0, 1)
        i = first
        while True:
            yield row(i)
            i += every


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vocab_size = V
        self.embed = nn.Embedding(V, 8)
        self.out = nn.Linear(8, V)

    def forward(self, xt: Tensor) -> Tensor:
        h = self.embed(xt)
        return self.out(h + h.mean(1, keepdim=True))


class Seen(pl.Callback):
    """Which sequences each batch has, what it loses, and which sequences a validation has."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.losses: list[float] = []
        self.validated: list[int] = []
        self.updates: list[int] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append(names(batch["input_ids"]))
        self.losses.append(outputs["loss"].item())
        self.updates.append(trainer.global_step)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.validated += names(batch["input_ids"])


def fit(overfit: float, data: Any = None, process: Any = None, ckpt: Any = None, save: Any = None, **options: Any):
    pl.seed_everything(0, verbose=False)
    loader = DataLoader(Rows(), BATCH, shuffle=True) if data is None else data
    given = {"scheduler": None, "optimizer": partial(torch.optim.AdamW, lr=0.01)}
    module = MaskedDiffusion(Backbone(), MASK, process or ProgressiveUnmasking(3), **given)
    seen = Seen()
    trainer = pl.Trainer(
        accelerator="cpu", overfit_batches=overfit, logger=False, enable_checkpointing=False, callbacks=[seen],
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        **{"max_steps": 12, **options},
    )  # fmt: skip
    trainer.fit(module, loader, DataLoader(Rows(), BATCH), ckpt_path=ckpt)
    if save:
        trainer.save_checkpoint(save)
    return seen, trainer


def in_batches(numbers: list[int]) -> list[list[int]]:
    return [numbers[start : start + BATCH] for start in range(0, len(numbers), BATCH)]


@pytest.mark.parametrize(("overfit", "batches"), [(1, 1), (3, 3), (0.2, 2), (1.0, 11), (100, 11)])
def test_the_baseline_is_trained_on_the_first_batches_in_their_order(overfit, batches):
    """As Lightning does for any other module: an epoch is so many batches; validation has as many."""
    seen, trainer = fit(overfit, process=RandomMasking(), max_steps=2 * batches)
    assert seen.batches == in_batches(list(range(batches * BATCH))) * 2
    assert trainer.current_epoch == 2
    assert sorted(set(seen.validated)) == list(range(batches * BATCH))


@pytest.mark.parametrize(
    ("data", "accumulate"),
    [
        (None, 1),
        (None, 2),
        (None, 4),  # more than there are batches in an epoch
        (partial(DataLoader, Rows(), BATCH, sampler=WeightedRandomSampler([1.0] * SIZE, SIZE)), 1),
        (partial(DataLoader, Rows(), BATCH, shuffle=True, num_workers=1), 1),
        (partial(DataLoader, Endless(), BATCH), 1),
        (partial(DataLoader, Endless(), BATCH, num_workers=2), 2),
    ],
    ids=["map", "accumulate", "accumulate more", "sampler", "worker", "iterable", "iterable, workers, accumulate"],
)
def test_exactly_the_first_sequences_run_through_the_chains_and_a_resume_is_exact(tmp_path, data, accumulate):
    """All of them, again and again; a resumed run goes on in the loop where it was."""
    process, batches = ProgressiveUnmasking(3, threshold=0.5), 2

    def run(**more):
        loader = data() if data else None
        return fit(batches, loader, process, accumulate_grad_batches=accumulate, limit_val_batches=0, **more)

    whole, _ = run()
    assert {name for batch in whole.batches for name in batch} == set(range(batches * BATCH))
    run(max_steps=5, save=tmp_path / "5.ckpt")
    rest, _ = run(ckpt=tmp_path / "5.ckpt")
    done = whole.updates.index(5) + 1
    assert rest.losses == whole.losses[done:] and rest.batches == whole.batches[done:]


@pytest.mark.parametrize("dataset", [Rows, Endless])
@pytest.mark.parametrize("ranks", [1, 2])
def test_each_process_has_its_share_of_the_first_sequences(dataset, ranks):
    """As many batches for each; nothing is theirs but the first ones."""
    taken = []
    for rank in range(ranks):
        loader = DataLoader(dataset(), BATCH)
        supply = CleanSequences(loader, MASK, V, rank, ranks, first_batches=2)
        assert supply.num_sequences == 2 * BATCH * ranks
        mine = names(supply.take(2 * BATCH)["input_ids"])
        assert mine == list(range(rank, 2 * BATCH * ranks, ranks))
        assert names(supply.take(3)["input_ids"]) == mine[:3]
        supply.close()
        again = CleanSequences(loader, MASK, V, rank, ranks, first_batches=2)
        again.restore(0, 2 * BATCH + 3, supply.supply())
        assert names(again.take(BATCH)["input_ids"]) == mine[3 : 3 + BATCH]
        taken += mine
    assert sorted(taken) == list(range(2 * BATCH * ranks))


@pytest.mark.parametrize(
    ("overfit", "data", "said"),
    [
        (0.01, None, r"overfit_batches: expected at least one batch, got 0.01 of 11; give"),
        (0.5, DataLoader(Endless(), BATCH), r"overfit_batches: expected a number of batches, .* got 0.5; give"),
    ],
)
def test_a_share_that_is_no_batch_is_refused(overfit, data, said):
    """In our words: Lightning would speak of limit_train_batches."""
    with pytest.raises(ValueError, match=said):
        fit(overfit, data)


# --- loaders that give nothing ---


class Stops(Rows):
    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return next(iter([])) if i == 7 else row(i)


def nothing(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {"input_ids": torch.zeros(0, LENGTH, dtype=torch.long)}


def only_the_last(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    kept = [each["input_ids"] for each in rows if int(each["input_ids"] @ PLACES) == SIZE - 1]
    return {"input_ids": torch.stack(kept)} if kept else nothing(rows)


class Some(Endless):
    def __iter__(self):
        return (row(i) for i in range(6))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("dataset", "collate", "said"),
    [
        (Rows, nothing, r"got none from a whole pass over Rows \(11 batches\); check its collate_fn"),
        (Some, nothing, r"expected sequences, got none from Some; check its __iter__, and the collate_fn"),
        (Stops, None, r"expected an example for every index, got StopIteration from Stops"),
    ],
)
def test_a_loader_that_would_give_nothing_for_ever_is_refused(dataset, collate, said, workers):
    """After one pass; and one whose data set ends the loader by accident."""
    supply = CleanSequences(DataLoader(dataset(), BATCH, num_workers=workers, collate_fn=collate), MASK, V)
    with pytest.raises(ValueError, match=said):
        supply.take(2 * BATCH)


def test_a_loader_that_seldom_gives_something_is_waited_for():
    """It has something in every pass."""
    supply = CleanSequences(DataLoader(Rows(), BATCH, collate_fn=only_the_last), MASK, V)
    assert names(supply.take(3)["input_ids"]) == [SIZE - 1] * 3


def test_a_timeout_without_workers_is_refused():
    """PyTorch asserts that there is none."""
    with pytest.raises(ValueError, match=r"train_dataloader: expected no timeout without workers, got timeout=3"):
        CleanSequences(DataLoader(Rows(), BATCH, timeout=3), MASK, V)


@pytest.mark.parametrize(
    ("pool", "accumulate", "said"),
    [
        (10, 1, r"pool: expected a multiple of 4, .* got 10; give 8"),
        (3, 1, r"pool: expected a multiple of 4, .* got 3; give 4"),
        (12, 2, r"pool: expected a multiple of 8, .* got 12; give 16"),
        (1000, 1, r"pool: expected at most 44, .* got 1000; give all"),
    ],
)
def test_a_pool_that_does_not_fit_is_refused(pool, accumulate, said):
    with pytest.raises(ValueError, match=said):
        fit(0, process=ProgressiveUnmasking(2, pool=pool), accumulate_grad_batches=accumulate)


@pytest.mark.parametrize(
    ("pool", "accumulate", "name"), [(4, 1, None), (8, 2, None), (8, 1, 8), ("all", 1, "all"), (None, 1, None)]
)
def test_a_pool_of_as_many_chains_as_an_update_trains_on_is_none(pool, accumulate, name):
    """That is the paper's stream, in which no chain waits."""
    process = ProgressiveUnmasking(2, pool=pool)
    _, trainer = fit(0, process=process, accumulate_grad_batches=accumulate, max_steps=2)
    assert trainer.lightning_module.stream.pool_name == name


@pytest.mark.parametrize("pool", [8, "all"])
def test_exactly_the_first_sequences_are_in_a_pool(pool):
    seen, _ = fit(3, process=ProgressiveUnmasking(2, pool=pool), max_steps=12)
    assert {name for batch in seen.batches for name in batch} == set(range(3 * BATCH))

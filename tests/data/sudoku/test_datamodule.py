import multiprocessing
import os
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import default_collate

from puma_lightning.data.batch import check_batch
from puma_lightning.data.sudoku import SudokuDataModule, SudokuDataset
from puma_lightning.data.sudoku.board import ORDERS, equivalence_key, is_solved
from puma_lightning.data.sudoku.files import write_csv
from puma_lightning.data.sudoku.generate import generate
from puma_lightning.data.sudoku.layout import board_of, sequence_length

LAYOUTS = ("in_place", "prompt_answer")
SIZES = {"num_train": 20, "num_val": 6, "num_test": 5}
REAL = Path(__file__).parents[3] / ".." / "shared" / "data" / "sudoku"
made = cache(generate)


def module(folder: Path, **arguments: Any) -> SudokuDataModule:
    """A small DataModule that is ready to use."""
    data = SudokuDataModule(**{"order": 6, "cache_dir": str(folder / "cache"), **arguments})
    data.prepare_data()
    data.setup()
    return data


def keys(data: SudokuDataModule, name: str) -> set[int]:
    return set(equivalence_key(data._sets[name][0].boards).tolist())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", ORDERS)
def test_batches(tmp_path: Path, order: int, layout: str) -> None:
    data = module(tmp_path, order=order, layout=layout, batch_size=8, eval_batch_size=4, **SIZES)
    length, cells = sequence_length(order, layout), order * order  # type: ignore[arg-type]
    assert (data.vocab_size, data.mask_id, data.sequence_length) == (order + 2, order + 1, length)
    sizes = []
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        batches = list(loader)
        sizes.append([len(batch["input_ids"]) for batch in batches])
        for batch in batches:
            assert set(batch) == {"input_ids", "prompt_mask"}
            assert batch["input_ids"].dtype == torch.int64 and batch["prompt_mask"].dtype == torch.bool
            assert batch["input_ids"].shape == batch["prompt_mask"].shape == (sizes[-1].pop(0), length)
            sizes[-1].append(len(batch["input_ids"]))
            check_batch(batch, mask_id=data.mask_id, vocab_size=data.vocab_size)
            assert is_solved(board_of(batch["input_ids"], order).numpy()).all()
            prompt = batch["prompt_mask"]
            if layout == "prompt_answer":
                assert prompt[:, :cells].all() and not prompt[:, cells:].any()
                puzzle, answer = batch["input_ids"].chunk(2, dim=1)
                assert (puzzle == 0).any() and ((puzzle == 0) | (puzzle == answer)).all()
            else:
                low, high = data.clues
                assert all(low <= count <= high for count in prompt.sum(dim=1).tolist())
    assert sizes == [[8, 8, 4], [4, 2], [4, 1]]


def batch(dataset: SudokuDataset, indices: Iterable[int]) -> dict[str, torch.Tensor]:
    return default_collate(dataset.__getitems__(list(indices)))


def test_training_is_shuffled_and_evaluation_is_not(tmp_path: Path) -> None:
    data = module(tmp_path, **SIZES)
    whole = batch(data._sets["train"][0], range(20))["input_ids"]
    shuffled = next(iter(data.train_dataloader()))["input_ids"]
    assert not torch.equal(shuffled, whole)
    assert sorted(shuffled.tolist()) == sorted(whole.tolist())
    val = batch(data._sets["val"][0], range(6))["input_ids"]
    assert torch.equal(next(iter(data.val_dataloader()))["input_ids"], val)


def test_built_in_sets_are_disjoint_and_do_not_change_with_the_training_size(tmp_path: Path) -> None:
    small, large = module(tmp_path, **SIZES), module(tmp_path, **{**SIZES, "num_train": 50})
    assert not keys(small, "train") & keys(small, "val") and not keys(small, "test") & keys(small, "val")
    for name in ("val", "test"):
        assert np.array_equal(small._sets[name][0].boards.puzzles, large._sets[name][0].boards.puzzles)
    other = module(tmp_path, **SIZES, seed=1)
    assert not np.array_equal(small._sets["val"][0].boards.puzzles, other._sets["val"][0].boards.puzzles)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(ORDERS), st.sampled_from(LAYOUTS), st.integers(0, 2**40), st.data())
def test_items_depend_on_their_index_only(order: int, layout: Any, seed: int, draw: st.DataObject) -> None:
    boards = made(order, 10)
    dataset = SudokuDataset(boards, layout, augment=5, seed=seed)
    assert len(dataset) == 50
    indices = draw.draw(st.lists(st.integers(0, 49), min_size=1, max_size=12))
    together = batch(dataset, indices)
    for row, index in enumerate(indices):
        alone = SudokuDataset(boards, layout, augment=5, seed=seed)[index]
        assert torch.equal(alone["input_ids"], together["input_ids"][row])
        assert torch.equal(alone["prompt_mask"], together["prompt_mask"][row])
    assert len(list(SudokuDataset(boards, layout))) == 10  # iteration ends
    plain = batch(SudokuDataset(boards, layout), range(10))
    assert torch.equal(batch(dataset, range(10))["input_ids"], plain["input_ids"])


@pytest.mark.parametrize("order", ORDERS)
def test_copies_are_other_pictures_of_the_same_puzzle(order: int) -> None:
    boards = made(order, 10)
    items = batch(SudokuDataset(boards, "prompt_answer", augment=4, seed=1), range(40))
    puzzles, solutions = (half.numpy().astype(np.uint8) for half in items["input_ids"].chunk(2, dim=1))
    assert len(np.unique(puzzles, axis=0)) == 40
    codes = equivalence_key(type(boards)(puzzles, solutions)).reshape(4, 10)
    assert (codes == codes[0]).all()


def test_workers_and_single_items_give_the_same(tmp_path: Path) -> None:
    alone, helped = module(tmp_path, **SIZES), module(tmp_path, **SIZES, num_workers=1)
    for one, other in zip(alone.val_dataloader(), helped.val_dataloader(), strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
    loader = alone.val_dataloader()
    single = loader.collate_fn([loader.dataset[i] for i in range(6)])
    assert torch.equal(single["input_ids"], next(iter(loader))["input_ids"])


def test_several_evaluation_files(tmp_path: Path) -> None:
    boards = made(6, 40)
    files = {name: str(tmp_path / f"{name}.csv.gz") for name in ("train", "easy", "hard")}
    for name, rows in zip(files, (slice(0, 20), slice(20, 30), slice(30, 40)), strict=True):
        write_csv(files[name], boards.take(rows))
    both = [files["easy"], files["hard"]]
    data = module(tmp_path, train_file=files["train"], val_file=both, test_file=files["hard"], num_val=7)
    assert (data.val_names, data.test_names) == (["easy", "hard"], ["hard"])
    easy, hard = data.val_dataloader()
    assert len(easy.dataset) == len(hard.dataset) == 7
    assert np.array_equal(hard.dataset.boards.puzzles, boards.puzzles[30:37])
    assert len(data.test_dataloader().dataset) == 10
    assert np.array_equal(data.train_dataloader().dataset.boards.puzzles, boards.puzzles[:20])


def test_validation_is_held_out_of_the_training_file(tmp_path: Path) -> None:
    file = str(tmp_path / "a.csv")
    write_csv(file, made(6, 60))
    data = module(tmp_path, train_file=file, num_val=9)
    assert (len(keys(data, "val")), len(keys(data, "train"))) == (9, 51)
    assert not keys(data, "val") & keys(data, "train")
    assert keys(module(tmp_path, train_file=file, num_val=9), "val") == keys(data, "val")
    assert keys(module(tmp_path, train_file=file, num_val=9, seed=1), "val") != keys(data, "val")
    assert len(keys(module(tmp_path, train_file=file), "val")) == 6
    capped = module(tmp_path, train_file=file, num_train=10, num_val=5)
    assert (len(keys(capped, "train")), len(keys(capped, "val"))) == (10, 5)
    with pytest.raises(ValueError, match="test_file: expected a file"):
        data.setup("test")
    with pytest.raises(ValueError, match="num_val: expected fewer than the 60"):
        module(tmp_path, train_file=file, num_val=60)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prediction_hides_everything_but_the_clues(tmp_path: Path, layout: str) -> None:
    puzzle = ["." * 15 + "3", "1" + "." * 15]
    (tmp_path / "a.txt").write_text("\n".join(puzzle))
    data = SudokuDataModule(4, layout, predict_file=str(tmp_path / "a.txt"), cache_dir=str(tmp_path / "no"))  # type: ignore[arg-type]
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert (batch["input_ids"][~batch["prompt_mask"]] == data.mask_id).all()
    answer = batch["input_ids"][:, -16:]
    if layout == "in_place":
        assert [data.decode(row)["text"] for row in answer] == puzzle
    else:
        assert batch["input_ids"][0, :16].tolist() == [0] * 15 + [3]
        assert data.decode(batch["input_ids"][0])["text"] == "." * 16
    assert not (tmp_path / "no").exists()


def test_preparing_reads_only_what_the_stage_needs(tmp_path: Path) -> None:
    class Nothing(pl.LightningModule):
        def predict_step(self, batch: Any) -> Any:
            return batch["input_ids"]

    (tmp_path / "a.txt").write_text("." * 81)
    data = SudokuDataModule(predict_file=str(tmp_path / "a.txt"), cache_dir=str(tmp_path / "no"))
    trainer = pl.Trainer(logger=False, enable_progress_bar=False, enable_checkpointing=False, accelerator="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (tokens,) = trainer.predict(Nothing(), data)
    assert tokens.shape == (1, 81)
    assert not (tmp_path / "no").exists()


def test_decode_shows_the_answer(tmp_path: Path) -> None:
    boards = made(4, 10)
    for layout in LAYOUTS:
        data = SudokuDataModule(4, layout)  # type: ignore[arg-type]
        item = SudokuDataset(boards, layout)[3]["input_ids"]  # type: ignore[arg-type]
        item[-1] = data.mask_id
        assert data.decode(item)["text"] == "".join(map(str, boards.solutions[3, :-1])) + "."


def cache_files(folder: Path) -> list[Path]:
    return sorted((folder / "cache").glob("sudoku-*"))


def test_the_cache_is_used_and_keyed_by_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.csv"
    write_csv(file, made(6, 30))
    variants = [{}, {"seed": 1}, {"clues": 14}, {"clues": (13, 14)}, {"num_val": 7}, {"order": 4}]
    for variant in variants:
        module(tmp_path, **{**SIZES, **variant})
    assert len(cache_files(tmp_path)) == len(variants)
    module(tmp_path, train_file=str(file))
    module(tmp_path, train_file=str(file), num_val=5)
    assert len(cache_files(tmp_path)) == len(variants) + 2
    os.utime(file, ns=(1, 1))
    module(tmp_path, train_file=str(file))
    assert len(cache_files(tmp_path)) == len(variants) + 2
    write_csv(tmp_path / "b.csv", made(6, 40).take(slice(10, 40)))  # of equal size and time
    os.utime(tmp_path / "b.csv", ns=(1, 1))
    os.replace(tmp_path / "b.csv", file)
    module(tmp_path, train_file=str(file))
    assert len(cache_files(tmp_path)) == len(variants) + 3

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr("puma_lightning.data.sudoku.datamodule.make_splits", never)
    monkeypatch.setattr("puma_lightning.data.sudoku.datamodule.read_boards", never)
    for variant in variants:
        module(tmp_path, **{**SIZES, **variant, "augment": 3, "batch_size": 2, "layout": "prompt_answer"})
    module(tmp_path, train_file=str(file))


def test_a_data_module_mends_its_cache_in_setup(tmp_path: Path) -> None:
    good = module(tmp_path, **SIZES)
    (folder,) = cache_files(tmp_path)
    file = folder / "boards.npz"
    file.write_bytes(file.read_bytes()[:1000])
    data = SudokuDataModule(6, cache_dir=str(tmp_path / "cache"), **SIZES)
    with pytest.warns(UserWarning, match=r"sudoku-.*: damaged cache .*; building it again"):
        data.setup("fit")
    assert keys(data, "train") == keys(good, "train")


def prepare(folder: str) -> None:
    SudokuDataModule(6, cache_dir=folder, **SIZES).prepare_data()


def test_processes_may_prepare_at_the_same_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")  # numpy only; spawning would import torch anew in each
    processes = [context.Process(target=prepare, args=(str(tmp_path / "cache"),)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert list((tmp_path / "cache").iterdir()) == cache_files(tmp_path) and len(cache_files(tmp_path)) == 1
    here = SudokuDataModule(6, cache_dir=str(tmp_path / "cache"), **SIZES)
    here.setup("fit")  # prepare_data ran elsewhere
    assert keys(here, "train") == keys(module(tmp_path / "other", **SIZES), "train")


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert SudokuDataModule().cache_dir == Path.home() / ".cache" / "puma_lightning"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert SudokuDataModule().cache_dir == tmp_path / "puma_lightning"
    assert SudokuDataModule(cache_dir="here").cache_dir == Path("here")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"order": 5}, "order: "),
        ({"layout": "aside"}, "layout: "),
        ({"clues": 8}, "clues: "),
        ({"clues": (40, 30)}, "clues: "),
        ({"augment": 0}, "augment: expected at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"eval_batch_size": 0}, "eval_batch_size: "),
        ({"num_workers": -1}, "num_workers: "),
        ({"num_train": 0}, "num_train: "),
        ({"num_val": -1}, "num_val: "),
        ({"num_test": 0}, "num_test: "),
        ({"train_file": "none.csv"}, "train_file: expected a file, got none at .*none.csv"),
        ({"val_file": ["none.csv"]}, "val_file: "),
        ({"test_file": "none.csv"}, "test_file: "),
        ({"predict_file": "none.csv"}, "predict_file: "),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SudokuDataModule(**arguments)


def test_validation_sets_need_different_names(tmp_path: Path) -> None:
    for name in ("a.csv", "a.txt"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="val_file: expected files with different names"):
        SudokuDataModule(val_file=[str(tmp_path / "a.csv"), str(tmp_path / "a.txt")])


@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data")
def test_real_files(tmp_path: Path) -> None:
    tests = [str(REAL / f"test_{name}.csv.gz") for name in ("easy", "hard")]
    train = str(REAL / "train.csv.gz")
    data = module(tmp_path, order=9, train_file=train, test_file=tests, **{**SIZES, "num_train": 200})
    assert data.test_names == ["test_easy", "test_hard"]
    assert len(data.train_dataloader().dataset) == 200
    assert [len(loader.dataset) for loader in data.test_dataloader()] == [5, 5]
    for batch in data.train_dataloader():
        check_batch(batch, mask_id=10, vocab_size=11)

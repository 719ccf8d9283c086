import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from puma_lightning.data.text import token_cache
from puma_lightning.data.text.token_cache import TokenDataset, TokenWriter, cached, collate

L, V = 6, 50
RECIPE = {"rows": "some"}


def fill(writer: TokenWriter, n: int = 5, answers: bool = False, blocks: int = 2) -> None:
    rng = np.random.default_rng(0)
    for _ in range(blocks):
        prompt = rng.integers(0, 3, n)
        gold = [f"{i}" for i in range(n)] if answers else None
        writer.write(rng.integers(0, V, (n, L)), prompt, prompt + 2, gold)
    writer.counts["empty"] += 3
    writer.rows = blocks * n + 3


def make(folder: Path, recipe: Any = RECIPE, **arguments: Any) -> TokenDataset:
    return cached(folder, recipe, L, V, lambda writer: fill(writer, **arguments))


def never(_: TokenWriter) -> None:
    raise AssertionError("built again")


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 9), answers=st.booleans(), vocab_size=st.sampled_from([50, 2**16, 2**16 + 1]), data=st.data())
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, n: int, answers: bool, vocab_size: int, data: st.DataObject
) -> None:
    numbers = st.integers(0, vocab_size - 1)
    tokens = np.array(data.draw(st.lists(st.lists(numbers, min_size=L, max_size=L), min_size=n, max_size=n)))
    spans = np.array(data.draw(st.lists(st.lists(st.integers(0, L), min_size=2, max_size=2), min_size=n, max_size=n)))
    prompt, end = np.sort(spans, axis=1).T
    gold = [str(i) for i in range(n)] if answers else None
    folder = tmp_path_factory.mktemp("cache")
    dataset = cached(folder, {}, L, vocab_size, lambda writer: writer.write(tokens, prompt, end, gold))
    assert len(dataset) == n
    order = data.draw(st.permutations(range(n)))
    batch = dataset.__getitems__(order)
    assert batch["input_ids"].dtype == torch.int64 and batch["prompt_mask"].dtype == torch.bool
    assert np.array_equal(batch["input_ids"], tokens[order])
    for row, given_positions in zip(order, batch["prompt_mask"].tolist(), strict=True):
        assert given_positions == [i < prompt[row] or i >= end[row] for i in range(L)]
    assert batch.get("answer") == ([str(i) for i in order] if answers else None)
    hidden = pickle.loads(pickle.dumps(TokenDataset(dataset.folder, hidden=True))).__getitems__(order)
    assert hidden.pop("attention_mask").tolist() == [[i < end[row] for i in range(L)] for row in order]
    assert hidden.keys() == batch.keys() and torch.equal(hidden["prompt_mask"], batch["prompt_mask"])
    alone = dataset[order[0]]
    assert torch.equal(alone["input_ids"], batch["input_ids"][0]) and alone["input_ids"].shape == (L,)
    width = 2 if vocab_size <= 2**16 else 4
    assert np.load(dataset.folder / "tokens.npy", mmap_mode="r").dtype.itemsize == width


def test_batches_of_a_loader(tmp_path: Path) -> None:
    dataset = make(tmp_path, answers=True)
    for workers in (0, 1):
        first, *_ = DataLoader(dataset, batch_size=4, collate_fn=collate, num_workers=workers)
        assert torch.equal(first["input_ids"], dataset.__getitems__([0, 1, 2, 3])["input_ids"])
        assert first["answer"] == ["0", "1", "2", "3"]
    single = collate([dataset[i] for i in range(4)])
    assert torch.equal(single["prompt_mask"], first["prompt_mask"]) and single["answer"] == first["answer"]


def test_pickles_without_the_data(tmp_path: Path) -> None:
    dataset = make(tmp_path, n=1000)
    content = pickle.dumps(dataset)
    assert len(content) < 1000
    assert torch.equal(pickle.loads(content)[7]["input_ids"], dataset[7]["input_ids"])


def test_made_once_for_each_recipe(tmp_path: Path) -> None:
    made = make(tmp_path)
    again = cached(tmp_path, RECIPE, L, V, never)
    assert (len(again), again.rows, again.counts) == (10, 13, {"empty": 3})
    assert again.folder == made.folder
    assert make(tmp_path, {"rows": "others"}).folder != made.folder


def test_a_version_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(tmp_path)
    monkeypatch.setattr(token_cache, "_VERSION", -1)
    assert make(tmp_path).folder != made.folder


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail(writer: TokenWriter) -> None:
        fill(writer)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, RECIPE, L, V, fail)
    assert not list(tmp_path.iterdir())


def wait_and_make(folder: str, barrier: Any) -> None:
    def build(writer: TokenWriter) -> None:
        fill(writer)
        barrier.wait()

    cached(Path(folder), RECIPE, L, V, build)


def test_processes_may_prepare_at_the_same_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")  # spawning would import torch anew in each
    barrier = context.Barrier(3)
    processes = [context.Process(target=wait_and_make, args=(str(tmp_path), barrier)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    dataset = cached(tmp_path, RECIPE, L, V, never)
    assert len(dataset) == 10 and list(tmp_path.iterdir()) == [dataset.folder]

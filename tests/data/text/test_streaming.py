"""Text that is tokenised while a model trains on it."""

import gzip
import json
import os
import pickle
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from puma_lightning import hub
from puma_lightning.chain.teacher import ProgressiveUnmasking
from puma_lightning.data.batch import check_batch
from puma_lightning.data.text import TextDataModule
from puma_lightning.data.text.streaming import TextStream, digest
from puma_lightning.models import TransformerBackbone
from puma_lightning.modules import MaskedDiffusion
from puma_lightning.training.sequences import CleanSequences

V = 280
LINES = [f"row {i} is {i * i}" for i in range(60)]


def files(folder: Path, number: int = 4, lines: list[str] = LINES) -> str:
    for i in range(number):
        text = "".join(json.dumps({"text": line}) + "\n" for line in lines[i::number])
        (folder / f"part{i}.jsonl").write_text(text)
    return str(folder / "part*.jsonl")


def module(folder: Path, **arguments: Any) -> TextDataModule:
    small = {
        "streaming": True, "vocab_size": V, "sequence_length": 24, "batch_size": 4, "shuffle_buffer": 7,
        "packing": False, "cache_dir": str(folder / "cache"), "num_val": 5,
    }  # fmt: skip
    if "train_file" not in arguments:
        small["train_file"] = files(folder)
    data = TextDataModule(**{**small, **arguments})
    data.prepare_data()
    data.setup()
    return data


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> TextDataModule:
    return module(tmp_path_factory.mktemp("shared"))


def stream_of(data: TextDataModule) -> TextStream:
    stream = data._sets["train"]
    assert isinstance(stream, TextStream)
    return stream


def text(data: TextDataModule, item: dict[str, Tensor]) -> str:
    return data.decode(item["input_ids"], item["prompt_mask"])["completion"]


@pytest.mark.parametrize("padding", ["eos", "first_eos", "none"])
def test_a_stream_gives_what_a_cache_does(tmp_path: Path, padding: Any) -> None:
    streamed, kept = (module(tmp_path, padding=padding, streaming=streaming) for streaming in (True, False))
    assert list(next(iter(stream_of(streamed)))) == list(kept._sets["train"][0])
    for item in stream_of(streamed):
        if padding == "none":
            assert torch.equal(item["attention_mask"][1:], ~item["prompt_mask"][1:]) and item["attention_mask"][0]


def held_out(data: TextDataModule) -> list[str]:
    val = data._sets["val"]
    return [text(data, val[i]) for i in range(len(val))]


def test_a_pass_is_all_rows_but_those_held_out(shared: TextDataModule) -> None:
    """In another order in every pass; the rows held out are the first."""
    stream = stream_of(shared)
    first = [text(shared, item) for item in stream]
    stream.set_epoch(1)
    second = [text(shared, item) for item in stream]
    assert held_out(shared) == LINES[:20:4]
    assert sorted(first) == sorted(second) == sorted(set(LINES) - set(LINES[:20:4]))
    assert first != second


def test_rows_like_those_held_out_are_left_out_wherever_they_are(tmp_path: Path) -> None:
    data = module(tmp_path, train_file=files(tmp_path, 2, LINES + LINES))
    assert set(held_out(data)).isdisjoint(text(data, item) for item in stream_of(data))


def test_a_stream_that_is_held_out_whole_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"num_val: expected fewer than the 60 rows of train_file, got 1,000; .*val_file"
    ):
        module(tmp_path, num_val=None)


def test_without_a_buffer_the_order_is_kept(tmp_path: Path) -> None:
    data = module(tmp_path, train_file=files(tmp_path, 1), shuffle_buffer=1)
    for epoch in (0, 1):
        stream_of(data).set_epoch(epoch)
        assert [text(data, item) for item in stream_of(data)] == LINES[5:]


def test_packed_text_loses_nothing_between_buffers(tmp_path: Path) -> None:
    """Only what is left at the end of a pass, less than a sequence."""
    file = files(tmp_path, 1)
    data = module(tmp_path, train_file=file, packing=True, sequence_length=11, val_file=file)
    for buffer in (1, 7):
        stream_of(data).buffer = buffer
        found = [token for item in stream_of(data) for token in item["input_ids"][1:].tolist()]
        ids = data._text_tokenizer.encode(LINES)
        whole = [token for each in ids for token in (*each, data.eos_id)]
        left = len(whole) - len(found)
        assert 0 <= left < 10
        assert found == whole[: len(found)] if buffer == 1 else not Counter(found) - Counter(whole)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 0), (3, 0), (2, 2)])
def test_ranks_and_workers_share_the_rows(shared: TextDataModule, ranks: int, workers: int) -> None:
    """And a checkpoint goes on exactly, in the middle of a buffer."""
    found: Counter[str] = Counter()
    for rank in range(ranks):

        def supply(rank: int = rank) -> CleanSequences:
            shared.num_workers = workers
            return CleanSequences(shared.train_dataloader(), shared.mask_id, V, rank, ranks, seed=3)

        share = sum(1 for _ in stream_of(shared).split_by_rank(rank, ranks))
        one, other = supply(), supply()
        first = one.take(10)
        other.restore(3, 10, pickle.loads(pickle.dumps(one.supply())))
        second = one.take(share - 10)
        assert torch.equal(second["input_ids"], other.take(share - 10)["input_ids"])
        for part in (first, second):
            items = [dict(zip(part, rows, strict=True)) for rows in zip(*part.values(), strict=True)]
            found.update(text(shared, item) for item in items)
    shared.num_workers = 0
    assert found == Counter(set(LINES) - set(LINES[:20:4]))


@settings(max_examples=20, deadline=None)
@given(buffer=st.integers(1, 70), packing=st.booleans(), at=st.integers(0, 80), more=st.integers(0, 30))
def test_a_stream_goes_on_from_its_state(
    shared: TextDataModule, buffer: int, packing: bool, at: int, more: int
) -> None:
    """Wherever it was saved, and again after that."""
    import copy
    from dataclasses import replace

    def stream() -> TextStream:
        made = copy.copy(stream_of(shared))
        made.buffer, made.form = buffer, replace(made.form, packing=packing, length=12)
        return made

    whole = [item["input_ids"].tolist() for item in stream()]
    expected = whole
    state = None
    for steps in (at, more):
        one = stream()
        if state is not None:
            one.load_state_dict(state)
        items = iter(one)
        seen = [next(items)["input_ids"].tolist() for _ in range(min(steps, len(expected)))]
        assert seen == expected[: len(seen)]
        expected = expected[len(seen) :]
        if seen:
            state = json.loads(json.dumps(one.state_dict()))
    last = stream()
    if state is not None:
        last.load_state_dict(state)
    assert [item["input_ids"].tolist() for item in last] == expected
    assert len(whole) > 20


def test_it_can_be_sent_to_workers_that_are_not_forks(shared: TextDataModule) -> None:
    sent = pickle.loads(pickle.dumps(stream_of(shared)))
    assert [text(shared, item) for item in sent] == [text(shared, item) for item in stream_of(shared)]


@pytest.mark.parametrize("kind", [".jsonl.gz", ".csv", ".tsv", ".parquet", ".txt"])
def test_all_formats_can_be_streamed(tmp_path: Path, kind: str) -> None:
    import datasets

    path = tmp_path / f"a{kind}"
    rows = datasets.Dataset.from_dict({"text": LINES})
    if kind == ".parquet":
        rows.to_parquet(str(path))
    elif kind == ".jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps({"text": line}) + "\n" for line in LINES).encode()))
    else:
        head = [] if kind == ".txt" else ["text"]
        path.write_text("\n".join([*head, *LINES]) + "\n")
    data = module(tmp_path, train_file=str(path))
    assert sorted([*held_out(data), *(text(data, item) for item in stream_of(data))]) == sorted(LINES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_train": 5}, "num_train: expected null with streaming.* got 5"),
        ({"streaming": False, "num_sequences": 5}, "num_sequences: expected null without streaming.* got 5"),
        ({"num_sequences": 0}, "num_sequences: expected at least 1"),
        ({"shuffle_buffer": 0}, "shuffle_buffer: expected at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(tmp_path, **arguments)


def test_a_faulty_file_is_named_by_its_argument(tmp_path: Path) -> None:
    data = module(tmp_path)
    (tmp_path / "part2.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match="train_file: expected rows, got"):
        list(stream_of(data))


class Own(TextDataModule):
    """With examples of its own."""

    def encode(self, rows: dict[str, list[Any]], tokenize: Any) -> Any:
        return [(ids, 3) for ids in tokenize(rows["text"])]


def test_examples_of_ones_own_are_streamed_too(tmp_path: Path) -> None:
    data = Own(
        files(tmp_path),
        streaming=True,
        vocab_size=V,
        sequence_length=24,
        packing=False,
        num_val=4,
        cache_dir=str(tmp_path),
    )
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert (check_batch(batch, mask_id=1, vocab_size=V)["prompt_mask"][:, :3]).all()


# --- a run ---


def fit(folder: Path, ckpt: str | None = None, save_at: int | None = None, **options: Any) -> dict[str, Tensor]:
    pl.seed_everything(2)
    data = TextDataModule(
        files(folder), streaming=True, vocab_size=V, sequence_length=24, packing=False, batch_size=4, shuffle_buffer=9,
        num_val=5, cache_dir=str(folder / "cache"), num_sequences=options.pop("num_sequences", None),
        num_workers=options.pop("workers", 0),
    )  # fmt: skip
    model = MaskedDiffusion(
        TransformerBackbone(V, 16, 24, num_layers=1, num_heads=2),
        data.mask_id,
        ProgressiveUnmasking(3, threshold=0.02),
        optimizer=partial(torch.optim.AdamW, lr=0.01),
        scheduler=None,
    )

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == save_at:
                trainer.save_checkpoint(folder / "saved.ckpt")

    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[Save()], **options,
    )  # fmt: skip
    trainer.fit(model, data, ckpt_path=ckpt)
    model.trainer_was = (trainer.global_step, trainer.current_epoch, len(trainer.val_dataloaders.dataset))
    return {"weights": torch.cat([p.detach().flatten() for p in model.parameters()]), "was": model.trainer_was}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_over_a_stream_goes_on_exactly(tmp_path: Path, workers: int) -> None:
    """Beyond the end of a pass too; validation stays a finite set."""
    full = fit(tmp_path, save_at=14, max_steps=40, workers=workers)
    assert full["was"] == (40, 1, 5)
    resumed = fit(tmp_path, str(tmp_path / "saved.ckpt"), max_steps=40, workers=workers)
    assert torch.equal(full["weights"], resumed["weights"])


def test_an_epoch_is_what_is_said(tmp_path: Path) -> None:
    """A number of sequences, or of batches."""
    assert fit(tmp_path, num_sequences=24, max_epochs=3)["was"][0] == 18
    assert fit(tmp_path, limit_train_batches=5, max_epochs=2)["was"][0] == 10
    with pytest.raises(ValueError, match="max_steps: expected a number of steps, as the training data have no length"):
        fit(tmp_path, max_epochs=2)


def test_rows_are_told_apart_by_what_they_hold() -> None:
    assert digest({"a": 1, "b": "x"}) == digest({"b": "x", "a": 1}) != digest({"a": 1, "b": "y"})
    assert digest({"text": "\ud800"})


def test_a_plain_loader_over_a_stream_works(shared: TextDataModule) -> None:
    """For the baselines of others."""
    assert sum(len(batch["input_ids"]) for batch in DataLoader(stream_of(shared), batch_size=4)) == 55


def test_of_the_hub_no_more_is_read_than_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation rows are the first of their split, and nothing is downloaded whole."""
    import datasets

    read: Counter[str] = Counter()

    def rows(split: str) -> Any:
        for i in range(10**9):
            read[split] += 1
            yield {"text": f"{split} row {i}"}

    def load(name: str, config: str | None, split: str, streaming: bool) -> Any:
        assert (name, config, streaming) == ("some/set", "en", True)
        return datasets.IterableDataset.from_generator(rows, gen_kwargs={"split": split})

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(hub, "_hub_answers", lambda: True)
    data = module(tmp_path, train_file="some/set:en", val_file="some/set:en", num_val=3)
    assert held_out(data) == ["validation row 0", "validation row 1", "validation row 2"]
    before = read["train"]
    items = iter(stream_of(data))
    assert {text(data, next(items)) for _ in range(7)} == {f"train row {i}" for i in range(7)}
    assert before <= 50_000 and read["train"] - before <= 8 and read["validation"] <= 4


def test_streamed_files_are_not_read_for_the_name_of_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may have no end that anybody waits for; what tells of a change is enough."""
    monkeypatch.setattr("puma_lightning.data.text.sources.contents_of", lambda *_: pytest.fail("read"))
    file = tmp_path / "a.txt"
    file.write_text("one two\n" * 50)
    data = TextDataModule(str(file), streaming=True, cache_dir=str(tmp_path / "cache"))
    before = data.identity("train")
    assert data.identity("train") == before
    other = tmp_path / "b.txt"
    other.write_text("one 2wo\n" * 50)
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    os.replace(other, file)
    assert data.identity("train") != before

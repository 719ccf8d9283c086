import gzip
import json
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from datasets import Dataset

from puma_lightning import hub
from puma_lightning.data.batch import check_batch
from puma_lightning.data.text import TextDataModule, datamodule, sources
from puma_lightning.data.text.rows import Rows, Selection

WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "one", "dog", "ran", "to", "27", "trees"]
LINES = [" ".join(WORDS[i % 7 : i % 7 + 3 + i % 4]) + f" {i}." for i in range(60)]


def write(folder: Path, name: str = "a.jsonl", rows: list[Any] | None = None) -> str:
    rows = [{"text": line} for line in LINES] if rows is None else rows
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def module(folder: Path, kind: type[TextDataModule] = TextDataModule, **arguments: Any) -> TextDataModule:
    """A small DataModule that is ready to use."""
    small = {"vocab_size": 280, "sequence_length": 24, "batch_size": 4, "cache_dir": str(folder / "cache")}
    if "train_file" not in arguments and kind is TextDataModule:
        small["train_file"] = write(folder)
    data = kind(**{**small, **arguments})
    data.prepare_data()
    data.setup()
    return data


def texts(data: TextDataModule, name: str) -> list[str]:
    """What each sequence of a set says."""
    batch = data._sets[name].__getitems__(range(len(data._sets[name])))
    return [data.decode(*row)["completion"] for row in zip(batch["input_ids"], batch["prompt_mask"], strict=True)]


@pytest.mark.parametrize("packing", [True, False])
def test_batches(tmp_path: Path, packing: bool) -> None:
    data = module(tmp_path, packing=packing, eval_batch_size=2, test_file=write(tmp_path, "t.jsonl"))
    assert (data.vocab_size, data.eos_id, data.mask_id, data.sequence_length) == (280, 0, 1, 24)
    assert (data.val_names, data.test_names) == (["val"], ["test"])
    for loader, size in ((data.train_dataloader(), 4), (data.val_dataloader(), 2), (data.test_dataloader(), 2)):
        first = next(iter(loader))
        assert set(first) == {"input_ids", "prompt_mask"} and first["input_ids"].shape == (size, 24)
        for batch in loader:
            checked = check_batch(batch, mask_id=1, vocab_size=280)
            assert checked["input_ids"].dtype is batch["input_ids"].dtype
            assert (batch["input_ids"][:, 0] == 0).all() and batch["prompt_mask"][:, 0].all()


@pytest.mark.parametrize("padding", ["eos", "first_eos", "none"])
def test_one_text_per_sequence_comes_back(tmp_path: Path, padding: str) -> None:
    data = module(tmp_path, packing=False, padding=padding, sequence_length=48)
    assert sorted(texts(data, "train") + texts(data, "val")) == sorted(LINES)
    for item in (data._sets["train"][i] for i in range(5)):
        trained = item["input_ids"][~item["prompt_mask"]].tolist()
        text = [token for token in trained if token != data.eos_id]
        assert trained == text + [data.eos_id] * {"eos": 47 - len(text), "first_eos": 1, "none": 0}[padding]


@pytest.mark.parametrize("padding", ["eos", "first_eos", "none"])
def test_what_follows_an_answer_is_hidden_only_where_nothing_is_trained_on_it(tmp_path: Path, padding: str) -> None:
    """By all loaders alike, and by workers; where the answer is not known its whole room is there."""
    prompts = write(tmp_path, "p.jsonl")
    data = module(
        tmp_path, packing=False, padding=padding, sequence_length=48, test_file=prompts, predict_file=prompts,
        num_workers=1,
    )  # fmt: skip
    known = [batch for name in ("train", "val", "test") for batch in getattr(data, f"{name}_dataloader")()]
    for batch in known:
        assert ("attention_mask" in batch) == (padding == "none")
        if padding == "none":
            inside = batch["attention_mask"]
            assert inside.dtype == torch.bool and not (inside[:, 1:] & ~inside[:, :-1]).any()
            assert torch.equal(inside[:, 1:], ~batch["prompt_mask"][:, 1:])
            checked = check_batch(batch, mask_id=1, vocab_size=280)
            assert torch.equal(checked["attention_mask"], inside)
    for batch in data.predict_dataloader():
        checked = check_batch(batch, mask_id=1, vocab_size=280, clean=False)
        assert "attention_mask" not in checked and (~checked["prompt_mask"]).any(1).all()
        assert (checked["input_ids"][~checked["prompt_mask"]] == data.mask_id).all()


@pytest.mark.parametrize("padding", ["eos", "none"])
def test_packed_text_hides_nothing(tmp_path: Path, padding: str) -> None:
    assert "attention_mask" not in module(tmp_path, padding=padding)._sets["train"][0]


def test_packed_text_comes_back(tmp_path: Path) -> None:
    data = module(tmp_path, num_val=4, seed=3)
    stream = data._sets["train"].__getitems__(range(len(data._sets["train"])))["input_ids"][:, 1:].flatten()
    documents = data.tokenizer.decode(stream.tolist(), skip_special_tokens=False).split("<|endoftext|>")
    held = set(LINES) - set(documents[:-1])
    assert documents[:-1] == [line for line in LINES if line not in held][: len(documents) - 1]
    left = data._sets["train"].counts["left over"]
    assert left < 23 and 4 <= len(held) <= 4 + left


def test_training_is_shuffled_and_evaluation_is_not(tmp_path: Path) -> None:
    data = module(tmp_path, batch_size=100)
    order = data._sets["train"].__getitems__(range(len(data._sets["train"])))["input_ids"]
    shuffled = next(iter(data.train_dataloader()))["input_ids"]
    assert not torch.equal(shuffled, order) and sorted(shuffled.tolist()) == sorted(order.tolist())
    val = next(iter(data.val_dataloader()))["input_ids"]
    assert torch.equal(val, data._sets["val"].__getitems__(range(len(val)))["input_ids"])


def test_validation_is_held_out(tmp_path: Path) -> None:
    def split(**arguments: Any) -> tuple[list[str], list[str]]:
        data = module(tmp_path, packing=False, sequence_length=48, **arguments)
        return texts(data, "train"), texts(data, "val")

    train, val = split(num_val=9)
    assert (len(train), len(val)) == (51, 9) and sorted(train + val) == sorted(LINES)
    assert split(num_val=9) == (train, val)
    assert split(num_val=9, seed=1)[1] != val
    assert [len(part) for part in split()] == [54, 6]
    few, same = split(num_val=9, num_train=20)
    assert few == train[:20] and same == val
    other = write(tmp_path, "b.jsonl", [{"text": "another one"}] * 8)
    assert split(val_file=other, num_val=5) == (LINES, ["another one"] * 5)
    with pytest.raises(ValueError, match=r"num_val: expected fewer than the 60 rows of train_file, got 60"):
        split(num_val=60)


def test_what_is_left_out_is_counted_and_said(tmp_path: Path) -> None:
    rows = [{"text": line} for line in ("", None, "  ", "word " * 30, *LINES[:20])]
    file = write(tmp_path, "b.jsonl", rows)
    with pytest.warns(UserWarning, match=r"from 24 rows; 2 empty rows skipped, 1 rows too long for a sequence cut"):
        data = module(tmp_path, train_file=file, val_file=file, packing=False, sequence_length=30)
    assert len(data._sets["train"]) == 22
    with pytest.warns(UserWarning, match="2 empty rows"):  # also from the cache
        module(tmp_path, train_file=file, val_file=file, packing=False, sequence_length=30)


def test_formats_and_several_files(tmp_path: Path) -> None:
    rows = [{"id": i, "text": line} for i, line in enumerate(LINES)]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    Dataset.from_list(rows).to_csv(str(tmp_path / "a.csv"), index=False)
    Dataset.from_list(rows).to_csv(str(tmp_path / "a.tsv"), index=False, sep="\t")
    (tmp_path / "a.txt").write_text("\n".join(LINES))
    for name in ("a.txt", "a.csv", "a.tsv"):
        with gzip.open(tmp_path / f"{name}.gz", "wb") as file:
            file.write((tmp_path / name).read_bytes())
    (tmp_path / "a.json").write_text(json.dumps(rows))
    one, two = write(tmp_path, "part-1.jsonl", rows[:30]), write(tmp_path, "part-2.jsonl", rows[30:])
    kinds = ("parquet", "csv", "tsv", "txt", "json", "txt.gz", "csv.gz", "tsv.gz")
    given: list[Any] = [str(tmp_path / f"a.{kind}") for kind in kinds]
    for train_file in [*given, [one, two], str(tmp_path / "part-*.jsonl")]:
        data = module(tmp_path, train_file=train_file, packing=False, sequence_length=48)
        assert sorted(texts(data, "train") + texts(data, "val")) == sorted(LINES), train_file


def test_units_of_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\nfour\n\nfive")
    val = write(tmp_path, "v.jsonl", [{"text": "x"}])
    expected = {
        "line": ["one", "two", "three", "four", "five"],
        "paragraph": ["one\ntwo", "three\nfour", "five"],
        "document": ["one\ntwo\n\nthree\nfour\n\nfive"],
    }
    for unit, rows in expected.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # empty lines are skipped
            data = module(
                tmp_path, train_file=str(tmp_path / "a.txt"), val_file=val, text_unit=unit, packing=False,
                sequence_length=48,
            )  # fmt: skip
        assert texts(data, "train") == rows


def test_prediction_masks_what_follows(tmp_path: Path) -> None:
    data = module(tmp_path, predict_file=write(tmp_path, "p.jsonl", [{"text": "the cat"}, {"text": "a"}]))
    (batch,) = data.predict_dataloader()
    assert batch["prompt_mask"][:, 0].all() and (batch["input_ids"][~batch["prompt_mask"]] == 1).all()
    parts = [data.decode(*row) for row in zip(batch["input_ids"], batch["prompt_mask"], strict=True)]
    assert parts == [{"prompt": "the cat", "completion": ""}, {"prompt": "a", "completion": ""}]
    assert texts(module(tmp_path, predict_file=write(tmp_path, "p.jsonl", [{"text": ""}])), "predict") == [""]
    file = write(tmp_path, "bad.jsonl", [{"text": "ok"}, {"text": "cat " * 40}])
    with pytest.raises(
        ValueError, match=r"predict_file: expected a prompt of 1 to 23 tokens in row 2, got one of \d+;"
    ):
        module(tmp_path, predict_file=file)


def test_decode(tmp_path: Path) -> None:
    data = module(tmp_path)
    first, second = data._text_tokenizer.encode(["the cat", " sat"])
    tokens = torch.tensor([0, *first, 1, *second, 1, 0, *first, 1])
    prompt = torch.zeros(len(tokens), dtype=torch.bool)
    prompt[: 1 + len(first)] = prompt[-2:] = True
    assert data.decode(tokens, prompt) == {"prompt": "the cat", "completion": " sat"}
    assert data.decode(tokens[1:]) == {"prompt": "", "completion": "the cat sat"}
    assert data.decode(torch.tensor([279])) == {"prompt": "", "completion": data.tokenizer.decode([279])}


def test_the_mask_in_a_text_stays_text(tmp_path: Path) -> None:
    file = write(tmp_path, "b.jsonl", [{"text": f"a <|mask|> and <|endoftext|> {i}"} for i in range(30)])
    data = module(tmp_path, train_file=file, packing=False, sequence_length=64)
    assert "a <|mask|> and <|endoftext|> 7" in texts(data, "train") + texts(data, "val")
    assert not (data._sets["train"].__getitems__([0, 1])["input_ids"] == data.mask_id).any()


class Recipes(TextDataModule):
    """What a user writes."""

    def __init__(self, title_column: str = "title", **arguments: Any) -> None:
        super().__init__(packing=False, **arguments)
        self.title_column = title_column

    def encode(self, rows: Any, tokenize: Any) -> Any:
        titles, steps = tokenize([f"{title}: " for title in rows[self.title_column]]), tokenize(rows["steps"])
        return [(title + step, len(title)) for title, step in zip(titles, steps, strict=True)]


def test_a_format_of_your_own(tmp_path: Path) -> None:
    rows = [{"title": f"Soup {i}", "name": f"Stew {i}", "steps": f"Boil {i}."} for i in range(20)]
    file = write(tmp_path, "r.jsonl", rows)
    data = module(tmp_path, Recipes, train_file=file, num_val=2)
    item = data._sets["train"][0]
    parts = data.decode(item["input_ids"], item["prompt_mask"])
    assert parts["prompt"].startswith("Soup ") and parts["completion"].startswith("Boil ")
    other = module(tmp_path, Recipes, train_file=file, num_val=2, title_column="name")  # another cache
    item = other._sets["train"][0]
    assert other.decode(item["input_ids"], item["prompt_mask"])["prompt"].startswith("Stew ")
    with pytest.raises(ValueError, match=r"train_file: expected a column 'titel', got the columns \['title', 'name',"):
        module(tmp_path, Recipes, train_file=file, title_column="titel")


def test_changed_code_is_another_cache(tmp_path: Path) -> None:
    class First(Recipes):
        def encode(self, rows: Any, tokenize: Any) -> Any:
            return [(ids, 0) for ids in tokenize(rows["steps"])]

    old = First

    class First(Recipes):  # type: ignore[no-redef]  # as when a notebook's cell is edited and run again
        def encode(self, rows: Any, tokenize: Any) -> Any:
            return [(ids, 0) for ids in tokenize([step.upper() for step in rows["steps"]])]

    file = write(tmp_path, "r.jsonl", [{"title": "a", "steps": f"Boil {i}."} for i in range(20)])
    assert texts(module(tmp_path, old, train_file=file), "train")[0].startswith("Boil")
    assert texts(module(tmp_path, First, train_file=file), "train")[0].startswith("BOIL")


def test_rows_of_your_own(tmp_path: Path) -> None:
    class Numbers(TextDataModule):
        def __init__(self, number: int, **arguments: Any) -> None:
            super().__init__(packing=False, **arguments)
            self.number = number

        def load(self, name: str) -> Dataset:
            return Dataset.from_dict({"text": [f"{i} and {i + 1}" for i in range(self.number)]})

    data = module(tmp_path, Numbers, number=30)
    assert (len(data._sets["train"]), len(data._sets["val"])) == (27, 3)
    assert len(module(tmp_path, Numbers, number=50)._sets["train"]) == 45


def names(folder: Path) -> set[str]:
    return {file.name for file in (folder / "cache").iterdir() if file.name.startswith("tokens-")}


def test_the_cache_is_used_and_keyed_by_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path)
    variants: list[dict[str, Any]] = [
        {}, {"sequence_length": 20}, {"seed": 1}, {"num_val": 7}, {"packing": False}, {"vocab_size": 270},
        {"packing": False, "padding": "eos"}, {"mask_token": "<m>"}, {"eos_token": "<e>"},
    ]  # fmt: skip
    for i, variant in enumerate(variants):
        module(tmp_path, train_file=file, **variant)
        assert len(names(tmp_path)) == 2 * (i + 1), variant
    os.utime(file, ns=(1, 1))
    module(tmp_path, train_file=file)
    assert len(names(tmp_path)) == 2 * len(variants)
    other = write(tmp_path, "b.jsonl", [{"text": line.replace("cat", "cow")} for line in LINES])
    os.utime(other, ns=(1, 1))
    os.replace(other, file)  # of equal size and time
    assert "cow" in "".join(texts(module(tmp_path, train_file=file), "train"))
    assert len(names(tmp_path)) == 2 * len(variants) + 2

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(sources.Source, "load", never)
    monkeypatch.setattr("puma_lightning.data.text.tokenizer.train_tokenizer", never)
    module(tmp_path, train_file=file, batch_size=9, eval_batch_size=7)


def test_reading_in_parts_reads_every_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = module(tmp_path / "a", train_file=write(tmp_path), num_val=13)
    monkeypatch.setattr("puma_lightning.data.text.rows._ROWS_AT_ONCE", 7)
    monkeypatch.setattr("puma_lightning.data.text.rows._MAPPED_FOR", 2)
    parts = module(tmp_path / "b", train_file=write(tmp_path), num_val=13)
    for name in ("train", "val"):
        assert texts(whole, name) == texts(parts, name)
    few = module(
        tmp_path / "c", train_file=write(tmp_path), num_val=13, num_train=20, packing=False, sequence_length=48
    )
    assert len(few._sets["train"]) == 20
    monkeypatch.setattr("puma_lightning.data.text.rows._BYTES_AT_ONCE", 1)
    dataset = Dataset.from_dict({"text": LINES})
    rows = list(Selection(dataset, "x").read())
    assert [each["text"] for each in rows] == [[line] for line in LINES] and [each.index[0] for each in rows] == [
        *range(60)
    ]
    assert [each.index[0] for each in Selection(dataset, "x").read(sample=4)] == [0, 15, 30, 45]


def test_the_tokenizer_learns_from_a_bounded_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = module(tmp_path)
    seen = [text for part in data._training_texts() for text in part]
    assert len(seen) == 54 and set(seen) < set(LINES)  # nothing of what is held out
    monkeypatch.setattr("puma_lightning.data.text.rows._ROWS_AT_ONCE", 5)
    monkeypatch.setattr(datamodule, "_TRAINED_ON_ROWS", 20)
    assert 15 <= len([text for part in data._training_texts() for text in part]) <= 25
    monkeypatch.setattr(datamodule, "_TRAINED_ON_CHARACTERS", 10)
    assert len(list(data._training_texts())) == 1


def test_setup_elsewhere_and_a_loaded_tokenizer(tmp_path: Path) -> None:
    data = module(tmp_path)
    other = TextDataModule(write(tmp_path), vocab_size=280, sequence_length=24, cache_dir=str(tmp_path / "cache"))
    other.setup("fit")  # prepare_data ran in another process
    assert other.tokenizer_fingerprint == data.tokenizer_fingerprint and texts(other, "val") == texts(data, "val")
    data.tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = TextDataModule(tokenizer=str(tmp_path / "tokenizer.json"))
    assert loaded.tokenizer_fingerprint == data.tokenizer_fingerprint
    assert (loaded.vocab_size, loaded.eos_id, loaded.mask_id) == (280, 0, 1)


def test_preparing_reads_only_what_the_stage_needs(tmp_path: Path) -> None:
    class Nothing(pl.LightningModule):
        def predict_step(self, batch: Any) -> Any:
            return batch["input_ids"]

    module(tmp_path).tokenizer.save(str(tmp_path / "tokenizer.json"))
    file = write(tmp_path, "p.jsonl", [{"text": "the cat"}])
    data = TextDataModule(
        "Some/Dataset", predict_file=file, tokenizer=str(tmp_path / "tokenizer.json"), cache_dir=str(tmp_path / "cache")
    )
    trainer = pl.Trainer(logger=False, enable_progress_bar=False, enable_checkpointing=False, accelerator="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (tokens,) = trainer.predict(Nothing(), data)
    assert tokens.shape == (1, 512)


def test_workers_load_the_same(tmp_path: Path) -> None:
    alone, helped = module(tmp_path), module(tmp_path, num_workers=1)
    for one, other in zip(alone.val_dataloader(), helped.val_dataloader(), strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("some/set", ("some/set", None, "train")),
        ("some/set:config", ("some/set", "config", "train")),
        ("some/set:config:valid[:5%]", ("some/set", "config", "valid[:5%]")),
        ("some/set::valid", ("some/set", None, "valid")),
    ],
)
def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, asked: tuple[Any, ...]) -> None:
    calls = []

    def load_dataset(name: str, config: str | None, *, split: str, cache_dir: str, **_: Any) -> Dataset:
        calls.append((name, config, split))
        assert Path(cache_dir) == tmp_path / "cache" / "datasets"
        return Dataset.from_dict({"text": LINES})

    monkeypatch.setattr(hub, "_hub_answers", lambda: True)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert len(module(tmp_path, train_file=given)._sets["train"]) > 10
    module(tmp_path, train_file=given)  # from the cache, without the hub
    assert calls == [asked]


def test_hub_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    data = TextDataModule("some/set", cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"train_file: found no file 'some/set', and .* hub can't be reached.*give"):
        data.prepare_data()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_file": "none.jsonl"}, "train_file: expected a file, got none at .*none.jsonl; check the path"),
        ({"val_file": ["none.jsonl"]}, "val_file: "),
        ({"train_file": str(Path(__file__).parent)}, r"train_file: expected a file, .* give its files, for example"),
        ({"train_file": __file__}, "train_file: expected files of one format"),
        ({"padding": "more"}, "padding: expected one of eos, first_eos, none, got 'more'; choose one of these"),
        ({"text_unit": "word"}, "text_unit: expected one of"),
        ({"sequence_length": 1}, "sequence_length: expected at least 2, got 1"),
        ({"vocab_size": 100}, "vocab_size: "),
        ({"mask_token": "<|endoftext|>"}, "mask_token: "),
        ({"num_val": 0}, "num_val: "),
        ({"batch_size": 0}, "batch_size: "),
        ({"tokenizer": "none.json"}, "tokenizer: "),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextDataModule(**arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "train_file: expected rows, got the empty file"),
        ("{not json", "train_file: expected rows in json format in .*b.jsonl, got: "),
        ('{"words": "a"}\n' * 20, r"train_file: expected a column 'text', got the columns \['words'\]"),
        ('{"text": ""}\n' * 20, r"expected enough text for one sequence of 24 tokens, got none .*empty rows skipped"),
        ('{"text": "a"}\n' * 5, r"got none from 4 rows \(8 tokens at the end left over\)"),
        ('{"text": "a"}\n', "num_val: expected fewer than the 1 rows"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "b.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        module(tmp_path, train_file=str(tmp_path / "b.jsonl"))
    assert not list((tmp_path / "cache").glob("tokens-*"))


def test_missing_sets_are_named(tmp_path: Path) -> None:
    data = module(tmp_path)
    for stage in ("test", "predict"):
        with pytest.raises(ValueError, match=f"{stage}_file: expected a file or a data set on the hub, got none"):
            data.setup(stage)
    with pytest.raises(ValueError, match="train_file: expected a file or a data set"):
        TextDataModule(cache_dir=str(tmp_path)).prepare_data()
    assert Rows({"a": [1]}, "x", [0])["a"] == [1]


def test_the_code_of_a_subclass_is_described_the_same_in_every_process_and_by_all_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = """
from puma_lightning.data.text.datamodule import TextDataModule, _described

class Mine(TextDataModule):
    PREFIX = "Q: "
    def encode(self, rows, tokenize, marks=("a", "b")):
        return [(ids, 0) for ids in tokenize(rows["text"]) if "x" not in {"x", "y", "z", "w"}]
    @staticmethod
    def help():
        return 1

print({name: _described(value) for name, value in sorted(vars(Mine).items())})
"""
    (tmp_path / "mine.py").write_text(source)
    command = [sys.executable, str(tmp_path / "mine.py")]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    ]
    first, second = (process.communicate()[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert first == second and "Q: " in first

    def printed(source: str) -> str:
        exec(compile(source, str(tmp_path / "mine.py"), "exec"), {"__name__": "__main__"})
        return capsys.readouterr().out

    assert printed(source) == first
    for old, new in (('"Q: "', '"R: "'), ('("a", "b")', '("a", "c")'), ("return 1", "return 2"), ('"w"}', '"v"}')):
        assert printed(source.replace(old, new)) != first, old

import json
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from puma_lightning import hub
from puma_lightning.data.batch import check_batch
from puma_lightning.data.word_problems.tinygsm import TinyGSMDataModule, gold_answer
from puma_lightning.metrics.programs import ProgramAccuracy

SHARED = Path(__file__).parents[3] / ".." / "shared"
CODE = "def f():\n    return {}"
ROWS = [
    {"question": f" What is {i} plus {i}?\n", "code": "\n" + CODE.format(i + i), "answer": str(i + i)}
    for i in range(40)
]
QUESTIONS = [
    {"question": "How many are 1,000 and 8?", "answer": "1000+8=<<1000+8=1008>>1,008.\n#### 1,008"},
    {"question": "What is 3?", "answer": "It is three.\n#### 3"},
]


def write(folder: Path, name: str, rows: list[Any]) -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def module(folder: Path, rows: list[Any] | None = None, **arguments: Any) -> TinyGSMDataModule:
    """A small DataModule that is ready to use."""
    files = {
        "train_file": write(folder, "train.jsonl", ROWS if rows is None else rows),
        "gsm8k_file": write(folder, "gsm8k.jsonl", QUESTIONS),
    }
    small = {"vocab_size": 300, "sequence_length": 96, "batch_size": 8, "cache_dir": str(folder / "cache")}
    data = TinyGSMDataModule(**{**small, **files, **arguments})
    data.prepare_data()
    data.setup()
    return data


def whole(data: TinyGSMDataModule, name: str) -> dict[str, Any]:
    return data._sets[name].__getitems__(range(len(data._sets[name])))


def texts(data: TinyGSMDataModule, name: str) -> list[tuple[str, str]]:
    batch = whole(data, name)
    rows = [data.decode(*row) for row in zip(batch["input_ids"], batch["prompt_mask"], strict=True)]
    return [(row["prompt"], row["completion"]) for row in rows]


def test_batches(tmp_path: Path) -> None:
    data = module(tmp_path, num_val=5, answer_column="answer")
    assert (data.val_names, data.test_names) == (["val", "gsm8k"], ["test"])
    for batch in data.train_dataloader():
        assert set(batch) == {"input_ids", "prompt_mask"} and batch["input_ids"].shape[1] == 96
        check_batch(batch, mask_id=1, vocab_size=300)
    val, gsm8k = (next(iter(loader)) for loader in data.val_dataloader())
    expected = {row["question"].strip() + "\n": row["answer"] for row in ROWS}
    assert val["answer"] == [expected[prompt] for prompt, _ in texts(data, "val")]
    check_batch(val, mask_id=1, vocab_size=300)
    (test,), (predict,) = data.test_dataloader(), data.predict_dataloader()
    for batch in (gsm8k, test, predict):
        assert batch["answer"] == ["1008", "3"]
        assert (batch["input_ids"][~batch["prompt_mask"]] == data.mask_id).all()
        check_batch(batch, mask_id=1, vocab_size=300, clean=False)
    assert texts(data, "gsm8k") == [(row["question"] + "\n", "") for row in QUESTIONS]


def test_question_and_code_come_back(tmp_path: Path) -> None:
    data = module(tmp_path, num_val=5, separator="\n###\n")
    assert sorted(texts(data, "train") + texts(data, "val")) == sorted(
        (row["question"].strip() + "\n###\n", row["code"].strip()) for row in ROWS
    )
    assert "answer" not in whole(data, "val")


TRAINED: dict[str, Any] = {}


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.text(max_size=30), st.text(max_size=30)), min_size=1, max_size=8),
    st.sampled_from(["eos", "first_eos", "none"]),
    st.integers(8, 40),
    st.integers(1, 6),
)
def test_the_rule_of_the_paper(
    tmp_path_factory: pytest.TempPathFactory, rows: Any, padding: str, length: int, shortest: int
) -> None:
    folder = tmp_path_factory.mktemp("tinygsm")
    if not TRAINED:
        module(folder).tokenizer.save(str(folder / "tokenizer.json"))
        TRAINED["tokenizer"] = str(folder / "tokenizer.json")
    data = TinyGSMDataModule(
        write(folder, "a.jsonl", [{"question": q, "code": c} for q, c in [("good", "x"), *rows]]),
        write(folder, "val.jsonl", ROWS),
        None,
        padding=padding,  # type: ignore[arg-type]
        sequence_length=length,
        min_answer_length=shortest,
        cache_dir=str(folder),
        **TRAINED,
    )
    encode = data._text_tokenizer.encode
    expected = []
    for question, code in [("good", "x" * 1), *rows]:
        prompt, program = encode([question.strip(), code.strip()])
        if not prompt or not program:
            continue
        prompt += encode(["\n"])[0]
        ids = prompt + program
        ids = ids[: length - 1] + [0] * max(1, length - len(ids))
        end = {"eos": length, "first_eos": ids.index(0) + 1, "none": ids.index(0)}[padding]
        if end - len(prompt) >= shortest and len(prompt) < length - 1:  # something is left of the program
            expected.append((ids, [not len(prompt) <= i < end for i in range(length)]))
    data.limits["train"] = None
    if not expected:
        with pytest.raises(ValueError, match="expected enough text"):
            data._open("train")
        return
    made = data._open("train")
    batch = made.__getitems__(range(len(made)))
    assert list(zip(batch["input_ids"].tolist(), batch["prompt_mask"].tolist(), strict=True)) == expected
    assert made.rows == len(rows) + 1 == len(made) + Counter(made.counts).total() - made.counts["cut"]


def test_what_is_left_out_is_counted_and_said(tmp_path: Path) -> None:
    bad = [
        {"question": None, "code": "x"}, {"question": "q", "code": None}, {"question": " ", "code": "x"},
        {"question": "1" * 200, "code": "x"}, {"question": "q", "code": "1" * 200},
    ]  # fmt: skip
    file = write(tmp_path, "bad.jsonl", [*bad, {"question": "q", "code": "x"}])
    message = (
        "train set: 2 sequences of 96 tokens from 6 rows; 3 empty rows skipped, 1 rows skipped .*, 1 rows too long"
    )
    for _ in range(2):  # the second time from the cache
        with pytest.warns(UserWarning, match=message):
            data = module(tmp_path, train_file=file, val_file=write(tmp_path, "val.jsonl", ROWS))
    assert texts(data, "train")[1] == ("q\n", "x")


@pytest.mark.parametrize("padding", ["eos", "first_eos", "none"])
def test_the_reason_for_skipping_is_true(tmp_path: Path, padding: str) -> None:
    """A short program is no fault of its question, and with the paper's padding none at all."""
    file = write(tmp_path, "short.jsonl", [{"question": "q", "code": "x"}, {"question": "1" * 200, "code": "x"}, *ROWS])
    with pytest.warns(UserWarning, match=r"train set: .* from 42 rows; .*whose prompt leaves") as caught:
        module(
            tmp_path, train_file=file, val_file=write(tmp_path, "val.jsonl", ROWS), padding=padding, min_answer_length=4
        )
    (said,) = {str(warning.message) for warning in caught if "train set" in str(warning.message)}
    assert "1 rows skipped whose prompt leaves too few positions" in said
    assert ("1 rows skipped whose answer has too few positions" in said) == (padding != "eos")


def test_questions_that_are_too_long_are_counted_but_refused_for_prediction(tmp_path: Path) -> None:
    file = write(tmp_path, "long.jsonl", [{"question": "1" * 200, "answer": "1"}, *QUESTIONS])
    with pytest.warns(UserWarning, match=r"gsm8k set: 2 sequences .* from 3 rows; 1 rows skipped whose prompt leaves"):
        data = module(tmp_path, gsm8k_file=file, predict_file=write(tmp_path, "p.jsonl", QUESTIONS))
    assert whole(data, "gsm8k")["answer"] == ["1008", "3"]
    with (
        pytest.warns(UserWarning, match="gsm8k set"),
        pytest.raises(ValueError, match=r"gsm8k_file: expected a prompt of 1 to 95 tokens in row 1, got one of 201"),
    ):
        module(tmp_path, gsm8k_file=file)


def test_prediction_needs_no_answers(tmp_path: Path) -> None:
    data = module(tmp_path, predict_file=write(tmp_path, "p.jsonl", [{"question": "What is 1?"}]))
    assert "answer" not in whole(data, "predict") and texts(data, "predict") == [("What is 1?\n", "")]


def test_sets_can_be_switched_off_and_limited(tmp_path: Path) -> None:
    data = module(tmp_path, gsm8k_file=None)
    assert (data.val_names, list(data._sets)) == (["val"], ["train", "val"])
    assert not isinstance(data.val_dataloader(), list)
    with pytest.raises(ValueError, match="test_file: expected a file"):
        data.setup("test")
    limited = module(tmp_path, num_gsm8k=1, num_train=7, num_val=3)
    assert [len(limited._sets[name]) for name in ("train", "val", "gsm8k", "test")] == [7, 3, 1, 2]
    own = module(tmp_path, test_file=write(tmp_path, "t.jsonl", ROWS), num_test=9)
    assert whole(own, "test")["answer"] == [row["answer"] for row in ROWS[:9]]


def test_other_columns(tmp_path: Path) -> None:
    rows = [{"problem": row["question"], "program": row["code"]} for row in ROWS]
    data = module(tmp_path, rows, gsm8k_file=None, question_column="problem", code_column="program")
    assert len(data._sets["train"]) == 36
    with pytest.raises(ValueError, match=r"train_file: expected a column 'question', got .*'problem', 'program'"):
        module(tmp_path, rows)


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("72", "72"), (72, "72"), (72.0, "72"), (0.5, "0.5"), ("#### 72", "72"), ("a\n#### 1,234,567", "1234567"),
        ("x #### -5", "-5"), ("#### $3.50", "3.5"), ("#### +.5", "0.5"), ("#### 70.", "70"), ("1 #### 2 #### 3", "3"),
    ],
)  # fmt: skip
def test_gold_answers(answer: Any, number: str) -> None:
    assert gold_answer(answer) == number


@pytest.mark.parametrize("answer", ["", None, "none", "#### ", "72 #### x", "seven 7", "1 2", "nan", True, "1/2"])
def test_gold_answers_without_a_number_name_their_row(tmp_path: Path, answer: Any) -> None:
    file = write(tmp_path, "bad.jsonl", [{"question": "q", "answer": "1"}, {"question": "q", "answer": str(answer)}])
    with pytest.raises(ValueError, match=r"gsm8k_file, row 2: expected a number as .* answer.*; correct the answer"):
        module(tmp_path, gsm8k_file=file)


def test_a_subclass_with_rows_of_its_own(tmp_path: Path) -> None:
    class Problems(TinyGSMDataModule):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(train_file=None, gsm8k_file=None, answer_column="answer", **arguments)
            self.held_out = False

        def load(self, name: str) -> Dataset:
            return Dataset.from_list([{**row, "question": f"{name} {row['question']}"} for row in ROWS])

        def identity(self, name: str) -> dict[str, Any]:
            return {"problems": 1, "split": name}

        def has(self, name: str) -> bool:
            return name == "test"

        def prompts_only(self, name: str) -> bool:
            return name == "predict"

    data = Problems(vocab_size=280, sequence_length=96, cache_dir=str(tmp_path))
    data.prepare_data()
    data.setup()
    assert list(data._sets) == ["train", "val", "test"]
    for name in ("train", "val", "test"):
        assert texts(data, name)[3][0] == f"{name}  What is 3 plus 3?\n"
    assert whole(data, "test")["answer"] == [row["answer"] for row in ROWS]
    assert "answer" not in whole(data, "train")


def test_the_defaults_are_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(name: str, config: str | None, *, split: str, cache_dir: str, **_: Any) -> Dataset:
        calls.append((name, config, split))
        return Dataset.from_list(QUESTIONS if name == "openai/gsm8k" else ROWS)

    monkeypatch.setattr(hub, "_hub_answers", lambda: True)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    data = TinyGSMDataModule(vocab_size=280, sequence_length=96, cache_dir=str(tmp_path))
    data.prepare_data()
    data.setup()
    assert set(calls) == {("TinyGSM/TinyGSM", None, "train"), ("openai/gsm8k", "main", "test")}
    assert [len(data._sets[name]) for name in ("train", "val", "gsm8k", "test", "predict")] == [36, 4, 2, 2, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gsm8k_file": "none.jsonl"}, "gsm8k_file: expected a file"),
        ({"num_gsm8k": 0}, "num_gsm8k: expected at least 1"),
        ({"min_answer_length": 0}, "min_answer_length: expected at least 1"),
        ({"min_answer_length": 9, "sequence_length": 9}, "sequence_length: expected at least 10, got 9"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TinyGSMDataModule(**arguments)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
def test_programs_of_gsm8k(tmp_path: Path) -> None:
    file, questions = SHARED / "data/gsm8k/train_programs.jsonl", SHARED / "data/gsm8k/test.jsonl"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is skipped or cut
        data = TinyGSMDataModule(
            str(file), None, str(questions), answer_column="answer", tokenizer=str(SHARED / "tokenizers/gpt2"),
            cache_dir=str(tmp_path), num_val=500,
        )  # fmt: skip
        data.prepare_data()
        data.setup()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 7001
    assert sorted(texts(data, "train") + texts(data, "val")) == sorted(
        (row["question"].strip() + "\n", row["code"].strip()) for row in rows
    )
    gold = [
        json.loads(line)["answer"].split("#### ")[1].replace(",", "") for line in questions.read_text().splitlines()
    ]
    assert whole(data, "gsm8k")["answer"] == gold and len(gold) == 1319
    sizes = (whole(data, "train")["input_ids"] != data.eos_id).sum(1)
    assert torch.all(sizes < 512)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
def test_programs_of_gsm8k_score_100_percent_through_the_whole_path(tmp_path: Path) -> None:
    """Tokenised with GPT-2's tokenizer, laid out, decoded, extracted, run and compared; with a constant changed, 0%."""
    file = SHARED / "data/gsm8k/train_programs.jsonl"
    data = TinyGSMDataModule(
        str(file), None, None, answer_column="answer", tokenizer=str(SHARED / "tokenizers/gpt2"),
        cache_dir=str(tmp_path), num_val=1, eval_batch_size=500,
    )  # fmt: skip
    data.prepare_data()
    data.setup()
    answers = {row["question"].strip(): row["answer"] for row in map(json.loads, file.read_text().splitlines())}
    sets = [whole(data, name) for name in ("train", "val")]
    shown = [
        data.decode(ids, given)
        for part in sets
        for ids, given in zip(part["input_ids"], part["prompt_mask"], strict=True)
    ]
    completions = [text["completion"] for text in shown]
    golds = [answers[text["prompt"].strip()] for text in shown]
    assert len(completions) == 7001

    def changed(completion: str) -> str:
        """With another number in the step that is returned, the first that its value depends on."""
        (result,) = re.findall(r"\n    result = (\w+)", completion)
        step = re.search(rf"\n    {result} = (.*)", completion)
        assert step is not None
        for number in re.finditer(r"\d*\.?\d+", step[1]):
            other = step[1][: number.start()] + str(2 * float(number[0]) + 1) + step[1][number.end() :]
            if abs(eval(other) - eval(step[1])) > 0.01:
                return completion[: step.start(1)] + other + completion[step.end(1) :]
        raise AssertionError(completion)

    altered = [changed(completion) for completion in completions]
    assert all(one != other for one, other in zip(completions, altered, strict=True))
    for texts_, share in ((completions, 1.0), (altered, 0.0)):
        metric = ProgramAccuracy()
        metric.update(texts_, golds)
        assert metric.compute()["accuracy"] == share
        assert metric.total == 7001

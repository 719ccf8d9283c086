"""Generation on text: metrics that read completions, samples in the log, judged lines in the predictions."""

import json
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from torchmetrics import Metric

from puma_lightning import GenerationEvaluation, MaskedDiffusion, PredictionWriter, RandomMasking, Sampler

LETTERS = "abcdefgh"
V, MASK, LENGTH = 9, 8, 6


class Alphabet(torch.nn.Module):
    """Writes the alphabet."""

    vocab_size = V

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, xt):
        answer = torch.arange(xt.shape[1]).expand(xt.shape)
        return 9.0 * torch.nn.functional.one_hot(answer, V) + self.weight


class Texts(pl.LightningDataModule):
    """Two letters are given; the first set has whole texts, the second questions with answers."""

    val_names = test_names = ("texts", "questions")

    def __init__(self, size=5):
        super().__init__()
        prompt = torch.arange(LENGTH) < 2
        whole = torch.arange(LENGTH)
        self.texts = [{"input_ids": whole, "prompt_mask": prompt}] * size
        question = whole.masked_fill(~prompt, MASK)
        answers = ["cdef", "cdef", "cdex", "cdef", "oops"]
        self.questions = [{"input_ids": question, "prompt_mask": prompt, "answer": answer} for answer in answers]

    def val_dataloader(self):
        return [DataLoader(self.texts, batch_size=2), DataLoader(self.questions, batch_size=2)]

    def predict_dataloader(self):
        return DataLoader(self.questions, batch_size=2)

    def decode(self, tokens, prompt_mask):
        assert MASK not in tokens
        return {
            "prompt": "".join(LETTERS[i] for i in tokens[prompt_mask]),
            "completion": "".join(LETTERS[i] for i in tokens[~prompt_mask]),
        }


class Equal(Metric):
    """Shares of completions that are the answer, and that have its length."""

    def __init__(self):
        super().__init__()
        self.add_state("right", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("long", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, completions: list[str], answers: list[str]) -> None:
        for completion, answer in zip(completions, answers, strict=True):
            self.right += completion == answer
            self.long += len(completion) == len(answer)
            self.total += 1

    def compute(self):
        return {"accuracy": self.right / self.total, "length": self.long / self.total}

    def judge(self, completions, answers=None):
        return [
            {"correct": None if answers is None else c == a}
            for c, a in zip(completions, answers or completions, strict=True)
        ]


def run(folder, callbacks, **options):
    return pl.Trainer(
        accelerator="cpu", default_root_dir=folder, logger=CSVLogger(folder, name="log"), callbacks=callbacks,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip


def model():
    return MaskedDiffusion(Alphabet(), MASK, RandomMasking())


def test_metrics_get_what_they_ask_for(tmp_path):
    callback = GenerationEvaluation({"text": Equal()}, [Sampler(), Sampler(tokens_per_step=2)], num_shown=1)
    trainer = run(tmp_path, [callback])
    (_texts, _questions) = trainer.validate(model(), datamodule=Texts(), verbose=False)
    for name in ("confidence_1", "confidence_2"):
        assert trainer.callback_metrics[f"val/text_accuracy/{name}/questions"] == pytest.approx(3 / 5)
        assert trainer.callback_metrics[f"val/text_length/{name}/questions"] == 1
        assert f"val/text_accuracy/{name}" not in trainer.callback_metrics  # no answers there, nothing to judge
    assert trainer.callback_metrics["val/nfe/confidence_2/questions"] == 2
    assert "val/loss" in trainer.callback_metrics  # of the whole texts
    assert not [name for name in trainer.callback_metrics if name.startswith("val/loss/")]  # questions have none
    assert any("text_accuracy 60.0%" in line and "(5 sequences" in line for line in callback.summary)


class Unanswered(Texts):
    """No set has answers."""

    def train_dataloader(self):
        return DataLoader(self.texts, batch_size=2)

    def val_dataloader(self):
        return DataLoader(self.texts, batch_size=2)

    test_dataloader = val_dataloader


def warned(call, *args, **options):
    """What a call said about metrics that never apply."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(*args, **options)
    return [str(warning.message) for warning in caught if "logs nothing of" in str(warning.message)]


def test_a_metric_that_never_applies_is_told_once_a_run(tmp_path):
    class Length(Equal):
        def update(self, completions: list[str]) -> None:
            self.total += len(completions)

    callback = GenerationEvaluation({"text": Equal(), "length": Length()}, [Sampler()])
    trainer = run(tmp_path, [callback], max_epochs=3, num_sanity_val_steps=1)
    for call in (trainer.fit, trainer.validate, trainer.test):
        (said,) = warned(call, model(), datamodule=Unanswered())
        assert "nothing of 'text': expected a set whose batches have an 'answer'" in said
        assert ("the test sets" if call == trainer.test else "the val sets") in said


def test_a_metric_that_applies_to_one_set_is_not_told(tmp_path):
    callback = GenerationEvaluation({"text": Equal()}, [Sampler()])
    assert not warned(run(tmp_path, [callback]).validate, model(), datamodule=Texts())


def test_the_sanity_check_does_not_tell(tmp_path):
    callback = GenerationEvaluation({"text": Equal()}, [Sampler()])
    trainer = run(tmp_path, [callback], max_steps=1, num_sanity_val_steps=1)  # ends before a validation
    assert not warned(trainer.fit, model(), datamodule=Unanswered())


def test_samples_are_shown_as_text(tmp_path):
    callback = GenerationEvaluation({"text": Equal()}, [Sampler(), Sampler(tokens_per_step=2)], num_shown=3)
    trainer = run(tmp_path, [callback])
    trainer.validate(model(), datamodule=Texts(), verbose=False)
    text = (tmp_path / "log" / "version_0" / "samples.md").read_text()
    assert text.startswith("## Step 0")
    assert text.count("### confidence_1/questions ") == text.count("### confidence_2/questions ") == 3
    assert text.count("```\nab\n```\n\n```\ncdef\n```") == 6
    assert "answer: cdex" in text and "4 passes" in text and "2 passes" in text


def test_generation_runs_in_the_precision_of_the_run(tmp_path):
    seen = set()
    lm = model()
    forward = lm.backbone.forward
    lm.backbone.forward = lambda xt: (seen.add(torch.is_autocast_enabled("cpu")), forward(xt))[1]
    callback = GenerationEvaluation({"text": Equal()}, [Sampler()])
    run(tmp_path, [callback], precision="bf16-mixed").validate(lm, datamodule=Texts(), verbose=False)
    assert seen == {True}


def test_a_data_module_that_cannot_decode_is_told(tmp_path):
    data = Texts()
    data.decode = None
    with pytest.raises(ValueError, match=r"decode: expected a function .* got none; define it"):
        run(tmp_path, [GenerationEvaluation({"text": Equal()}, [Sampler()])]).validate(model(), datamodule=data)


def test_nothing_is_shown_unless_asked_for(tmp_path):
    run(tmp_path, [GenerationEvaluation({"text": Equal()}, [Sampler()])]).validate(
        model(), datamodule=Texts(), verbose=False
    )
    assert not list(tmp_path.rglob("samples.md"))


def test_predictions_are_judged_by_the_same_metric(tmp_path):
    output = tmp_path / "predictions.jsonl"
    evaluation = GenerationEvaluation({"text": Equal()}, [Sampler()])
    trainer = run(tmp_path, [PredictionWriter(str(output)), evaluation])
    trainer.predict(model(), datamodule=Texts(), return_predictions=False)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["correct"] for line in lines] == [True, True, False, True, False]
    assert all(line["prompt"] == "ab" and line["completion"] == "cdef" and line["nfe"] == 4 for line in lines)
    assert [line["answer"] for line in lines] == [row["answer"] for row in Texts().questions]


def test_without_a_metric_predictions_are_text_alone(tmp_path):
    output = tmp_path / "predictions.jsonl"
    run(tmp_path, [PredictionWriter(str(output))]).predict(model(), datamodule=Texts(), return_predictions=False)
    line = json.loads(output.read_text().splitlines()[0])
    assert line["completion"] == "cdef" and "correct" not in line


def test_a_metric_that_asks_for_something_else_is_refused():
    class Odd(Equal):
        def update(self, completions: list[str], colour: str) -> None: ...

    with pytest.raises(ValueError, match=r"update that takes some of tokens, .*, got \['colour'\] in metric 'odd'"):
        GenerationEvaluation({"odd": Odd()}, [Sampler()])
    with pytest.raises(ValueError, match="num_shown"):
        GenerationEvaluation({"text": Equal()}, [Sampler()], num_shown=-1)


def test_a_prompt_that_covers_everything_is_still_refused(tmp_path):
    rows = [{"input_ids": torch.arange(LENGTH), "prompt_mask": torch.ones(LENGTH, dtype=torch.bool)}]
    with pytest.raises(ValueError, match="covers the whole sequence"):
        run(tmp_path, []).validate(model(), DataLoader(rows), verbose=False)

"""What a DataModule may offer: nothing is required, what is wrong is named, and one place reads it."""

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from puma_lightning import (
    GenerationEvaluation,
    MaskedDiffusion,
    PredictionWriter,
    ProgressiveUnmasking,
    Sampler,
    SudokuDataModule,
    TextDataModule,
    TransformerBackbone,
    UnmaskingTrajectory,
    WordProblemsDataModule,
)
from puma_lightning.cli import main
from puma_lightning.data.base import DataOffer, Picture, offer_of

SOURCE = Path(__file__).parents[2] / "src" / "puma_lightning"
OFFERS = ("vocab_size", "mask_id", "eos_id", "decode", "picture", "tokenizer_fingerprint")
LENGTH, MASK = 8, 10


class Plain(pl.LightningDataModule):
    """A user's own, of loaders alone."""

    def train_dataloader(self) -> DataLoader[Any]:
        given = torch.arange(LENGTH) < 2
        sequences = (torch.arange(12)[:, None] + torch.arange(LENGTH)) % 10
        return DataLoader([{"input_ids": row, "prompt_mask": given} for row in sequences], batch_size=4)

    predict_dataloader = train_dataloader

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return [self.train_dataloader(), self.train_dataloader()]

    test_dataloader = val_dataloader


class Right(MeanMetric):
    """The share of positions as in the data."""

    def update(self, tokens: torch.Tensor, input_ids: torch.Tensor) -> None:  # type: ignore[override]
        super().update((tokens == input_ids).float())


def run(folder: Path, data: pl.LightningDataModule) -> tuple[set[str], str]:
    """Train, test and predict with every callback that could use an offer: the test's metrics, and the checkpoint."""
    torch.manual_seed(0)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=2, limit_train_batches=2, logger=CSVLogger(folder), enable_progress_bar=False,
        enable_model_summary=False, callbacks=[
            GenerationEvaluation({"right": Right()}, [Sampler()], num_shown=1), UnmaskingTrajectory(),
            PredictionWriter(str(folder / "predictions.jsonl")),
        ],
    )  # fmt: skip
    backbone = TransformerBackbone(11, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1)
    model = MaskedDiffusion(backbone, MASK, ProgressiveUnmasking(2))
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    measured = set(trainer.callback_metrics)
    trainer.predict(model, data, return_predictions=False)
    return measured, trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]


def test_a_data_module_of_loaders_alone_offers_nothing_and_everything_works(tmp_path: Path) -> None:
    offer = DataOffer(Plain())
    assert [getattr(offer, name) for name in OFFERS] == [None] * len(OFFERS)
    assert offer.set_names("val", 2) == ["0", "1"]
    measured, _ = run(tmp_path, Plain())
    assert {"test/loss", "test/loss/1", "test/right/confidence_1", "test/right/confidence_1/1"} <= measured
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 12
    assert next(tmp_path.rglob("unmasking_order.png"))


def test_what_is_offered_is_used(tmp_path: Path) -> None:
    class Rich(Plain):
        val_names = test_names = ("easy", "hard")
        picture = Picture(torch.arange(LENGTH).reshape(2, 4))
        tokenizer_fingerprint = "ours"

        def decode(self, tokens: torch.Tensor, prompt_mask: torch.Tensor | None) -> dict[str, str]:
            return {"completion": "".join(map(str, tokens.tolist()))}

    measured, checkpoint = run(tmp_path, Rich())
    assert {"test/loss/hard", "test/right/confidence_1/hard"} <= measured
    assert '"completion": "' in (tmp_path / "predictions.jsonl").read_text()
    assert "confidence_1/hard 1" in next(tmp_path.rglob("samples.md")).read_text()
    assert torch.load(checkpoint, weights_only=True)["puma_lightning"]["facts"]["tokenizer"] == "ours"


@pytest.mark.parametrize("nobody", [None, SimpleNamespace(datamodule=None)])
def test_without_a_trainer_or_a_data_module_nothing_is_offered(nobody: Any) -> None:
    assert [getattr(offer_of(nobody), name) for name in OFFERS] == [None] * len(OFFERS)


def of(**offered: Any) -> DataOffer:
    return DataOffer(type("Mine", (), {name: value for name, value in offered.items()})())


def decode_one(tokens: Any) -> dict[str, str]:
    return {}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("vocab_size", "11", "vocab_size: expected an integer, got '11' from Mine; correct it, or leave it out"),
        ("vocab_size", True, "vocab_size: expected an integer, got True"),
        ("mask_id", 10.0, "mask_id: expected an integer, got 10.0"),
        ("eos_id", [0], r"eos_id: expected an integer, got \[0\]"),
        ("decode", "yes", r"decode: expected a function \(tokens, prompt_mask\) -> dict\[str, str\], got 'yes'"),
        ("decode", staticmethod(decode_one), r"decode: expected a function \(tokens, prompt_mask\) .*, got <function"),
        ("picture", (2, 4), r"picture: expected a puma_lightning.data.base.Picture, got \(2, 4\)"),
        ("tokenizer_fingerprint", 3, "tokenizer_fingerprint: expected a string, got 3"),
    ],
)
def test_what_is_of_the_wrong_type_is_named(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(of(**{name: value}), name)


@pytest.mark.parametrize("names", ["ab", ["a"], ["a", "b", "c"], ["a", "a"], [0, 1]])
@pytest.mark.parametrize("stage", ["val", "test"])
def test_sets_need_one_name_each(stage: Any, names: Any) -> None:
    with pytest.raises(
        ValueError, match=f"{stage}_names: expected a different name for each of 2 {stage} loaders, got"
    ):
        of(**{f"{stage}_names": names}).set_names(stage, 2)


@pytest.mark.parametrize("texts", [None, "text", {"completion": 3}, {3: "completion"}, ["text"]])
def test_decode_returns_texts_by_name(texts: Any) -> None:
    decode = of(decode=lambda self, tokens, prompt_mask: texts).decode
    assert decode is not None
    with pytest.raises(ValueError, match=r"decode: expected a function .*, got one that returned .*; return texts by"):
        decode(torch.arange(3), None)


def test_what_is_offered_is_looked_up_when_it_is_needed() -> None:
    """A tokenizer that is still to be trained has no fingerprint yet, and nobody has asked for it."""

    class Late(pl.LightningDataModule):
        eos_id = np.int64(3)

        @property
        def tokenizer_fingerprint(self) -> str:
            raise RuntimeError("not yet")

    assert DataOffer(Late()).eos_id == 3
    with pytest.raises(RuntimeError, match="not yet"):
        _ = DataOffer(Late()).tokenizer_fingerprint


@pytest.mark.parametrize("name", ["vocab_size", "mask_id"])
def test_what_the_command_line_needs_is_asked_for(name: Any) -> None:
    assert of(**{name: 5}).required(name) == 5
    with pytest.raises(ValueError, match=f"{name}: expected an integer, as an attribute of Mine, got none; set it in"):
        of().required(name)


def test_the_command_line_says_what_a_data_module_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lacking.py").write_text(
        "import lightning.pytorch as pl\nclass Mine(pl.LightningDataModule): mask_id = 5"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    parts = ("model=MaskedDiffusion", "model.backbone=TransformerBackbone", "model.forward_process=RandomMasking")
    with pytest.raises(SystemExit):
        main(["fit", *(f"--{part}" for part in parts), "--data=lacking.Mine", "--trainer.accelerator=cpu"])
    assert "vocab_size: expected an integer, as an attribute of Mine, got none" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [SudokuDataModule, TextDataModule, WordProblemsDataModule])
def test_ours_offer_what_they_have_from_the_start(kind: Any, tmp_path: Path) -> None:
    data = kind(cache_dir=str(tmp_path))
    offer = DataOffer(data)
    assert (offer.required("vocab_size"), offer.required("mask_id")) == (data.vocab_size, data.mask_id)
    assert offer.eos_id == (None if kind is SudokuDataModule else data.eos_id)
    assert offer.decode is not None
    assert (offer.picture is not None) == (kind is SudokuDataModule)
    assert offer.set_names("val", len(data.val_names)) == data.val_names
    assert offer.set_names("test", 1) == data.test_names


def test_a_picture_says_which_position_each_cell_shows() -> None:
    for positions in (torch.arange(4), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match=r"positions: expected int64 \(rows, columns\), got "):
            Picture(positions)


def asks_a_data_module(node: ast.AST) -> bool:
    """Whether code looks up what a DataModule may lack: ``trainer.datamodule``, or getattr or hasattr of one."""
    if isinstance(node, ast.Attribute):
        return node.attr == "datamodule"
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr")):
        return False
    names = [ast.unparse(argument).lower().split(".")[-1] for argument in node.args[:2]]
    return any("data" in name and "dataset" not in name for name in names)


def test_nothing_else_asks_a_data_module_what_it_has() -> None:
    found = {
        f"{path.relative_to(SOURCE)}:{node.lineno}"  # type: ignore[attr-defined]
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if asks_a_data_module(node)
    }
    assert {place.split(":")[0] for place in found} == {"data/base.py"}, sorted(found)

"""What a DataModule may offer: everything is optional, is read in one place, and is told when it has another form."""

import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

import puma_lightning
from puma_lightning import MaskedDiffusion, TransformerBackbone
from puma_lightning.data.base import Grid, Offered

V, MASK = 7, 6


class Plain(pl.LightningDataModule):
    """Loaders and nothing else."""

    def train_dataloader(self):
        return DataLoader([{"input_ids": row} for row in torch.randint(MASK, (16, 8))], batch_size=4)

    def val_dataloader(self):
        return [self.train_dataloader(), self.train_dataloader()]


@pytest.mark.parametrize("datamodule", [None, Plain()], ids=["none", "plain"])
def test_a_data_module_may_offer_nothing(datamodule):
    offered = Offered(datamodule)
    assert offered.eos_id is offered.decode is offered.tokenizer_fingerprint is offered.grid is None
    assert offered.loader_name("val", 1) == "1"


def test_a_plain_data_module_trains_and_validates():
    backbone = TransformerBackbone(V, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=4, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(MaskedDiffusion(backbone, MASK), Plain())
    assert {"val/loss", "val/loss/1"} <= set(trainer.callback_metrics)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vocab_size", "7"),
        ("vocab_size", None),
        ("mask_id", True),
        ("mask_id", None),
        ("eos_id", "<eos>"),
        ("decode", {"prompt": "x"}),
        ("tokenizer_fingerprint", 3),
        ("grid", (9, 9)),
    ],
)
def test_an_offer_of_another_form_is_told_by_name(name, value):
    datamodule = Plain()
    setattr(datamodule, name, value)
    with pytest.raises(ValueError, match=rf"{name}.*got.*;"):
        getattr(Offered(datamodule), name)


@pytest.mark.parametrize("names", ["val", ["only one"], {"a": 1}])
def test_loaders_without_a_name_of_their_own_are_told(names):
    datamodule = Plain()
    datamodule.val_names = names
    with pytest.raises(ValueError, match=r"val_names: expected a list with a name for each val loader"):
        Offered(datamodule).loader_name("val", 1)


def test_what_is_offered_is_what_is_read():
    datamodule = Plain()
    datamodule.vocab_size, datamodule.mask_id, datamodule.eos_id = V, MASK, 0
    datamodule.val_names, datamodule.grid = ("a", "b"), Grid(2, 4, 1, 2)
    offered = Offered(datamodule)
    assert (offered.vocab_size, offered.mask_id, offered.eos_id) == (V, MASK, 0)
    assert offered.loader_name("val", 1) == "b" and offered.grid.columns == 4


def test_offers_are_read_in_one_place():
    """No other file asks a DataModule whether it has something."""
    sources = Path(puma_lightning.__file__).parent
    asking = re.compile(r"(getattr|hasattr)\((trainer\.)?_?data_?module|getattr\(data,|(?<!_)datamodule\.(?!base|__)\w")
    found = {str(path.relative_to(sources)) for path in sources.rglob("*.py") if asking.search(path.read_text())}
    assert found <= {"data/base.py"}

"""Predictions as JSON lines."""

import json
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from puma_lightning import MaskedDiffusion, PredictionWriter, RandomMasking, TransformerBackbone

SCRIPT = """
import sys, torch, lightning.pytorch as pl
from torch.utils.data import DataLoader
from puma_lightning import MaskedDiffusion, PredictionWriter, RandomMasking, TransformerBackbone
torch.set_num_threads(1)

class Data(pl.LightningDataModule):
    def predict_dataloader(self):
        given = torch.arange(6) < 1
        return DataLoader([{"input_ids": torch.full((6,), i), "prompt_mask": given} for i in range(11)], batch_size=2)
    def decode(self, tokens, prompt_mask):
        return {"text": "-".join(map(str, tokens.tolist()))}

if __name__ == "__main__":
    torch.manual_seed(0)
    backbone = TransformerBackbone(13, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1)
    trainer = pl.Trainer(accelerator="cpu", devices=int(sys.argv[2]), logger=False, enable_progress_bar=False,
                         callbacks=[PredictionWriter(sys.argv[1])])
    trainer.predict(MaskedDiffusion(backbone, 12, RandomMasking()), datamodule=Data(), return_predictions=False)
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_every_sequence_once_in_order_whatever_the_number_of_processes(tmp_path, processes):
    (tmp_path / "predict.py").write_text(SCRIPT)
    output = tmp_path / "out" / "predictions.jsonl"
    subprocess.run([sys.executable, "predict.py", str(output), str(processes)], cwd=tmp_path, check=True, timeout=120)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(11))
    assert [line["tokens"][0] for line in lines] == list(range(11))  # its own prompt
    for line in lines:
        assert line["text"] == "-".join(map(str, line["tokens"]))
        assert line["nfe"] == 5
        assert sorted(line["reveal_step"]) == [-1, 0, 1, 2, 3, 4]
    assert list(output.parent.iterdir()) == [output]  # no parts left


class Stream(IterableDataset):
    def __iter__(self):
        given = torch.arange(6) < 1
        return iter([{"input_ids": torch.full((6,), i), "prompt_mask": given} for i in range(11)])


def predict(tmp_path, loaders):
    backbone = TransformerBackbone(13, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1)
    output = tmp_path / "predictions.jsonl"
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[PredictionWriter(str(output))]
    )
    trainer.predict(MaskedDiffusion(backbone, 12, RandomMasking()), loaders, return_predictions=False)
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_an_iterable_data_set_is_counted(tmp_path):
    lines = predict(tmp_path, DataLoader(Stream(), batch_size=4))  # the last batch is smaller
    assert [line["index"] for line in lines] == [line["tokens"][0] for line in lines] == list(range(11))


def test_several_data_sets_are_told_apart(tmp_path):
    lines = predict(tmp_path, [DataLoader(Stream(), batch_size=4), DataLoader(list(Stream()), batch_size=3)])
    assert [(line["dataloader"], line["index"]) for line in lines] == [(d, i) for d in (0, 1) for i in range(11)]
    assert [line["tokens"][0] for line in lines] == [*range(11), *range(11)]


def test_without_a_prompt_mask_whatever_is_not_masked_is_given(tmp_path):
    row = torch.tensor([1, 2, 12, 3, 12, 0])
    (line,) = predict(tmp_path, DataLoader([{"input_ids": row}]))
    assert [line["tokens"][i] for i in (0, 1, 3, 5)] == [1, 2, 3, 0]
    assert line["nfe"] == 2
    assert 12 not in line["tokens"]

"""What the first batch tells of a set-up before any step is taken. What it refuses is tested with what is refused."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, default_collate

from puma_lightning import AutoregressiveLM, BlockDiffusion, MaskedDiffusion, TransformerBackbone

V, MASK, EOS, LENGTH = 7, 6, 0, 8


def batch_of(kind: str) -> dict[str, torch.Tensor]:
    """An answer of three tokens after two that are given; then EOS, or what there is in its place."""
    tokens = torch.tensor([1, 2, 3, 4, 5, EOS, EOS, EOS])
    position = torch.arange(LENGTH)
    given = position < 2
    if kind == "first_eos":
        given = given | (position > 5)
    if kind == "none":
        return {"input_ids": tokens, "prompt_mask": given, "attention_mask": position < 5}
    if kind == "a suffix":  # what an infilled text goes on with
        return {"input_ids": tokens.where(position < 5, 4), "prompt_mask": given | (position > 4)}
    if kind == "full":
        tokens = tokens.where(position < 7, 3)
    return {"input_ids": tokens, "prompt_mask": given}


def beside_a_longer_one(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """With which padding stays: what no row of a slot needs is cut off."""
    longer = {"input_ids": torch.arange(LENGTH) % 5 + 1, "prompt_mask": torch.arange(LENGTH) < 2}
    if "attention_mask" in rows[0]:
        longer["attention_mask"] = torch.ones(LENGTH, dtype=torch.bool)
    return default_collate([*rows[1:], longer])


def module(model: str, eos_id: int | None) -> pl.LightningModule:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_layers": 1, "num_heads": 2, "max_length": LENGTH}
    if model == "autoregressive":
        return AutoregressiveLM(TransformerBackbone(V, causal=True, **sizes), MASK, eos_id=eos_id)
    backbone = TransformerBackbone(V, **sizes)
    return (
        BlockDiffusion(backbone, MASK, 4, eos_id=eos_id)
        if model == "blocks"
        else MaskedDiffusion(backbone, MASK, eos_id=eos_id)
    )


@pytest.mark.parametrize("model", ["any order", "blocks", "autoregressive"])
@pytest.mark.parametrize("kind", ["eos", "first_eos", "none", "a suffix", "full"])
@pytest.mark.parametrize("eos_id", [None, EOS])
def test_a_model_that_does_not_learn_where_answers_end_is_told(model, kind, eos_id):
    """In any order it sees in training how long they are; otherwise it does not if no EOS is to be predicted."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_steps=1, enable_checkpointing=False, **quiet)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(module(model, eos_id), DataLoader([batch_of(kind)] * 4, 2, collate_fn=beside_a_longer_one))
    told = any("does not learn where one ends" in str(each.message) for each in said)
    assert told == (eos_id is not None and (kind == "none" or (kind == "first_eos" and model == "any order")))

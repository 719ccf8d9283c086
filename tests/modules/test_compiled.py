"""With compiled layers nothing is compiled again once training, validation and sampling have each been seen."""

import lightning.pytorch as pl
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.data import DataLoader

from puma_lightning import (
    BlockDiffusion,
    Confidence,
    GenerationEvaluation,
    MaskedDiffusion,
    ProgressiveUnmasking,
    Sampler,
    SudokuSolved,
    TransformerBackbone,
)

V, MASK, LENGTH = 9, 8, 16


def rows(number: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Prompts of every length."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randint(MASK, (number, LENGTH), generator=generator)
    return [{"input_ids": row, "prompt_mask": torch.arange(LENGTH) < i % 9} for i, row in enumerate(x0)]


class Compilations(pl.Callback):
    """How many there had been at each validation's end and before the first step; masked positions of training batches;
    rows of all batches.
    """

    def __init__(self, counter: CompileCounter) -> None:
        self.counter, self.seen, self.masked, self.rows = counter, [], [], []
        self.before: list[int] = []

    def on_train_start(self, trainer, module):
        def count(embedding, inputs, output):
            if trainer.global_step:  # the check of the first batch is over
                self.rows.append(len(inputs[0]))

        module.backbone.embed_tokens.register_forward_hook(count)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.before.append(self.counter.frame_count)
        self.masked.append(int((batch["xt"] == MASK).sum()))

    def on_validation_end(self, trainer, module):
        self.seen.append(self.counter.frame_count)


@pytest.mark.parametrize("large", [False, True], ids=["logits", "statistics"])
@pytest.mark.parametrize("model", [MaskedDiffusion, BlockDiffusion])
def test_nothing_is_compiled_after_the_first_validation(model, large):
    """However many positions are masked, and as samples of a batch end one by one."""
    torch._dynamo.reset()
    counter = CompileCounter()
    backbone = TransformerBackbone(V, 16, 24, num_layers=2, num_heads=2, max_length=LENGTH)
    for layer in backbone.layers:
        layer.compile(backend=counter)
    blocks = {"block_size": 4} if model is BlockDiffusion else {}
    module = model(backbone, MASK, forward_process=ProgressiveUnmasking(4, Confidence(), 0.5), scheduler=None, **blocks)
    module.large_vocabulary = 1 if large else None
    compilations = Compilations(counter)
    callbacks: list[pl.Callback] = [compilations]
    if not blocks:
        callbacks.append(GenerationEvaluation({"solved": SudokuSolved()}, [Sampler(threshold=0.2)]))
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=24, val_check_interval=6, check_val_every_n_epoch=None, num_sanity_val_steps=0,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(module, DataLoader(rows(40, 0), batch_size=4, shuffle=True), DataLoader(rows(10, 1), batch_size=4))
    assert len(set(compilations.masked)) > 5
    if not blocks:
        assert set(compilations.rows) == {4, 2}
    if not blocks:
        assert compilations.before[0] == 0  # the trial of the first batch has another shape
    assert compilations.seen[0] > 0
    assert compilations.seen == compilations.seen[:1] * 4

"""The step progress bar."""

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from puma_lightning import MaskedDiffusion, ProgressiveUnmasking, StepProgressBar, TransformerBackbone


class Recorder(StepProgressBar):
    def __init__(self):
        super().__init__(refresh_rate=1)
        self.seen = []

    def on_train_batch_end(self, *args):
        super().on_train_batch_end(*args)
        self.seen.append(self.train_progress_bar.n)

    def on_train_end(self, *args):
        self.total = self.train_progress_bar.total
        super().on_train_end(*args)


def test_it_counts_optimizer_steps_over_epochs_and_accumulation(capsys):
    rows = [{"input_ids": torch.randint(0, 4, (6,))} for _ in range(24)]  # 6 batches an epoch
    backbone = TransformerBackbone(5, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1)
    bar = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=7, accumulate_grad_batches=2, callbacks=[bar], logger=False,
        enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(MaskedDiffusion(backbone, 4, ProgressiveUnmasking(2)), DataLoader(rows, batch_size=4))
    assert bar.total == 7
    assert bar.seen == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7]
    assert "7/7" in capsys.readouterr().out

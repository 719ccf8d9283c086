"""Settings for all tests: one thread, so that sums have one order, and no advice about loaders."""

import torch

torch.set_num_threads(1)


def pytest_configure(config) -> None:
    """What Lightning advises for real runs says nothing about these."""
    for message in (
        ".*does not have many workers.*",
        ".*The number of training batches.*",
        ".*isinstance.treespec.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*was configured so validation will.*",
        ".*val_dataloader.*hook.*",
        ".*sync_dist=True.*",
        ".*enable_checkpointing.*",
    ):
        config.addinivalue_line("filterwarnings", f"ignore:{message}")

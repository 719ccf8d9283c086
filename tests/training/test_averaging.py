"""The average of the weights as part of a step, against PyTorch's own; whole runs are in ``test_captured.py``."""

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from puma_lightning.training.averaging import AverageInStep


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_updates_are_pytorchs_to_the_last_bit(dtype):
    """In any precision: a decay that is rounded to 16 bits would be another one."""
    module: Any = nn.Linear(40, 30).to(dtype)
    callback = EMAWeightAveraging(decay=0.97, use_buffers=False)
    callback._average_model = AveragedModel(module, avg_fn=get_ema_avg_fn(0.97))
    expected = copy.deepcopy(callback._average_model)
    average = AverageInStep(callback, module)
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        for parameter in module.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        average.update()
        average.is_first = False
        expected.update_parameters(module)
        for name, value in expected.state_dict().items():
            assert torch.equal(callback._average_model.state_dict()[name], value), (step, name)

"""A process of one's own."""

import pytest
import torch
from some_chains import MASK, begin, predictions, sequences

from puma_lightning.chain.teacher import ForwardProcess


def test_another_process_defines_start_and_nothing_else():
    """By default there is no chain: K is 1 and every chain is over after one step."""

    class MaskEverything(ForwardProcess):
        def start(self, chains, generator=None):
            return chains

    process = MaskEverything()
    x0, prompt = sequences(0, 3, 5)
    chains = begin(process, x0, prompt, 0)
    assert torch.equal(chains.xt == MASK, ~prompt)
    after = process.advance(chains, predictions(x0, 0), 0)
    assert after.done.all()
    assert torch.equal(after.xt, chains.xt)
    assert process.num_stages_at(5) == 1


def test_a_process_written_for_an_earlier_version_is_told_so():
    """When its class is made: it would fail with an error of Python's in the first step."""
    with pytest.raises(
        ValueError, match=r"Old\.start: expected the arguments chains, generator, .* got x0, prompt_mask"
    ):

        class Old(ForwardProcess):
            def start(self, x0, prompt_mask, stage, num_stages, mask_id, generator=None):
                return x0

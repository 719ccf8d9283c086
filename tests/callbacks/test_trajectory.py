"""Pictures of the unmasking order."""

from types import SimpleNamespace

import matplotlib.image
import pytest
import torch
from lightning.pytorch.plugins.precision import Precision

from puma_lightning import MaskedDiffusion, RandomMasking, TransformerBackbone, UnmaskingTrajectory
from puma_lightning.callbacks.pictures import draw_reveal_order
from puma_lightning.data.base import Picture
from puma_lightning.data.sudoku.layout import picture_of


def watch(callback, tmp_path, step, length=36, first=True):
    torch.manual_seed(0)
    backbone = TransformerBackbone(
        8, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, max_length=length
    )
    module = MaskedDiffusion(backbone, 7, RandomMasking())
    trainer = SimpleNamespace(
        sanity_checking=False, is_global_zero=first, global_step=step, log_dir=str(tmp_path), loggers=[],
        fast_dev_run=False, datamodule=SimpleNamespace(picture=picture_of(6, "in_place")), precision_plugin=Precision(),
    )  # fmt: skip
    batch = {"input_ids": torch.randint(1, 7, (3, length)), "prompt_mask": torch.rand(3, length) < 0.4}
    callback.on_validation_batch_end(trainer, module, None, batch, 0)
    callback.on_validation_batch_end(trainer, module, None, batch, 1)  # another batch changes nothing
    callback.on_validation_epoch_end(trainer, module)
    return batch


def test_the_picture_follows_the_same_sequences_through_training(tmp_path):
    callback = UnmaskingTrajectory(num_examples=2, max_columns=3)
    for step in (10, 20, 30, 40):
        batch = watch(callback, tmp_path, step)
    assert [past["step"] for past in callback.history] == [10, 20, 30, 40]
    for past in callback.history:
        assert torch.equal(past["target"], batch["input_ids"][:2])
        assert torch.equal(past["reveal_step"] == -1, batch["prompt_mask"][:2])
    assert len(callback.draw().axes) == 2 * 3 + 1  # boards and the colour bar
    assert matplotlib.image.imread(callback.path).std() > 0.1


def test_a_resumed_run_goes_on_with_the_picture(tmp_path):
    first, resumed = UnmaskingTrajectory(num_examples=1), UnmaskingTrajectory(num_examples=1)
    for step in (10, 20):
        watch(first, tmp_path, step)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    watch(resumed, tmp_path, 20)  # validated again after the resume: not twice in the picture
    watch(resumed, tmp_path, 30)
    assert [past["step"] for past in resumed.history] == [10, 20, 30]


def test_other_processes_leave_the_picture_alone(tmp_path):
    """After a resume they too have what has been seen before."""
    first, resumed = UnmaskingTrajectory(num_examples=1), UnmaskingTrajectory(num_examples=1)
    watch(first, tmp_path / "first", 10)
    resumed.load_state_dict(first.state_dict())
    watch(resumed, tmp_path / "other", 20, first=False)
    assert first.path.exists()
    assert not (tmp_path / "other").exists()


PICTURES = {
    "a board": (16, picture_of(4, "in_place"), range(16), 6),
    "a board after its puzzle": (72, picture_of(6, "prompt_answer"), range(36, 72), 7),
    "an image after a class": (7, Picture(torch.arange(1, 7).reshape(2, 3)), range(1, 7), 0),
    "a strip": (32, None, range(32), 0),
}


@pytest.mark.parametrize(("length", "picture", "shown", "lines"), PICTURES.values(), ids=PICTURES)
def test_sequences_are_drawn_as_their_data_say_and_otherwise_as_strips(length, picture, shown, lines):
    tokens = torch.arange(length)
    figure = draw_reveal_order([[(tokens, tokens - 1, tokens)]], ["title"], picture)
    axis = figure.axes[0]
    assert [int(text.get_text()) for text in axis.texts] == list(shown)
    assert round(axis.get_ylim()[0]) == (1 if picture is None else len(picture.positions))
    assert len(axis.lines) == lines


def test_wrong_tokens_are_crossed_out():
    tokens, target = torch.ones(16, dtype=torch.long), torch.ones(16, dtype=torch.long)
    target[[3, 5]] = 2
    board_lines = len(draw_reveal_order([[(tokens, torch.arange(16), tokens)]], ["x"]).axes[0].lines)
    assert len(draw_reveal_order([[(tokens, torch.arange(16), target)]], ["x"]).axes[0].lines) == board_lines + 2


def test_numbers_below_one_are_refused():
    for name in ("num_examples", "max_columns"):
        with pytest.raises(ValueError, match=name):
            UnmaskingTrajectory(**{name: 0})

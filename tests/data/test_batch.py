"""The batch that people bring: what other tools say is understood or refused by name, and never dropped in silence."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import default_collate

from puma_lightning.data.batch import _warn_of_key, check_batch, pad_collate, padding_last

V, MASK = 10, 9
IDS = torch.tensor([[5, 3, 8, 1], [2, 7, 4, 6]])
REAL = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
LABELS = torch.tensor([[-100, -100, 8, 1], [-100, 7, 4, -100]])


def check(batch, **options):
    return check_batch(batch, mask_id=MASK, vocab_size=V, **options)


def test_labels_are_a_prompt_mask():
    checked = check({"input_ids": IDS, "labels": LABELS})
    assert torch.equal(checked["prompt_mask"], LABELS == -100) and "attention_mask" not in checked
    both = check({"input_ids": IDS, "labels": LABELS, "prompt_mask": LABELS == -100})
    assert torch.equal(both["prompt_mask"], checked["prompt_mask"])


def test_a_shifted_model_does_not_learn_the_first_label():
    """As in Hugging Face's models, where labels are input_ids from the first position on."""
    checked = check({"input_ids": IDS, "labels": IDS, "attention_mask": REAL}, first_given=True)
    assert checked["prompt_mask"].tolist() == [[True, True, False, False], [True, False, False, True]]


def test_padding_is_not_to_be_predicted_and_holds_one_token():
    checked = check({"input_ids": IDS, "attention_mask": REAL})
    assert checked["input_ids"].tolist() == [[0, 3, 8, 1], [2, 7, 4, 0]]
    assert torch.equal(checked["prompt_mask"], REAL == 0) and torch.equal(checked["attention_mask"], REAL == 1)
    assert check_batch({"input_ids": IDS, "attention_mask": REAL}, mask_id=0, vocab_size=V)["input_ids"][1, 3] == 1


@pytest.mark.parametrize("token", [-100, -1, MASK, V, 7])
def test_what_padding_holds_does_not_matter(token):
    odd = {"input_ids": IDS.masked_fill(REAL == 0, token), "attention_mask": REAL.float()}
    for name, value in check(odd).items():
        assert torch.equal(value, check({"input_ids": IDS, "attention_mask": REAL})[name])


def test_a_batch_without_padding_has_no_attention_mask():
    assert "attention_mask" not in check({"input_ids": IDS, "attention_mask": torch.ones_like(IDS)})


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6).filter(any), min_size=1, max_size=4))
def test_padding_comes_last_wherever_it_was(real):
    real = torch.tensor(real)
    ids = torch.arange(6).expand(len(real), -1) + 1
    batch = padding_last(check({"input_ids": ids, "attention_mask": real}))
    kept = batch.get("attention_mask", torch.ones_like(batch["input_ids"]).bool())
    assert [row[mask].tolist() for row, mask in zip(batch["input_ids"], kept, strict=True)] == [
        row[mask].tolist() for row, mask in zip(ids, real, strict=True)
    ]
    assert kept.shape[1] == real.sum(1).max() and not (kept[:, 1:] & ~kept[:, :-1]).any()


@pytest.mark.parametrize(
    "extra",
    [
        {"position_ids": torch.arange(4)},
        {"position_ids": torch.arange(4).expand(2, 4)},
        {"token_type_ids": torch.zeros(2, 4)},
        {"loss_mask": torch.ones(2, 4)},
        {"special_tokens_mask": torch.zeros(2, 4)},
        {"labels": None, "position_ids": None},
        {"attention_mask": REAL, "position_ids": torch.tensor([[1, 0, 1, 2], [0, 1, 2, 2]])},
        {"attention_mask": REAL, "loss_mask": REAL},
    ],
)
def test_what_says_nothing_new_may_be_there(extra):
    assert set(check({"input_ids": IDS, **extra})) <= {"input_ids", "prompt_mask", "attention_mask"}


@pytest.mark.parametrize(
    "extra, words",
    [
        ({"position_ids": torch.tensor([0, 1, 0, 1])}, "position_ids: "),
        ({"token_type_ids": torch.tensor([[0, 0, 1, 1]] * 2)}, "token_type_ids: "),
        ({"loss_mask": torch.tensor([[0, 0, 1, 1]] * 2)}, "loss_mask: "),
        ({"special_tokens_mask": torch.tensor([[1, 0, 0, 1]] * 2)}, "special_tokens_mask: "),
        ({"inputs_embeds": torch.zeros(2, 4, 3)}, "inputs_embeds: "),
        ({"cu_seqlens": torch.tensor([0, 4, 8])}, "cu_seqlens: "),
        ({"labels": IDS.roll(1, 1)}, "labels: expected -100 .* got 1 for 5 at row 0, position 0 .* not shifted"),
        ({"labels": LABELS, "prompt_mask": torch.zeros(2, 4).bool()}, "labels: expected -100 where prompt_mask"),
        ({"labels": LABELS[:, :2]}, "labels: expected the shape"),
        ({"attention_mask": torch.ones(2, 1, 4, 4)}, "attention_mask: expected 0 where a position is padding"),
        ({"attention_mask": torch.tensor([[0.0, -1e9, 0, 0]] * 2)}, "attention_mask: expected 0"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])}, "every sequence, got none in row 1"),
        ({"attention_mask": REAL, "prompt_mask": REAL == 1}, "at least one position that is left to predict"),
    ],
)  # fmt: skip
def test_what_would_change_what_is_learned_is_refused_by_name(extra, words):
    with pytest.raises(ValueError, match=words):
        check({"input_ids": IDS, **extra})


def test_a_key_of_ones_own_is_warned_of_once():
    _warn_of_key.cache_clear()
    with pytest.warns(UserWarning, match="difficulty: this key"):
        check({"input_ids": IDS, "difficulty": torch.zeros(2), "answer": ["1", "2"]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check({"input_ids": IDS, "difficulty": torch.zeros(2), "answer": ["1", "2"]})


def test_the_first_position_that_is_there_must_be_given_to_a_shifted_model():
    prompt = torch.tensor([[False, True, False, False], [True, False, False, False]])
    check({"input_ids": IDS, "attention_mask": REAL, "prompt_mask": prompt}, first_given=True)
    with pytest.raises(ValueError, match="position 0 to be given"):
        check({"input_ids": IDS, "attention_mask": REAL, "prompt_mask": prompt.roll(-1, 1)}, first_given=True)


@pytest.mark.parametrize("kind", [torch.float32, torch.complex64, torch.bool])
def test_tokens_are_integers(kind):
    """Half of a complex number would be lost without a word."""
    with pytest.raises(ValueError, match=r"input_ids: expected integers \(B, L\), got \(2, 4\) torch"):
        check({"input_ids": IDS.to(kind)})


def test_lists_that_torch_has_collated_by_position_are_told_what_to_do():
    """As of a datasets.Dataset without a format."""
    with pytest.raises(ValueError, match=r"input_ids: expected a tensor.*got a list.*with_format.*pad_collate"):
        check(default_collate([{"input_ids": row.tolist()} for row in IDS]))


@pytest.mark.parametrize("kind", [list, torch.tensor, lambda ids: torch.tensor(ids).numpy()])
def test_sequences_of_different_lengths_are_collated(kind):
    batch = pad_collate(
        [
            {"input_ids": kind([1, 2, 3]), "labels": kind([-100, 2, 3]), "answer": "one", "number": 1},
            {"input_ids": kind([4]), "labels": kind([4]), "answer": "two", "number": 2},
        ]
    )
    assert batch["answer"] == ["one", "two"] and batch["number"].tolist() == [1, 2]
    del batch["number"]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]
    checked = check(batch)
    assert checked["attention_mask"].tolist() == [[True] * 3, [True, False, False]]
    assert checked["prompt_mask"].tolist() == [[True, False, False], [False, True, True]]
    assert "attention_mask" not in pad_collate([{"input_ids": kind([1, 2])}] * 2)

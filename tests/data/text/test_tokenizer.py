from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from puma_lightning import hub
from puma_lightning.data.text.tokenizer import (
    TextTokenizer,
    cached_tokenizer,
    check_trained,
    load_tokenizer,
    prepare_tokenizer,
    train_tokenizer,
)

GPT2 = Path(__file__).parents[3] / ".." / "shared" / "tokenizers" / "gpt2"
EOS, MASK = "<|endoftext|>", "<|mask|>"
TEXTS = ["the cat sat on the mat 123", "def f(x):\n    return x + 12345", "the dog and the cat"] * 20


def trained(vocab_size: int = 280, mask: str = MASK) -> TextTokenizer:
    return prepare_tokenizer(train_tokenizer([TEXTS], vocab_size, None, mask), None, mask)


def words(*special: str) -> Tokenizer:
    """Whole words, some special tokens after them."""
    tokenizer = Tokenizer(models.WordLevel({"the": 0, "cat": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    return tokenizer


TRAINED = trained()


@settings(deadline=None)
@given(st.text())
def test_trained_tokenizer_gives_every_text_back_and_no_special_token(text: str) -> None:
    (ids,) = TRAINED.encode([text])
    assert TRAINED.decode(ids) == text
    assert not {TRAINED.eos_id, TRAINED.mask_id} & set(ids)


@pytest.mark.parametrize("text", [MASK, f"a {MASK} b", EOS, f"{EOS}{MASK}", MASK[:-1]])
def test_names_of_special_tokens_in_a_text_are_ordinary(text: str) -> None:
    test_trained_tokenizer_gives_every_text_back_and_no_special_token.hypothesis.inner_test(text)
    with_words = prepare_tokenizer(words(EOS, MASK), None, MASK)
    assert not {with_words.eos_id, with_words.mask_id} & set(with_words.encode([text])[0])


@given(st.integers(0, 10**12))
def test_digits_are_single_tokens(number: int) -> None:
    assert len(TRAINED.encode([str(number)])[0]) == len(str(number))


def test_trained_ids() -> None:
    assert (TRAINED.eos_id, TRAINED.mask_id) == (0, 1)
    assert TRAINED.vocab_size == TRAINED.tokenizer.get_vocab_size() == 280
    assert trained(4096).vocab_size < 4096  # the texts give no more
    assert len(trained(258).encode(["the"])[0]) == 3 > len(TRAINED.encode(["the"])[0])


def test_training_is_deterministic() -> None:
    assert {trained().fingerprint for _ in range(5)} == {TRAINED.fingerprint}


def test_fingerprint_changes_with_every_id() -> None:
    others = [trained(281), trained(mask="<other>"), prepare_tokenizer(words(), None, MASK)]
    other = train_tokenizer([TEXTS], 280, None, MASK)
    others.append(prepare_tokenizer(other, "<eos>", MASK))
    assert len({TRAINED.fingerprint, *(each.fingerprint for each in others)}) == 5
    saved = Tokenizer.from_str(TRAINED.tokenizer.to_str())
    saved.enable_truncation(3)
    saved.enable_padding(length=7)
    again = prepare_tokenizer(saved, None, MASK)
    assert again.fingerprint == TRAINED.fingerprint
    assert again.encode(TEXTS) == TRAINED.encode(TEXTS)


def test_mask_and_eos_are_found_or_added(capsys: pytest.CaptureFixture[str]) -> None:
    both = prepare_tokenizer(words("[PAD]", "</s>", MASK), None, MASK)
    assert (both.eos_id, both.mask_id, both.vocab_size) == (4, 5, 6)
    none = prepare_tokenizer(words(), None, MASK)
    assert (none.eos_id, none.mask_id, none.vocab_size) == (3, 4, 5)
    named = prepare_tokenizer(words("</s>", "<end>"), "<end>", MASK)
    assert (named.eos_id, named.mask_id) == (4, 5)


def test_adding_a_token_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("puma_lightning.data.text.tokenizer.rank_zero_info", said.append)
    prepare_tokenizer(words("</s>"), None, MASK)
    assert said == [f"The tokenizer has no {MASK}; adding it as a mask token."]
    said.clear()
    prepare_tokenizer(words(EOS, MASK), None, MASK)
    assert not said


def test_special_tokens_that_nothing_uses_do_not_count() -> None:
    """As in the paper, where Qwen2's <|im_start|> is the mask and <|im_end|> is never seen."""
    qwen = prepare_tokenizer(words(EOS, "<|im_start|>", "<|im_end|>"), None, "<|im_start|>")
    assert (qwen.eos_id, qwen.mask_id, qwen.vocab_size) == (3, 4, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prepare_tokenizer(words(), "the", "the"), "mask_token: expected another token than EOS"),
        (lambda: prepare_tokenizer(words(), None, "cat"), "mask_token: expected a token that no text contains"),
        (lambda: check_trained(257, None, MASK), "vocab_size: expected at least 258"),
        (lambda: check_trained(300, MASK, MASK), "mask_token: expected another token than EOS"),
        (lambda: load_tokenizer("nowhere/tokenizer.json"), "tokenizer: expected a tokenizer.json or a folder"),
        (lambda: load_tokenizer("./nowhere"), "tokenizer: expected a tokenizer.json or a folder"),
        (lambda: load_tokenizer(__file__), "tokenizer: expected a tokenizer.json of the tokenizers library"),
        (lambda: load_tokenizer(str(Path(__file__).parent)), "tokenizer: expected tokenizer.json, or vocab.json"),
    ],
)
def test_bad_tokenizers(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_files_and_folders(tmp_path: Path) -> None:
    saved = tmp_path / "tokenizer.json"
    TRAINED.tokenizer.save(str(saved))
    for name in (saved, tmp_path):
        assert prepare_tokenizer(load_tokenizer(str(name)), None, MASK).fingerprint == TRAINED.fingerprint
    pair = tmp_path / "pair"
    pair.mkdir()
    TRAINED.tokenizer.model.save(str(pair))
    loaded = prepare_tokenizer(load_tokenizer(str(pair)), None, MASK)
    assert (loaded.eos_id, loaded.mask_id, loaded.vocab_size) == (0, 1, 280)
    assert loaded.encode(["the cat sat"]) == TRAINED.encode(["the cat sat"])
    (pair / "merges.txt").write_text("a b c d\n")
    with pytest.raises(ValueError, match="vocabulary of a byte-level BPE"):
        load_tokenizer(str(pair))


def test_cached(tmp_path: Path) -> None:
    calls: list[int] = []

    def get(recipe: int = 0, vocab_size: int = 280) -> TextTokenizer:
        texts = lambda: calls.append(1) or [TEXTS]  # type: ignore[func-returns-value]  # noqa: E731
        return cached_tokenizer(tmp_path, {"rows": recipe}, texts, vocab_size, None, MASK)

    assert get().fingerprint == get().fingerprint == TRAINED.fingerprint and len(calls) == 1
    get(1)
    get(0, 270)
    assert len(calls) == 3
    for folder in tmp_path.iterdir():
        file = folder / "tokenizer.json"
        file.write_text(file.read_text().replace('"the"', '"teh"'))  # would pass for another tokenizer
    with pytest.warns(UserWarning, match=r"tokenizer-.*: damaged cache .*tokenizer.json.*; building it again"):
        assert get().fingerprint == TRAINED.fingerprint
    assert len(calls) == 4


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TRAINED.tokenizer.save(str(tmp_path / "downloaded"))
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(hub, "_hub_answers", lambda: True)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a: asked.append(a) or tmp_path / "downloaded")
    assert prepare_tokenizer(load_tokenizer("some/model"), None, MASK).fingerprint == TRAINED.fingerprint
    assert asked == [("some/model", "tokenizer.json")]


def test_hub_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_hub_answers", lambda: False)
    with pytest.raises(ValueError, match=r"tokenizer: found no file 'a/b', and the .* can't be reached.*vocab.json"):
        load_tokenizer("a/b")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE is set"):
        load_tokenizer("a/b")


@pytest.mark.skipif(not GPT2.is_dir(), reason="needs ../shared/tokenizers")
class TestGPT2:
    """GPT-2's own files."""

    @pytest.fixture(scope="class")
    @classmethod
    def gpt2(cls) -> TextTokenizer:
        return prepare_tokenizer(load_tokenizer(str(GPT2)), None, MASK)

    def test_ids(self, gpt2: TextTokenizer) -> None:
        assert (gpt2.eos_id, gpt2.mask_id, gpt2.vocab_size) == (50256, 50257, 50258)
        # As published with GPT-2 and in the documentation of its tokenizers.
        assert gpt2.encode(["Hello world", " Hello world", "Hello, my dog is cute"]) == [
            [15496, 995],
            [18435, 995],
            [15496, 11, 616, 3290, 318, 13779],
        ]
        assert gpt2.encode([EOS])[0] != [50256] and gpt2.decode(gpt2.encode([EOS])[0]) == EOS

    @settings(deadline=None)
    @given(text=st.text())
    def test_roundtrip(self, gpt2: TextTokenizer, text: str) -> None:
        assert gpt2.decode(gpt2.encode([text])[0]) == text

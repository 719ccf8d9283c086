"""Tokenizers: from the hub, from files, or a byte-level BPE trained on the spot, with an EOS and a mask token."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.fabric.utilities import rank_zero_info
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from puma_lightning.data.base import check_name, in_range
from puma_lightning.data.cache import from_cache
from puma_lightning.hub import from_hub

# Otherwise tokenizers warns whenever a DataLoader forks workers; they tokenise nothing.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "[SEP]")
LARGEST_VOCABULARY = 2**22
TRAINED_EOS_ID, TRAINED_MASK_ID = 0, 1
_ALPHABET = 256
# Raise it when the same recipe gives another tokenizer than before.
_VERSION = 2


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer that never turns text into special tokens, and knows its EOS and mask.

    Args:
        tokenizer: The tokenizer; special tokens in a text are encoded as the characters they are made of.
        eos_id: The token after a text.
        mask_id: The mask token.
        fingerprint: A hash of all that determines token ids.
    """

    tokenizer: Tokenizer
    eos_id: int
    mask_id: int
    fingerprint: str

    @property
    def vocab_size(self) -> int:
        """V: one more than the greatest id that a text, EOS or the mask can have."""
        special = {i for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        ordinary = (i for i in self.tokenizer.get_vocab().values() if i not in special)
        return 1 + max(self.eos_id, self.mask_id, *ordinary)

    def encode(self, texts: Sequence[object]) -> list[list[int]]:
        """Return the token ids of each text, without special tokens, on all cores. None counts as an empty text."""
        return _encode(self.tokenizer, as_texts(texts))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))


def as_texts(values: Sequence[object]) -> list[str]:
    """Return what is to be tokenised: texts as they are, numbers in digits, None as an empty text.

    Raises:
        ValueError: If there is something else.
    """
    for number, value in enumerate(values):
        if isinstance(value, bool) or not (value is None or isinstance(value, str | int | float)):
            raise ValueError(
                f"tokenize: expected texts, got {value!r:.80} ({type(value).__name__}) as number {number + 1} of "
                f"{len(values)}; turn it into a text in encode"
            )
    return ["" if value is None else str(value) for value in values]


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    try:
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    except Exception as error:  # tokenizers raises nothing more specific
        raise ValueError(
            f"tokenizer: expected one that can encode any text, got: {error}; give it a token for what it does not "
            "know, or name another one"
        ) from None


def load_tokenizer(name: str) -> Tokenizer:
    """Load a tokenizer.

    Args:
        name: A ``tokenizer.json``; a folder with one, or with ``vocab.json`` and ``merges.txt`` (GPT-2's byte-level
            BPE); or a name on the Hugging Face hub.

    Raises:
        ValueError: If there is none, or the file is something else.
    """
    name = check_name("tokenizer", os.fspath(name) if isinstance(name, os.PathLike) else name)
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        if (path / "tokenizer.json").is_file():
            path = path / "tokenizer.json"
        elif (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
            return _gpt2(path)
        else:
            raise ValueError(
                f"tokenizer: expected tokenizer.json, or vocab.json and merges.txt, in {path}, got neither; name "
                "another folder"
            )
    elif not path.is_file():
        if path.suffix == ".json" or path.is_absolute() or name.startswith((".", "~")):
            raise ValueError(f"tokenizer: expected a tokenizer.json or a folder, got none at {path}; check the path")
        path = Path(_download(name))
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more specific
        raise ValueError(
            f"tokenizer: expected a tokenizer.json of the tokenizers library at {path}, got: {error}; name another file"
        ) from None


def _download(name: str) -> str:
    from huggingface_hub import hf_hub_download

    with from_hub("tokenizer", name, "a tokenizer.json, or a folder with vocab.json and merges.txt"):
        return str(hf_hub_download(name, "tokenizer.json"))


def _gpt2(folder: Path) -> Tokenizer:
    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:
        raise ValueError(
            f"tokenizer: expected the vocabulary of a byte-level BPE in {folder}, got: {error}; name another one"
        ) from None
    return _byte_level(model)


def _byte_level(model: models.BPE, *before: pre_tokenizers.PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(model)
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, split]) if before else split
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_tokenizer(texts: Iterable[list[str]], vocab_size: int, eos_token: str | None, mask_token: str) -> Tokenizer:
    """Train a byte-level BPE whose digits stand alone; EOS has id 0 and the mask token 1.

    Args:
        texts: What to learn from, some at a time.
        vocab_size: Tokens, with EOS and mask; texts too small for it give fewer.
        eos_token: Name of EOS; null for ``<|endoftext|>``.
        mask_token: Name of the mask token.

    Raises:
        ValueError: If the vocabulary can't hold all bytes, or the special tokens have one name.
    """
    eos_token = check_trained(vocab_size, eos_token, mask_token)
    tokenizer = _byte_level(models.BPE(), pre_tokenizers.Digits(individual_digits=True))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=[eos_token, mask_token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def cached_tokenizer(
    folder: Path,
    recipe: Mapping[str, object],
    texts: Callable[[], Iterable[list[str]]],
    vocab_size: int,
    eos_token: str | None,
    mask_token: str,
) -> TextTokenizer:
    """Return the tokenizer trained from the texts, from disk if it was trained before.

    Args:
        folder: Where the cache is; made if absent.
        recipe: All that the texts depend on, in JSON's types.
        texts: Returns what to learn from; called if there is no file yet, or a damaged one.
        vocab_size: See ``train_tokenizer``.
        eos_token: See ``train_tokenizer``.
        mask_token: See ``train_tokenizer``.
    """
    names = check_trained(vocab_size, eos_token, mask_token), mask_token
    recipe = {"version": _VERSION, "vocab_size": vocab_size, "special": names, **recipe}

    def write(path: Path) -> dict[str, Any]:
        train_tokenizer(texts(), vocab_size, *names).save(str(path / "tokenizer.json"))
        return {}

    return from_cache(
        folder, "tokenizer", recipe, write, lambda path, _: prepare_tokenizer(load_tokenizer(str(path)), *names)
    )


def check_trained(vocab_size: int, eos_token: str | None, mask_token: str) -> str:
    """Check the settings of a tokenizer that is still to be trained, and return the name of its EOS.

    Raises:
        ValueError: If the vocabulary can't hold all bytes or is too large, or the special tokens have one name or none.
    """
    eos_token = EOS_NAMES[0] if eos_token is None else eos_token
    check_name("mask_token", mask_token)
    check_name("eos_token", eos_token)
    if in_range("vocab_size", vocab_size, 0, LARGEST_VOCABULARY) < _ALPHABET + 2:
        raise ValueError(
            f"vocab_size: expected at least {_ALPHABET + 2} (all bytes, EOS and mask), got {vocab_size}; raise it"
        )
    if eos_token == mask_token:
        raise ValueError(f"mask_token: expected another token than EOS, got {mask_token!r} for both; name another one")
    return eos_token


def prepare_tokenizer(tokenizer: Tokenizer, eos_token: str | None, mask_token: str) -> TextTokenizer:
    """Find EOS and mask, add what is missing (and say so), and make special tokens in texts ordinary.

    Args:
        tokenizer: Any tokenizer; changed in place.
        eos_token: Name of EOS; null to look for the usual names.
        mask_token: Name of the mask token.

    Raises:
        ValueError: If EOS and mask are one token, a text can contain the mask, or ids are too large.
    """
    check_name("mask_token", mask_token)
    if eos_token is not None:
        check_name("eos_token", eos_token)
    in_range("tokenizer (its greatest id)", max(tokenizer.get_vocab().values(), default=0), 0, LARGEST_VOCABULARY)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    known = (name for name in EOS_NAMES if tokenizer.token_to_id(name) is not None)
    eos_token = next(known, EOS_NAMES[0]) if eos_token is None else eos_token
    if eos_token == mask_token:
        raise ValueError(f"mask_token: expected another token than EOS, got {mask_token!r} for both; name another one")
    for role, name in (("an EOS", eos_token), ("a mask", mask_token)):
        if tokenizer.token_to_id(name) is None:
            rank_zero_info(f"The tokenizer has no {name}; adding it as {role} token.")
        # Even if it is there: only special tokens are kept out of ordinary text.
        tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False)])
    tokenizer.encode_special_tokens = True
    eos_id, mask_id = tokenizer.token_to_id(eos_token), tokenizer.token_to_id(mask_token)
    assert eos_id is not None and mask_id is not None
    if mask_id in _encode(tokenizer, [mask_token])[0]:
        raise ValueError(
            f"mask_token: expected a token that no text contains, got {mask_token!r}, an ordinary one of this "
            "tokenizer; name one that it does not have"
        )
    content = json.loads(tokenizer.to_str())
    parts = {name: content[name] for name in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    text = json.dumps([parts, eos_id, mask_id], sort_keys=True)
    return TextTokenizer(tokenizer, eos_id, mask_id, hashlib.sha256(text.encode()).hexdigest()[:20])

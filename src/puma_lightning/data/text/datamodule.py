"""Any text as a DataModule: packed documents, or one example per sequence."""

import copy
import hashlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from types import CodeType
from typing import TYPE_CHECKING, Any, Literal, get_args

import lightning.pytorch as pl
import numpy as np
from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from puma_lightning.data.base import (
    at_least,
    check_name,
    check_seed,
    check_workers,
    in_range,
    make_loader,
    warn_of_training_data,
)
from puma_lightning.data.cache import DEFAULT_CACHE, cache_folder
from puma_lightning.data.text.layout import Example, Padding
from puma_lightning.data.text.rows import Rows, Selection, texts_of
from puma_lightning.data.text.sources import find_source
from puma_lightning.data.text.streaming import TextStream, digest
from puma_lightning.data.text.token_cache import TokenDataset, TokenWriter, cached, collate
from puma_lightning.data.text.tokenise import Format, describe, write_examples, write_prompts
from puma_lightning.data.text.tokenizer import (
    TRAINED_EOS_ID,
    TRAINED_MASK_ID,
    TextTokenizer,
    as_texts,
    cached_tokenizer,
    check_trained,
    load_tokenizer,
    prepare_tokenizer,
)

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

TextUnit = Literal["line", "paragraph", "document"]
Tokenize = Callable[[Sequence[object]], list[list[int]]]
_LONGEST = 2**20  # tokens; some thousand sequences are in memory while they are made
_VOCAB_SIZE = 4096  # of a tokenizer that is trained
_TRAINED_ON_ROWS = 50_000
_TRAINED_ON_CHARACTERS = 50_000_000
_HELD_OUT_ROWS = 1_000  # of a stream
_SPLITS = {"train": "train", "val": "validation", "test": "test", "predict": "test"}


class TextDataModule(pl.LightningDataModule):
    """Text from files or from the Hugging Face hub, as sequences of L tokens.

    Every ``*_file`` is a file, a glob (``data/*.jsonl``) or a list of these (.json, .jsonl, .csv, .tsv, .parquet, .txt;
    also compressed as .gz), or ``NAME[:CONFIG[:SPLIT]]`` on the hub (``Salesforce/wikitext:wikitext-2-raw-v1``).
    Tokenised text is kept in ``cache_dir``; a data set on the hub is taken to stay as it is.

    For data of your own, override ``encode``; for rows from elsewhere, ``load``. What these depend on is part of
    the cache's name: their code, and arguments of your own that are kept in attributes of the same name.

    Args:
        train_file: Training text.
        val_file: Validation text; null to hold out a part of the training rows.
        test_file: Test text.
        predict_file: Beginnings to be continued.
        text_column: The column with the text; files ending in .txt have ``text``.
        text_unit: What is one row of a .txt file: a line, a paragraph (up to an empty line) or the whole file.
        tokenizer: A ``tokenizer.json``, a folder with one or with ``vocab.json`` and ``merges.txt``, or a name on the
            hub. Null: a byte-level BPE is trained from the training rows.
        vocab_size: Size of a tokenizer that is trained, with EOS (id 0) and mask (id 1); null for 4,096. Any other
            tokenizer has its own size, which the attribute of this name tells.
        eos_token: Name of the token at the end of a text; null for the tokenizer's own (one of the usual names), or a
            new one.
        mask_token: Name of the mask token; added to the tokenizer if it has none of this name.
        sequence_length: L, in tokens.
        packing: True: rows follow each other, with EOS between them, and are cut into sequences of L - 1 tokens after
            an EOS that is given. False: each row is a sequence of its own, cut to L if longer.
        padding: What is trained on after the text, without packing. ``eos``: all remaining positions, which are EOS.
            ``first_eos``: the first EOS; the others are given. ``none``: nothing, not even EOS: what follows is
            padding, of which an ``attention_mask`` tells, and no model learns to end. With either, a model that fills
            in any order knows in training how long the text is, does not learn to end it, and fills all the room there
            is when it generates: take ``eos`` for one.
        num_train: Train on this many rows at most; null for all.
        num_val: Number of rows held out (null: a tenth, 1,000 at most), or read this many of ``val_file`` at most
            (null: all).
        num_test: Read this many test rows at most; null for all.
        streaming: Read and tokenise the training rows while the model trains on them, instead of before. Nothing of
            them is kept on disk, and they may be more than fit on it. Without ``val_file`` the first ``num_val`` rows
            (null: 1,000) are held out, and rows with the same contents left out of the training rows. A tokenizer is
            trained on the first rows. See ``TextStream`` for what is shuffled and what a resumed run goes on with.
        num_sequences: With ``streaming``, the number of sequences that count as an epoch. Null: the Trainer's
            ``limit_train_batches`` or ``max_steps`` say when an epoch ends.
        shuffle_buffer: With ``streaming``, rows that are read at once and whose sequences are shuffled; 1 to keep
            the order.
        batch_size: Sequences in a training batch of one device.
        eval_batch_size: Sequences in a validation, test or prediction batch; null for ``batch_size``.
        num_workers: Processes that load batches; loading is fast enough for 0.
        seed: Chooses the rows that are held out.
        cache_dir: Where tokenised text is kept. The default follows ``$XDG_CACHE_HOME`` if set.

    Attributes:
        eos_id: EOS, which is also the padding.
        mask_id: The mask token; no text contains it.
        val_names: What the validation loaders hold, by position.
        test_names: What the test loaders hold, by position.

    Raises:
        ValueError: If an argument is out of range, or a file or the tokenizer can't be used.
    """

    def __init__(
        self,
        train_file: str | list[str] | None = None,
        val_file: str | list[str] | None = None,
        test_file: str | list[str] | None = None,
        predict_file: str | list[str] | None = None,
        text_column: str = "text",
        text_unit: TextUnit = "line",
        tokenizer: str | None = None,
        vocab_size: int | None = None,
        eos_token: str | None = None,
        mask_token: str = "<|mask|>",
        sequence_length: int = 512,
        packing: bool = True,
        padding: Padding = "first_eos",
        num_train: int | None = None,
        num_val: int | None = None,
        num_test: int | None = None,
        streaming: bool = False,
        num_sequences: int | None = None,
        shuffle_buffer: int = 10_000,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: str = DEFAULT_CACHE,
    ) -> None:
        super().__init__()
        for argument, value, choices in (("padding", padding, Padding), ("text_unit", text_unit, TextUnit)):
            if value not in get_args(choices):
                expected = ", ".join(get_args(choices))
                raise ValueError(f"{argument}: expected one of {expected}, got {value!r}; choose one of these")
        for argument, flag in (("packing", packing), ("streaming", streaming)):
            if not isinstance(flag, bool):
                raise ValueError(f"{argument}: expected true or false, got {flag!r}; choose one of these")
        self.text_column = check_name("text_column", text_column)
        self.text_unit = text_unit
        self.sequence_length = in_range("sequence_length", sequence_length, 2, _LONGEST)
        self.packing = packing
        self.padding: Padding = padding
        self.min_answer_length = 1
        self.batch_size = at_least("batch_size", batch_size, 1)
        self.eval_batch_size = at_least(
            "eval_batch_size", batch_size if eval_batch_size is None else eval_batch_size, 1
        )
        self.num_workers = check_workers(num_workers)
        self.seed = check_seed(seed)
        self.limits = {"train": num_train, "val": num_val, "test": num_test}
        for name, limit in self.limits.items():
            if limit is not None:
                at_least(f"num_{name}", limit, 1)
        self.streaming = streaming
        self.num_sequences = num_sequences
        self.shuffle_buffer = at_least("shuffle_buffer", shuffle_buffer, 1)
        if num_sequences is not None:
            at_least("num_sequences", num_sequences, 1)
            if not streaming:
                raise ValueError(
                    f"num_sequences: expected null without streaming, where the rows say how many there are, got "
                    f"{num_sequences}; leave it out, or set streaming to true"
                )
        if streaming and num_train is not None:
            raise ValueError(
                f"num_train: expected null with streaming, as rows that come are not counted, got {num_train}; leave "
                "it out, and say with max_steps how long to train"
            )
        files = {"train": train_file, "val": val_file, "test": test_file, "predict": predict_file}
        self.sources = {
            name: find_source(f"{name}_file", given, _SPLITS[name])
            for name, given in files.items()
            if given is not None
        }
        self.held_out = val_file is None
        self._warn_of_training_data("val", "test")
        self.val_names = ["val"]
        self.test_names = ["test"]
        self.cache_dir = cache_folder(cache_dir)
        self.eos_token = eos_token
        self.mask_token = mask_token
        self._tokenizer: TextTokenizer | None = None
        if tokenizer is None:
            self.vocab_size = _VOCAB_SIZE if vocab_size is None else vocab_size
            check_trained(self.vocab_size, eos_token, mask_token)
            self.eos_id, self.mask_id = TRAINED_EOS_ID, TRAINED_MASK_ID
        else:
            self._tokenizer = prepare_tokenizer(load_tokenizer(tokenizer), eos_token, mask_token)
            self.vocab_size = self._tokenizer.vocab_size
            if vocab_size not in (None, self.vocab_size):
                rank_zero_warn(
                    f"vocab_size: {vocab_size} is not used, as the tokenizer {tokenizer} has {self.vocab_size} tokens "
                    "of its own; leave one of the two out"
                )
            self.eos_id, self.mask_id = self._tokenizer.eos_id, self._tokenizer.mask_id
        self._sets: dict[str, TokenDataset | TextStream] = {}
        self._loaded: dict[str, Dataset] = {}
        self._head: list[dict[str, Any]] | None = None

    # To be overridden.

    def load(self, name: str) -> "Dataset":
        """Return the rows of a set. Override this method for rows from elsewhere; without files, ``identity`` too.

        Args:
            name: ``train``, ``val`` (unless held out), ``test`` or ``predict``.
        """
        if name not in self.sources:
            raise ValueError(f"{name}_file: expected a file or a data set on the hub, got none; give one")
        return self.sources[name].load(self.cache_dir, self.text_unit)

    def stream(self, name: str) -> "IterableDataset":
        """Return the rows of a set as they come, with ``streaming``. Override this method for rows from elsewhere.

        Args:
            name: ``train``; from the hub also ``val`` and ``test``.
        """
        if name not in self.sources:
            raise ValueError(f"{name}_file: expected a file or a data set on the hub, got none; give one")
        return self.sources[name].stream(self.text_unit)

    def identity(self, name: str) -> dict[str, Any]:
        """Return what tells the rows of a set from any others, in JSON's types.

        It is part of the cache's name. Override it where that is known without loading the rows.
        """
        if name in self.sources:
            streamed = self.streaming and name == "train"
            return {**self.sources[name].identity(self.cache_dir, streamed), "text_unit": self.text_unit}
        return {"fingerprint": self._loaded_rows(name)._fingerprint}

    def encode(self, rows: dict[str, list[Any]], tokenize: Tokenize) -> Sequence[Example]:
        """Turn rows into examples. Override this method for columns and formats of your own.

        Args:
            rows: Some rows, by column.
            tokenize: Turns texts into lists of token ids, without special tokens, on all cores.

        Returns:
            For each row its token ids and how many of them, from the start, are the prompt; None to skip the row. EOS
            is put after the ids, and before an example without a prompt.
        """
        return [(ids, 0) for ids in tokenize(texts_of(rows, self.text_column))]

    def encode_prompt(self, rows: dict[str, list[Any]], tokenize: Tokenize) -> Sequence[list[int] | None]:
        """Return the token ids of each prompt, for rows of which only the prompt is known (``predict``)."""
        return [[self.eos_id, *ids] for ids in tokenize(texts_of(rows, self.text_column))]

    def answers(self, rows: Rows, name: str) -> list[str] | None:
        """Return the gold answers of some rows of a set, which its batches then carry as ``answer``; None without."""
        return None

    def has(self, name: str) -> bool:
        """Tell whether there is such a set for test or prediction."""
        return name in self.sources

    def prompts_only(self, name: str) -> bool:
        """Tell whether only the prompts of a set are known, so that everything after them is masked."""
        return name == "predict"

    # What Lightning calls.

    def prepare_data(self) -> None:
        """Train the tokenizer if need be and tokenise what the stage needs; called in one process only."""
        stage = self.trainer.state.fn if self.trainer else None
        for name in self._needed(stage.value if stage else None):
            dataset = self._open(name)
            if isinstance(dataset, TokenDataset):
                self._report(name, dataset)
        self._loaded.clear()

    def setup(self, stage: str | None = None) -> None:
        """Open the tokenised text of a stage.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``; None for all there are.
        """
        for name in self._needed(stage):
            self._sets[name] = self._open(name)
        self._loaded.clear()

    def train_dataloader(self) -> DataLoader[Any]:
        """Return shuffled training batches."""
        shuffle = not self.streaming  # a stream shuffles itself
        return make_loader(self._sets["train"], self.batch_size, shuffle, self.num_workers, collate)

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Return one loader, or one for each of ``val_names``."""
        return self._eval_loaders(self.val_names)

    def test_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Return one loader, or one for each of ``test_names``."""
        return self._eval_loaders(self.test_names)

    def predict_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Return the prompts of ``predict_file``; everything after them is masked."""
        return self._eval_loaders(["predict"])

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. One that is still to be trained is trained on the first use, usually in ``prepare_data``."""
        return self._text_tokenizer.tokenizer

    @property
    def tokenizer_fingerprint(self) -> str:
        """A hash of all that determines token ids."""
        return self._text_tokenizer.fingerprint

    def decode(self, tokens: Tensor, prompt_mask: Tensor | None = None) -> dict[str, str]:
        """Return the texts of a sequence: the prompt, and what follows it up to the first EOS.

        Args:
            tokens: Token ids (L,); mask tokens are left out.
            prompt_mask: Given positions (L,); those at the start are the prompt. None: none are.
        """
        ids = tokens.tolist()
        size = 0 if prompt_mask is None else int(prompt_mask.long().cumprod(0).sum())
        prompt, completion = ids[:size], ids[size:]
        if self.eos_id in completion:
            completion = completion[: completion.index(self.eos_id)]
        texts = {"prompt": [i for i in prompt if i != self.eos_id], "completion": completion}
        decode = self._text_tokenizer.decode
        return {name: decode([i for i in part if i != self.mask_id]) for name, part in texts.items()}

    # How it is done.

    def _warn_of_training_data(self, *names: str) -> None:
        known = {name: (*source.files, *filter(any, [source.hub])) for name, source in self.sources.items()}
        warn_of_training_data(
            {"train_file": known.get("train", ())}, {f"{name}_file": known[name] for name in names if name in known}
        )

    def _eval_loaders(self, names: list[str]) -> DataLoader[Any] | list[DataLoader[Any]]:
        loaders = [make_loader(self._sets[n], self.eval_batch_size, False, self.num_workers, collate) for n in names]
        return loaders[0] if len(loaders) == 1 else loaders

    def _needed(self, stage: str | None) -> list[str]:
        """Return the sets that a stage uses; for None, all that the arguments provide for."""
        sets = {"validate": self.val_names, "test": self.test_names, "predict": ["predict"]}
        sets["fit"] = ["train", *self.val_names]
        if stage is not None:
            return sets[stage]
        return [*sets["fit"], *(name for name in (*self.test_names, "predict") if self.has(name))]

    @property
    def _text_tokenizer(self) -> TextTokenizer:
        if self._tokenizer is None:
            self._tokenizer = cached_tokenizer(
                self.cache_dir,
                self._recipe("train"),
                self._training_texts,
                self.vocab_size,
                self.eos_token,
                self.mask_token,
            )
        return self._tokenizer

    def _training_texts(self) -> Iterator[list[str]]:
        """Yield what ``encode`` tokenises of a bounded sample of the training rows."""
        left = _TRAINED_ON_CHARACTERS
        for rows in self._first_rows() if self.streaming else self._select("train").read(sample=_TRAINED_ON_ROWS):
            texts: list[str] = []

            def note(given: Sequence[object], texts: list[str] = texts) -> list[list[int]]:
                texts += as_texts(given)
                return [[self.eos_id] for _ in given]

            self.encode(rows, note)
            yield texts
            left -= sum(map(len, texts))
            if left < 0:
                return

    def _first_rows(self) -> Iterator[Rows]:
        """Yield the first rows of a stream of training rows, without those that are held out."""
        rows = iter(self.stream("train"))
        held = {digest(row) for row in self._held_out_rows()}
        with tqdm(total=_TRAINED_ON_ROWS, desc="Reading rows for the tokenizer", unit=" rows", delay=2) as bar:
            while bar.n < _TRAINED_ON_ROWS and (some := list(islice(rows, 1_000))):
                bar.update(len(some))
                some = [row for row in some if digest(row) not in held]
                columns = {name: [row.get(name) for row in some] for name in some[0]} if some else {}
                yield Rows(columns, self._argument("train"), list(range(len(some))))

    def _held_out_rows(self) -> list[dict[str, Any]]:
        """Return the rows at the start of a stream of training rows that are held out; none with a ``val_file``."""
        if not self.held_out:
            return []
        if self._head is None:
            num_val = self.limits["val"] or _HELD_OUT_ROWS
            first = list(islice(self.stream("train"), num_val + 1))
            if len(first) <= num_val:
                raise ValueError(
                    f"num_val: expected fewer than the {len(first):,} rows of {self._argument('train')}, got "
                    f"{num_val:,}; hold out fewer, or give val_file"
                )
            self._head = first[:num_val]
        return self._head

    def _home(self, name: str) -> str:
        """Return the set whose rows hold those of a set: ``train`` for what is held out of it."""
        return "train" if name == "val" and self.held_out else name

    def _loaded_rows(self, name: str) -> "Dataset":
        if name not in self._loaded:
            self._loaded[name] = self._streamed(name) or self.load(name)
        return self._loaded[name]

    def _streamed(self, name: str) -> "Dataset | None":
        """Return the rows of a set that a stream holds, of which no more is read than is wanted; None without one."""
        from datasets import Dataset

        if not self.streaming:
            return None
        if name == "val" and self.held_out:
            return Dataset.from_list(self._held_out_rows())
        if name in self.sources and not self.sources[name].files:
            return Dataset.from_list(list(islice(self.stream(name), self.limits.get(name))))
        return None

    def _argument(self, name: str) -> str:
        return self.sources[name].argument if name in self.sources else f"{name} set"

    def _select(self, name: str) -> Selection:
        home = name if self.streaming else self._home(name)
        argument = self._argument(home)
        dataset, limit = self._loaded_rows(home), self.limits.get(name)
        if home != "train" or not self.held_out:
            return Selection(dataset, argument, limit)
        num_val = self.limits["val"] or min(1000, -(-len(dataset) // 10))
        if num_val >= len(dataset):
            raise ValueError(
                f"num_val: expected fewer than the {len(dataset):,} rows of {argument}, got {num_val:,}; hold out "
                "fewer, or give val_file"
            )
        held = np.sort(np.random.default_rng(self.seed).choice(len(dataset), num_val, replace=False))
        return Selection(dataset, argument, *((None, held) if name == "val" else (limit, None, held)))

    def _recipe(self, name: str) -> dict[str, Any]:
        """Return all that a set's examples depend on, except the tokenizer."""
        part: dict[str, Any] = {"limit": self.limits.get(name)}
        if self._home(name) == "train" and self.held_out:
            part |= {"held_out": name == "val", "num_val": self.limits["val"], "seed": self.seed}
        if self.streaming:
            part["streaming"] = True  # whose held out rows are others, and those that a tokenizer is trained on
        return {
            "rows": self.identity(self._home(name)),
            "part": part,
            "prompts_only": self.prompts_only(name),
            "skip": name != "predict",
            "answers": name != "train",
            "encoding": {"text_column": self.text_column, **_own_settings(self)},
        }

    def _open(self, name: str) -> TokenDataset | TextStream:
        form = Format(
            self.sequence_length,
            self.vocab_size,
            self.eos_id,
            self.mask_id,
            self.packing,
            self.padding,
            self.min_answer_length,
        )

        if name == "train" and self.streaming:
            module = copy.copy(self)
            module.trainer, module._sets, module._loaded = None, {}, {}  # not to be sent to workers
            return TextStream(
                self.stream("train"),
                self._argument("train"),
                partial(module.encode, tokenize=self._text_tokenizer.encode),
                form,
                self.shuffle_buffer,
                self.seed,
                self.num_sequences,
                frozenset(map(digest, self._held_out_rows())),
            )

        def build(writer: TokenWriter) -> None:
            tokenize, rows, title = self._text_tokenizer.encode, self._select(name), f"Tokenising {name}"

            def answers(some: Rows) -> list[str] | None:
                return None if name == "train" else self.answers(some, name)

            if self.prompts_only(name):
                skip = name != "predict"
                write_prompts(writer, rows, form, lambda r: self.encode_prompt(r, tokenize), answers, title, skip)
            else:
                write_examples(writer, rows, form, lambda r: self.encode(r, tokenize), answers, title)

        recipe = {**self._recipe(name), "tokenizer": self.tokenizer_fingerprint, **vars(form)}
        return cached(self.cache_dir, recipe, self.sequence_length, self.vocab_size, build, form.hides_padding)

    def _report(self, name: str, dataset: TokenDataset) -> None:
        counts = Counter(dataset.counts)
        say = rank_zero_warn if counts.total() > counts["left over"] else rank_zero_info
        if text := describe(counts):
            made = f"{len(dataset):,} sequences of {self.sequence_length} tokens from {dataset.rows:,} rows"
            say(f"{name} set: {made}; {text}")


def _own_settings(module: TextDataModule) -> dict[str, Any]:
    """Return what subclasses bring: the values of their own arguments and, if they are a user's, their code."""
    settings: dict[str, Any] = {}
    known = inspect.signature(TextDataModule).parameters
    for cls in type(module).__mro__[: type(module).__mro__.index(TextDataModule)]:
        own = [name for name in inspect.signature(cls).parameters if name not in known and name in vars(module)]
        settings |= {name: repr(vars(module)[name]) for name in own}
        if not cls.__module__.startswith("puma_lightning."):
            said = {n: v for n, v in vars(cls).items() if inspect.isfunction(v) or not n.startswith("__")}
            settings[f"code of {cls.__name__}"] = {name: _described(value) for name, value in sorted(said.items())}
    return settings


def _described(value: Any) -> str:
    """Return what a class attribute is or does: the same text in every process, wherever the class is defined."""
    if isinstance(value, staticmethod | classmethod):
        return _described(value.__func__)
    if isinstance(value, property):
        return _described(value.fget)
    if isinstance(value, CodeType):
        content = repr((value.co_code, [_described(constant) for constant in value.co_consts], value.co_names))
        return hashlib.sha256(content.encode()).hexdigest()[:20]
    if inspect.isfunction(value):
        return " ".join(map(_described, (value.__code__, value.__defaults__, value.__kwdefaults__)))
    if isinstance(value, set | frozenset):  # their order is another in every process
        return repr(sorted(map(_described, value)))
    if isinstance(value, tuple | list):
        return repr([_described(each) for each in value])
    plain = value is None or isinstance(value, str | bytes | int | float | dict)
    return repr(value) if plain else type(value).__name__

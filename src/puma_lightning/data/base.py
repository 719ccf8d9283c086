"""What a DataModule may offer beyond its loaders, declared in one place; and what our own DataModules share."""

import inspect
import operator
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

# Processes that load batches, at most.
_WORKERS_OF_A_CORE = 64

Decode = Callable[[Tensor, Tensor | None], dict[str, str]]


@dataclass(frozen=True, eq=False)
class Picture:
    """How to draw a sequence as a grid.

    Args:
        positions: The position of the sequence that each cell of the grid shows, (rows, columns) int64. What it leaves
            out is not drawn.
        box: Rows and columns of the boxes that thick lines enclose; None for no lines.

    Raises:
        ValueError: If the positions have another form.
    """

    positions: Tensor
    box: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.positions.dim() != 2 or self.positions.dtype != torch.int64:
            raise ValueError(
                f"positions: expected int64 (rows, columns), got {self.positions.dtype} {tuple(self.positions.shape)}; "
                "say of each cell which position it shows"
            )


class DataOffer:
    """What a DataModule may offer beyond its loaders. This class declares all of it, and nothing else reads it.

    Nothing is required, and there is no class to inherit from: any ``LightningDataModule`` will do whose loaders return
    batches ``{"input_ids": (B, L) int64, "prompt_mask": (B, L) bool}``; ``data/batch.py`` says what else may be in
    them. What it has under these names is used as well:

    - ``vocab_size``, ``mask_id`` and ``eos_id``, set in ``__init__``: the command line gives them to the model;
    - ``decode``, ``picture`` and ``tokenizer_fingerprint``, which are looked up when they are needed, so that they may
      be there only after ``prepare_data``;
    - ``val_names`` and ``test_names``, read by ``set_names``.

    What it lacks, or has as None, is done without. The properties below say what each is, who uses it, and what is
    missing without it.

    A batch may offer an ``answer``, a list of B texts, for metrics whose ``update`` asks for ``answers``.

    ``encode`` and ``encode_prompt`` are not part of this: they are methods of ``TextDataModule``, for its subclasses to
    override.

    Args:
        datamodule: Any DataModule; None, for a Trainer that was given loaders, offers nothing.

    Raises:
        ValueError: By every property, if the DataModule has something else under that name.
    """

    def __init__(self, datamodule: object | None) -> None:
        self._datamodule = datamodule

    @property
    def vocab_size(self) -> int | None:
        """V, the number of tokens with the mask token.

        Used by the command line, which gives it to the backbone and cannot do without. In Python, pass it yourself.
        """
        return self._integer("vocab_size")

    @property
    def mask_id(self) -> int | None:
        """The mask token, which no clean sequence contains.

        Used by the command line, which gives it to the model and cannot do without. In Python, pass it yourself.
        """
        return self._integer("mask_id")

    @property
    def eos_id(self) -> int | None:
        """The token that ends an answer.

        Used by the command line, which gives it to the model. One that generates from left to right, whole or in
        blocks, ends there; one that fills in any order if its sampler has ``end_at_eos``. Without it nothing ends an
        answer early, and every position is generated.
        """
        return self._integer("eos_id")

    @property
    def decode(self) -> Decode | None:
        """``decode(tokens, prompt_mask) -> dict[str, str]``: the texts in a sequence (L,), by name.

        ``prompt_mask`` is (L,) bool, or None if nothing is given. The text under ``completion`` is what metrics judge.
        Used by ``PredictionWriter``, which writes every text, and by ``GenerationEvaluation`` for metrics whose
        ``update`` asks for ``completions`` and to show samples. Without it predictions are tokens alone, no samples
        are shown, and a metric that asks for completions is refused.
        """
        expected = "a function (tokens, prompt_mask) -> dict[str, str]"
        decode = self._offered("decode", expected, _takes_two)

        def checked(tokens: Tensor, prompt_mask: Tensor | None) -> dict[str, str]:
            texts: Any = decode(tokens, prompt_mask)
            if isinstance(texts, dict) and all(isinstance(part, str) for pair in texts.items() for part in pair):
                return texts
            raise ValueError(
                f"decode: expected {expected}, got one that returned {_short(texts)}; return texts by name, such as "
                '{"prompt": ..., "completion": ...}'
            )

        return None if decode is None else checked

    @property
    def picture(self) -> Picture | None:
        """How to draw a sequence as a grid, such as a board or an image.

        Used by ``UnmaskingTrajectory``. Without it sequences are drawn as strips.
        """
        picture = self._offered("picture", "a puma_lightning.data.base.Picture", _is(Picture))
        assert picture is None or isinstance(picture, Picture)
        return picture

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """A text that differs between tokenizers that differ.

        Used by checkpoints, which keep it, so that weights are not loaded where token ids mean something else. Without
        it that is not checked.
        """
        fingerprint = self._offered("tokenizer_fingerprint", "a string", _is(str))
        return None if fingerprint is None else str(fingerprint)

    def set_names(self, stage: Literal["val", "test"], number: int) -> list[str]:
        """Return the names of the validation or test sets: ``val_names`` or ``test_names`` of the DataModule.

        Used for the names of metrics: those of the first set end in nothing, those of another in ``/name``. Without
        names they end in the number of the loader.

        Args:
            stage: Whose sets.
            number: How many loaders there are.
        """

        def is_right(names: Any) -> bool:
            texts = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
            return texts and len(names) == len(set(names)) == number

        expected = f"a different name for each of {number} {stage} loaders"
        names = self._offered(f"{stage}_names", expected, is_right)
        return [str(index) for index in range(number)] if names is None else list(names)

    def required(self, name: Literal["vocab_size", "mask_id"]) -> int:
        """Return what the command line cannot do without.

        Raises:
            ValueError: If the DataModule does not offer it.
        """
        value = self._integer(name)
        if value is None:
            raise ValueError(
                f"{name}: expected an integer, as an attribute of {type(self._datamodule).__name__}, got none; set it "
                "in __init__, as the command line gives it to the model"
            )
        return value

    def own_hook(self, names: Iterable[str]) -> str | None:
        """Return the first of some hooks of which the DataModule has a version of its own; None if there is none."""
        plain = pl.LightningDataModule
        return next(
            (n for n in names if getattr(type(self._datamodule), n, None) not in (None, getattr(plain, n))), None
        )

    def _integer(self, name: str) -> int | None:
        value = self._offered(name, "an integer", _is_integer)
        return None if value is None else operator.index(value)

    def _offered(self, name: str, expected: str, is_right: Callable[[Any], bool]) -> Any:
        value = getattr(self._datamodule, name, None)
        if value is None or is_right(value):
            return value
        raise ValueError(
            f"{name}: expected {expected}, got {_short(value)} from {type(self._datamodule).__name__}; correct it, or "
            "leave it out"
        )


def offer_of(trainer: pl.Trainer | None) -> DataOffer:
    """Return what the DataModule of a Trainer offers: nothing, if there is no DataModule or no Trainer."""
    return DataOffer(None if trainer is None else trainer.datamodule)  # type: ignore[attr-defined]


def make_loader(
    dataset: Dataset[Any],
    batch_size: int,
    shuffle: bool,
    num_workers: int,
    collate_fn: Callable[[Any], Any] | None = None,
) -> DataLoader[Any]:
    """Return a DataLoader with the settings that all of ours have in common."""
    return DataLoader(
        dataset,
        batch_size=batch_size,  # by keyword: Lightning's replacement of samplers fails otherwise
        shuffle=shuffle,
        num_workers=num_workers,
        collate_fn=collate_fn,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
    )


def at_least(argument: str, value: int, low: int) -> int:
    """Return the value of an argument.

    Raises:
        ValueError: If it is no integer, or below ``low``; the message names the argument.
    """
    if not _is_integer(value):
        raise ValueError(f"{argument}: expected an integer of at least {low}, got {_short(value)}; correct it")
    if value < low:
        raise ValueError(f"{argument}: expected at least {low}, got {value}; raise it")
    return operator.index(value)


def in_range(argument: str, value: int, low: int, high: int) -> int:
    """Return the value of an argument.

    Raises:
        ValueError: If it is no integer, or not in ``low..high``; the message names the argument.
    """
    if at_least(argument, value, low) > high:
        raise ValueError(f"{argument}: expected at most {high:,}, got {value:,}; lower it")
    return operator.index(value)


def check_seed(seed: int) -> int:
    """Return a seed; the range is that of ``seed_everything``.

    Raises:
        ValueError: If it is no integer of 32 bits.
    """
    return in_range("seed", seed, 0, 2**32 - 1)


def check_workers(num_workers: int) -> int:
    """Return a number of processes, and warn of one that slows this machine down.

    Raises:
        ValueError: If it is negative, or more than the machine can bear.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = cores * _WORKERS_OF_A_CORE
    if at_least("num_workers", num_workers, 0) > most:
        raise ValueError(
            f"num_workers: expected at most {most} processes ({_WORKERS_OF_A_CORE} for each of {cores} cores), got "
            f"{num_workers:,}; lower it (loading is fast enough for 0)"
        )
    if num_workers > cores:
        rank_zero_warn(
            f"num_workers: {num_workers} processes share {cores} cores, which is slower than fewer; loading is fast "
            "enough for 0"
        )
    return operator.index(num_workers)


def check_name(argument: str, value: Any) -> str:
    """Return a name, such as that of a column.

    Raises:
        ValueError: If it is no text, or blank.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{argument}: expected a name, got {_short(value)}; give one")
    return value


def paths_of(argument: str, given: Any) -> list[str]:
    """Return the paths that an argument names, one or a list; warn of one that is named twice.

    Raises:
        ValueError: If it names nothing, or something else.
    """
    listed = list(given) if isinstance(given, list | tuple) else [given]
    if not listed or not all(isinstance(each, str | os.PathLike) and str(each).strip() for each in listed):
        raise ValueError(f"{argument}: expected a path, or a list of them, got {_short(given)}; name a file")
    paths = [os.fspath(each) for each in listed]
    for twice in sorted({path for path in paths if paths.count(path) > 1}):
        rank_zero_warn(f"{argument}: {twice} is named more than once, and is read as often")
    return paths


def warn_of_training_data(trained_on: Mapping[str, Iterable[Any]], judged_by: Mapping[str, Iterable[Any]]) -> None:
    """Warn if a model is judged by what it is trained on: legitimate, but seldom meant.

    Args:
        trained_on: Paths, or other names of data, by argument.
        judged_by: The same.
    """

    def identity(name: Any) -> Any:
        with suppress(OSError, TypeError, ValueError):  # not a path
            status = os.stat(name)
            return status.st_dev, status.st_ino
        return name

    for argument, names in trained_on.items():
        known = {identity(name) for name in names}
        for other, others in judged_by.items():
            for name in others:
                if identity(name) in known:
                    rank_zero_warn(f"{other}: {name} is also in {argument}, so it tells what was learned by heart")


def _takes_two(decode: Any) -> bool:
    """Tell whether a function can be called with two arguments, as far as it says."""
    if not callable(decode):
        return False
    try:
        inspect.signature(decode).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # some functions written in C do not say
        return True
    return True


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


def _is_integer(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

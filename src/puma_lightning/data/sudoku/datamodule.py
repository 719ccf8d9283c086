"""Sudoku as a DataModule: built-in puzzles of order 4, 6 and 9, or puzzles from files."""

import os
from collections.abc import Iterable
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from puma_lightning.data.base import (
    at_least,
    check_seed,
    check_workers,
    in_range,
    make_loader,
    paths_of,
    warn_of_training_data,
)
from puma_lightning.data.batch import Batch
from puma_lightning.data.cache import DEFAULT_CACHE, cache_folder, contents_of
from puma_lightning.data.sudoku.board import ORDERS, Boards, order_of_cells, random_symmetry
from puma_lightning.data.sudoku.cache import cached
from puma_lightning.data.sudoku.files import read_boards, read_puzzles
from puma_lightning.data.sudoku.generate import clue_range, hold_out, make_splits
from puma_lightning.data.sudoku.layout import Layout, board_of, lay_out, picture_of, sequence_length

_BUILT_IN_SIZES = {
    4: {"test": 64, "val": 64, "train": 240},
    6: {"test": 500, "val": 500, "train": 2_000},
    9: {"test": 1_000, "val": 1_000, "train": 20_000},
}

# An epoch's order is drawn at once; beyond this it takes long, and much memory.
_SEQUENCES_OF_AN_EPOCH = 10**8


class SudokuDataset(Dataset[Batch]):
    """Boards as token sequences; item i depends on the arguments and i only.

    Args:
        boards: N puzzles with their solutions.
        layout: ``in_place`` or ``prompt_answer``.
        augment: Number of copies of the set. Item i is board i % N; every copy but the first shows it under a
            random symmetry, drawn from (seed, i // N, i % N).
        seed: Chooses the symmetries.
    """

    def __init__(self, boards: Boards, layout: Layout, augment: int = 1, seed: int = 0) -> None:
        self.boards = boards
        self.layout = layout
        self.augment = augment
        self.seed = seed

    def __len__(self) -> int:
        return len(self.boards.puzzles) * self.augment

    def __getitem__(self, index: int) -> Batch:
        """Return one item, tensors (L,).

        Raises:
            IndexError: Beyond the end.
        """
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: list[int]) -> list[Batch]:
        """Return the items of a whole batch, made at once: this is what a DataLoader calls."""
        index = np.asarray(indices)
        copy, row = np.divmod(index, len(self.boards.puzzles))
        puzzles, solutions = self.boards.take(row)
        if self.augment > 1:
            symmetry = random_symmetry(order_of_cells(puzzles.shape[1]), self.seed, copy, row)
            original = copy[:, None] == 0
            puzzles = np.where(original, puzzles, symmetry(puzzles))
            solutions = np.where(original, solutions, symmetry(solutions))
        input_ids, prompt_mask = map(torch.from_numpy, lay_out(Boards(puzzles, solutions), self.layout))
        return [{"input_ids": ids, "prompt_mask": given} for ids, given in zip(input_ids, prompt_mask, strict=True)]


class SudokuDataModule(pl.LightningDataModule):
    """Sudoku puzzles: the clues are the prompt, the solution is what the model fills in.

    Without files the puzzles are made on the spot, no two of them equivalent up to symmetry. Files may be
    ``.csv`` with the columns ``puzzle,solution`` or ``.txt`` with one puzzle per line (either may end in
    ``.gz``; 0 or . is an empty cell), or ``.npy`` rows of 325 integers; every puzzle is checked for having one
    solution. Whatever is made or checked is kept in ``cache_dir``.

    Tokens: 0 = empty cell, 1..order = digits, order + 1 = mask.

    Args:
        order: Digits on the board: 4 (2x2 boxes), 6 (2 rows x 3 columns) or 9 (3x3).
        layout: ``in_place``: one token per cell, the clues among them are the prompt. ``prompt_answer``: the
            puzzle is the prompt and the whole solution follows it.
        train_file: Training puzzles; null for built-in ones.
        val_file: Validation puzzles, or a list of several validation sets. Null: a part of the training file
            (nothing equivalent to it is trained on then), or built-in puzzles if there is no such file.
        test_file: Test puzzles, or a list of several test sets; null for built-in ones if there is no
            training file.
        predict_file: Puzzles to solve; no solutions are needed.
        num_train: Number of built-in training puzzles (null: 240, 2,000 or 20,000 by order), or train on this
            many of the file at most (null: all).
        num_val: Number of built-in validation puzzles (null: 64, 500 or 1,000 by order), or of those held out
            (null: a tenth, 1,000 at most), or read this many of each validation file at most (null: all).
        num_test: Number of built-in test puzzles (null: 64, 500 or 1,000 by order), or read this many of each
            test file at most (null: all).
        clues: Clues of built-in puzzles: a number, or a range [low, high]; null for 6, 13 or 32 by order.
        augment: Enlarge the training set this many times by symmetries (digits, rows, columns, boxes).
        batch_size: Sequences in a training batch of one device.
        eval_batch_size: Sequences in a validation, test or prediction batch; null for ``batch_size``.
        num_workers: Processes that load batches; loading is fast enough for 0.
        seed: Chooses the built-in puzzles, the held-out part and the symmetries.
        cache_dir: Where made and checked puzzles are kept. The default follows ``$XDG_CACHE_HOME`` if set.

    Attributes:
        vocab_size: order + 2.
        mask_id: order + 1.
        sequence_length: L, in tokens.
        picture: How to draw a sequence: as the board that is filled in.
        val_names: What the validation loaders hold, by position.
        test_names: What the test loaders hold, by position.

    Raises:
        ValueError: If an argument is out of range, or a file is absent, damaged or holds a faulty board.
    """

    def __init__(
        self,
        order: int = 9,
        layout: Layout = "in_place",
        train_file: str | None = None,
        val_file: str | list[str] | None = None,
        test_file: str | list[str] | None = None,
        predict_file: str | None = None,
        num_train: int | None = None,
        num_val: int | None = None,
        num_test: int | None = None,
        clues: int | tuple[int, int] | None = None,
        augment: int = 1,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: str = DEFAULT_CACHE,
    ) -> None:
        super().__init__()
        if isinstance(order, float) or order not in ORDERS:
            raise ValueError(f"order: expected one of {ORDERS}, got {order!r}; choose one of these")
        self.sequence_length = sequence_length(order, layout)
        self.vocab_size = order + 2
        self.mask_id = order + 1
        self.picture = picture_of(order, layout)
        self.order = order
        self.layout = layout
        self.clues = clue_range(order, clues)
        self.augment = at_least("augment", augment, 1)
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
        self.files = {
            "train": _existing("train_file", train_file),
            "val": _existing("val_file", val_file),
            "test": _existing("test_file", test_file),
            "predict": _existing("predict_file", predict_file),
        }
        if num_train or not self.files["train"]:
            self._check_augment(num_train or _BUILT_IN_SIZES[order]["train"])
        judged_by = {f"{name}_file": self.files[name] for name in ("val", "test")}
        warn_of_training_data({"train_file": self.files["train"]}, judged_by)
        self.val_names = _names("val", self.files["val"])
        self.test_names = _names("test", self.files["test"])
        self.cache_dir = cache_folder(cache_dir)
        self._sets: dict[str, list[SudokuDataset]] = {}

    def prepare_data(self) -> None:
        """Make, or read and check, the puzzles, and keep them in the cache; called in one process only."""
        stage = self.trainer.state.fn if self.trainer else None
        for name in self._needed(stage.value if stage else None):
            self._boards(name)

    def setup(self, stage: str | None = None) -> None:
        """Load the puzzles of a stage.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``; None for all there are.
        """
        for name in self._needed(stage):
            augment = self.augment if name == "train" else 1
            boards = self._boards(name)
            if name == "train":
                self._check_augment(len(boards[0].puzzles))
            self._sets[name] = [SudokuDataset(each, self.layout, augment, self.seed) for each in boards]

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return shuffled training batches."""
        return self._loader(self._sets["train"][0], self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Return one loader, or one for each of several files (see ``val_names``)."""
        return self._eval_loaders("val")

    def test_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Return one loader, or one for each of several files (see ``test_names``)."""
        return self._eval_loaders("test")

    def predict_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Return the puzzles of ``predict_file``; all that is not prompt is masked."""
        return self._eval_loaders("predict")

    def decode(self, tokens: Tensor, prompt_mask: Tensor | None = None) -> dict[str, str]:
        """Return the board in a sequence (L,) as one line of digits, . for a cell that has none."""
        cells = board_of(tokens, self.order).tolist()
        return {"text": "".join(str(cell) if 1 <= cell <= self.order else "." for cell in cells)}

    def _check_augment(self, puzzles: int) -> None:
        in_range(f"augment (copies of {puzzles:,} puzzles)", self.augment, 1, _SEQUENCES_OF_AN_EPOCH // puzzles)

    def _loader(self, dataset: SudokuDataset, batch_size: int, shuffle: bool) -> DataLoader[Batch]:
        return make_loader(dataset, batch_size, shuffle, self.num_workers)

    def _eval_loaders(self, name: str) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        loaders = [self._loader(each, self.eval_batch_size, shuffle=False) for each in self._sets[name]]
        return loaders[0] if len(loaders) == 1 else loaders

    def _needed(self, stage: str | None) -> list[str]:
        """Return the sets that a stage uses; for None, all that the arguments provide for."""
        if stage is None:
            has_test = self.files["test"] or not self.files["train"]
            return ["train", "val"] + ["test"] * bool(has_test) + ["predict"] * bool(self.files["predict"])
        return {"fit": ["train", "val"], "validate": ["val"]}.get(stage, [stage])

    def _boards(self, name: str) -> list[Boards]:
        """Return the boards of one set, one entry for each file; from the cache if it has them."""
        files, from_file = self.files[name], bool(self.files["train"])
        if name == "predict":
            if not files:
                raise ValueError("predict_file: expected a file of puzzles to solve, got none; give one")
            puzzles = read_puzzles(files[0], self.order)
            return [Boards(puzzles, np.full_like(puzzles, self.mask_id))]
        if name == "test" and from_file and not files:
            raise ValueError("test_file: expected a file, as train_file is given, got none; give one")
        if from_file and not self.files["val"] and name != "test":
            return [self._held_out()[name]]
        return [self._file(file, self.limits[name]) for file in files] or [self._built_in()[name]]

    def _built_in(self) -> dict[str, Boards]:
        # The training set comes last: its size then does not change the puzzles of the others.
        default = _BUILT_IN_SIZES[self.order]
        sizes = {name: self.limits[name] or size for name, size in default.items()}
        recipe = {"order": self.order, "sizes": sizes, "clues": self.clues, "seed": self.seed}

        def build() -> dict[str, Boards]:
            return make_splits(self.order, sizes, self.clues, self.seed, progress=True)

        return cached(self.cache_dir, recipe, build)

    def _file(self, file: Path, limit: int | None) -> Boards:
        def build() -> dict[str, Boards]:
            return {"all": read_boards(file, self.order, limit, progress=True)}

        return cached(
            self.cache_dir, {"order": self.order, "limit": limit, "file": contents_of([file], self.cache_dir)}, build
        )["all"]

    def _held_out(self) -> dict[str, Boards]:
        file, num_train, num_val = self.files["train"][0], self.limits["train"], self.limits["val"]

        def build() -> dict[str, Boards]:
            # What is held out comes on top of the training puzzles asked for; 1,000 is the most by default.
            limit = num_train + (num_val or min(1000, -(-num_train // 9))) if num_train else None
            boards = read_boards(file, self.order, limit, progress=True)
            return hold_out(boards, num_val or min(1000, -(-len(boards.puzzles) // 10)), self.seed, progress=True)

        recipe = {"order": self.order, "train": num_train, "val": num_val, "seed": self.seed}
        return cached(self.cache_dir, {**recipe, "file": contents_of([file], self.cache_dir)}, build)


def _existing(argument: str, files: str | list[str] | None) -> list[Path]:
    """Return the files of an argument as absolute paths; raise ``ValueError`` if one is absent."""
    given = [] if files is None else paths_of(argument, files)
    paths = [Path(os.path.expanduser(file)).absolute() for file in given]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{argument}: expected a file, got none at {path}; check the path")
    return paths


def _names(default: str, files: Iterable[Path]) -> list[str]:
    """Return file names without their endings, or the default if there is no file."""
    names = [file.name.split(".")[0] for file in files] or [default]
    if len(set(names)) < len(names):
        raise ValueError(f"{default}_file: expected files with different names, got {names}; rename one")
    return names

"""Rows of a data set, read some at a time."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from datasets import Dataset

_ROWS_AT_ONCE = 2_000
_BYTES_AT_ONCE = 2**23
_MAPPED_FOR = 20  # times as many rows


class Rows(dict[str, list[Any]]):
    """Some rows of a data set, by column.

    Args:
        columns: The values.
        argument: Name of the argument that gave the data set, for messages.
        index: The rows' numbers in the data set, from 0.
    """

    def __init__(self, columns: dict[str, list[Any]], argument: str, index: list[int]) -> None:
        super().__init__(columns)
        self.argument = argument
        self.index = index

    def __missing__(self, column: str) -> list[Any]:
        raise ValueError(
            f"{self.argument}: expected a column {column!r}, got the columns {list(self)}; name one of these, or give "
            "other data"
        )


def texts_of(rows: dict[str, list[Any]], column: str) -> list[str]:
    """Return a column of texts; None becomes an empty one.

    Args:
        rows: Some rows; ``Rows``, to be told which one is wrong.
        column: The column's name.

    Raises:
        ValueError: If it holds something else, which would be trained on as Python prints it.
    """
    argument, index = (rows.argument, rows.index) if isinstance(rows, Rows) else ("rows", range(len(rows[column])))
    for value, number in zip(rows[column], index, strict=True):
        if value is not None and not isinstance(value, str):
            raise ValueError(
                f"{argument}: expected texts in the column {column!r}, got {value!r:.80} ({type(value).__name__}) in "
                f"row {number + 1}; turn it into a text, or name another column"
            )
    return ["" if value is None else value for value in rows[column]]


@dataclass
class Selection:
    """Some rows of a data set, in its order.

    Args:
        dataset: The data set.
        argument: Name of the argument that gave the data set, for messages.
        limit: This many rows at most; None for all.
        only: The numbers of the rows to take, ascending; None for all.
        without: The numbers of the rows to leave out, ascending; None for none.
    """

    dataset: Dataset
    argument: str
    limit: int | None = None
    only: NDArray[np.int64] | None = None
    without: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        rows = len(self.dataset if self.only is None else self.only)
        rows -= 0 if self.without is None else len(self.without)
        return rows if self.limit is None else min(rows, self.limit)

    def read(self, sample: int | None = None) -> Iterator[Rows]:
        """Read the rows, some at a time.

        Args:
            sample: Read about this many only, evenly spread; None for all.
        """
        dataset, left = self.dataset, len(self)
        stop = left if self.without is None else min(len(dataset), left + len(self.without))
        size = dataset.data.nbytes // max(len(dataset), 1)
        step = max(1, min(_ROWS_AT_ONCE, _BYTES_AT_ONCE // max(size, 1)))
        starts = range(0, stop, step)
        if sample:
            starts = starts[:: max(1, -(-stop // max(sample, step)))]
        for number, start in enumerate(starts):
            if dataset.cache_files and number % _MAPPED_FOR == 0:
                # Opens the files again: pages that were read would otherwise go on counting as this process's memory.
                dataset = pickle.loads(pickle.dumps(dataset))
            index = np.arange(start, min(start + step, stop))
            if self.only is not None:
                index = self.only[index]
                columns = dataset[index.tolist()]
            else:
                columns = dataset[start : start + len(index)]
            if self.without is not None:
                stays = ~np.isin(index, self.without)
                index = index[stays]
                columns = {name: list(compress(values, stays)) for name, values in columns.items()}
            rows = Rows({name: list(values[:left]) for name, values in columns.items()}, self.argument, [])
            rows.index = index[:left].tolist()
            left -= len(rows.index)
            yield rows

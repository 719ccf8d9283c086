"""Who has taken what: sequences that are dealt to ranks, whose number may change from resume to resume.

A queue of sequences is dealt in turn: of m ranks, rank r gets the places r, r + m, r + 2m, ... When a run goes on with
another number of ranks, each of the old ones has taken some of its own. What is left closes up, in its order, and is
dealt in turn to the new ones. So an ``Era`` for each number of ranks before says all that there is to know of what was
taken.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Era = Sequence[int]  # how many sequences each rank took, by rank


def left_in_queue(place: Tensor, taken: Era) -> tuple[Tensor, Tensor]:
    """Tell what is left of a queue.

    Args:
        place: Places in the queue, from 0, (N,) int64.
        taken: How many each of the ranks took that it was dealt to.

    Returns:
        Whether each place is left, (N,) bool; and the place of each in what is left, (N,) int64, which means something
        where it is left.

    Example:
        >>> import torch
        >>> left, place = left_in_queue(torch.arange(6), taken=[2, 1])
        >>> left.tolist(), place[left].tolist()
        ([False, False, False, True, True, True], [0, 1, 2])
    """
    ranks = len(taken)
    left = place // ranks >= torch.tensor(taken)[place % ranks]
    before = sum(((place - rank + ranks - 1) // ranks).clamp(max=number) for rank, number in enumerate(taken))
    return left, place - before


class Passes:
    """What is left of each pass over a set of known size, every pass of which is a queue of its own.

    Args:
        size: Sequences in a pass.
        eras: What was taken, oldest first.
    """

    def __init__(self, size: int, eras: Sequence[Era] = ()) -> None:
        self.size = size
        self._left: dict[int, int] = {}
        self._taken: list[dict[int, list[int]]] = []  # by era and pass
        for era in eras:
            number, open_, taken = 0, list(era), dict[int, list[int]]()
            while any(open_):
                left = self.left(number)
                taken[number] = [min(len(range(rank, left, len(era))), more) for rank, more in enumerate(open_)]
                open_ = [more - now for more, now in zip(open_, taken[number], strict=True)]
                self._left[number] = left - sum(taken[number])
                number += 1
            self._taken.append(taken)

    def left(self, number: int) -> int:
        """Return how many sequences of a pass are left."""
        return self._left.get(number, self.size)

    def rest(self, number: int, order: Tensor) -> Tensor:
        """Return what is left of a pass.

        Args:
            number: The number of the pass, from 0.
            order: The whole pass, (size,).
        """
        for taken in self._taken:
            if number in taken:
                order = order[left_in_queue(torch.arange(len(order)), taken[number])[0]]
        return order

    def find(self, position: int, rank: int, ranks: int) -> tuple[int, int]:
        """Return the pass that a rank is in, and how many of its share in it it has taken.

        Args:
            position: How many it has taken since the newest era.
            rank: The rank.
            ranks: The number of ranks now.
        """
        number = 0
        while position >= (share := len(range(rank, self.left(number), ranks))):
            number, position = number + 1, position - share
        return number, position

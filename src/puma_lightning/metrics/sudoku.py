"""How good generated Sudoku boards are: grids solved, and cells right."""

import torch
from torch import Tensor
from torchmetrics import Metric

from puma_lightning.data.sudoku.board import board_of, board_of_length, geometry, puzzle_of


def solved_grids(tokens: Tensor, input_ids: Tensor, prompt_mask: Tensor) -> Tensor:
    """Tell which boards keep all clues and hold every digit once in every row, column and box.

    L tells the two layouts apart. The clues are the prompt of an ``in_place`` board, and the nonzero digits of
    the first half of a ``prompt_answer`` board.

    Args:
        tokens: Generated boards, (B, L).
        input_ids: The boards they were generated for (B, L); only clues are looked at.
        prompt_mask: True = given, (B, L).

    Returns:
        (B,) bool.

    Raises:
        ValueError: If the shapes differ, or no board has L tokens.
    """
    _check_shapes(tokens, input_ids, prompt_mask)
    order, layout = board_of_length(tokens.shape[1])
    shape = geometry(order)
    grids, clues = board_of(tokens, order), puzzle_of(input_ids, order)
    is_clue = prompt_mask if layout == "in_place" else clues != 0
    clues_kept = ((grids == clues) | ~is_clue).all(dim=1)
    in_groups = grids[:, torch.from_numpy(shape.groups).to(grids.device)]
    every_digit = torch.arange(1, order + 1, device=grids.device)
    groups_right = (in_groups.sort(dim=2).values == every_digit).all(dim=2).all(dim=1)
    return clues_kept & groups_right


def correct_cells(tokens: Tensor, input_ids: Tensor, prompt_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Count the generated cells that equal the solution.

    Args:
        tokens: Generated boards, (B, L).
        input_ids: Solved boards, (B, L).
        prompt_mask: True = given, so not counted, (B, L).

    Returns:
        Number of right cells and number of cells that were not given, scalars.

    Raises:
        ValueError: If the shapes differ, or no board has L tokens.
    """
    _check_shapes(tokens, input_ids, prompt_mask)
    board_of_length(tokens.shape[1])
    return ((tokens == input_ids) & ~prompt_mask).sum(), (~prompt_mask).sum()


def _check_shapes(tokens: Tensor, input_ids: Tensor, prompt_mask: Tensor) -> None:
    if tokens.dim() != 2 or not tokens.shape == input_ids.shape == prompt_mask.shape:
        raise ValueError(
            "expected tokens, input_ids and prompt_mask of one shape (B, L), got "
            f"{tuple(tokens.shape)}, {tuple(input_ids.shape)} and {tuple(prompt_mask.shape)}"
        )


class _Share(Metric):
    """A share of right ones among all, summed over batches and processes; NaN where there are none."""

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    right: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("right", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """Return the share so far, a float scalar."""
        return self.right / self.total


class SudokuSolved(_Share):
    """Share of boards with all clues kept and all rows, columns and boxes right (see ``solved_grids``)."""

    def update(self, tokens: Tensor, input_ids: Tensor, prompt_mask: Tensor) -> None:
        """Add a batch of generated boards, (B, L) each."""
        solved = solved_grids(tokens, input_ids, prompt_mask)
        self.right += solved.sum()
        self.total += len(solved)


class CellAccuracy(_Share):
    """Share of cells that were not given and equal the solution (see ``correct_cells``)."""

    def update(self, tokens: Tensor, input_ids: Tensor, prompt_mask: Tensor) -> None:
        """Add a batch of generated boards, (B, L) each."""
        right, total = correct_cells(tokens, input_ids, prompt_mask)
        self.right += right
        self.total += total

"""How good generated Sudoku boards are: grids solved, and cells right."""

import torch
from torch import Tensor
from torchmetrics import Metric

from puma_lightning.data.sudoku.board import geometry
from puma_lightning.data.sudoku.layout import board_of, board_of_length, clues_of


def solved_grids(tokens: Tensor, input_ids: Tensor, prompt_mask: Tensor) -> Tensor:
    """Tell which boards keep all clues and hold every digit once in every row, column and box.

    L tells the two layouts apart, see ``clues_of``.

    Args:
        tokens: Generated boards (B, L).
        input_ids: The boards they were generated for (B, L); only clues are looked at.
        prompt_mask: True = given (B, L).

    Returns:
        (B,) bool.

    Raises:
        ValueError: If the shapes differ, or no board has L tokens.
    """
    _check_shapes(tokens, input_ids, prompt_mask)
    order, _ = board_of_length(tokens.shape[1])
    grids = board_of(tokens, order)
    clues, is_clue = clues_of(input_ids, prompt_mask)
    clues_kept = ((grids == clues) | ~is_clue).all(dim=1)
    in_groups = grids[:, torch.from_numpy(geometry(order).groups).to(grids.device)]
    every_digit = torch.arange(1, order + 1, device=grids.device)
    groups_right = (in_groups.sort(dim=2).values == every_digit).all(dim=2).all(dim=1)
    return clues_kept & groups_right


def correct_cells(tokens: Tensor, input_ids: Tensor, prompt_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Count the generated cells that equal the solution.

    Args:
        tokens: Generated boards (B, L).
        input_ids: Solved boards (B, L).
        prompt_mask: True = given, so not counted (B, L).

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
            "tokens: expected tokens, input_ids and prompt_mask of one shape (B, L), got "
            f"{tuple(tokens.shape)}, {tuple(input_ids.shape)} and {tuple(prompt_mask.shape)}; pass them together"
        )


class _Share(Metric):
    """A share of what is right among all, summed over batches and processes; NaN if there is nothing."""

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
        """Add a batch of generated boards, all (B, L)."""
        solved = solved_grids(tokens, input_ids, prompt_mask)
        self.right += solved.sum()
        self.total += len(solved)


class CellAccuracy(_Share):
    """Share of cells that were not given and equal the solution (see ``correct_cells``)."""

    def update(self, tokens: Tensor, input_ids: Tensor, prompt_mask: Tensor) -> None:
        """Add a batch of generated boards, all (B, L)."""
        right, total = correct_cells(tokens, input_ids, prompt_mask)
        self.right += right
        self.total += total

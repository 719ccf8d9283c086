"""Sequences cut into blocks, each a row of its own, and put together again."""

from torch import Tensor


def cut_blocks(rows: Tensor, block_size: int) -> Tensor:
    """Cut sequences into blocks: (B, L, ...) to (B * L / S, S, ...), with S the block size.

    Raises:
        ValueError: If the block size does not divide L.

    Example:
        >>> import torch
        >>> cut_blocks(torch.tensor([[1, 2, 3, 4]]), 2)
        tensor([[1, 2],
                [3, 4]])
    """
    check_block_size(block_size, rows.shape[1])
    return rows.reshape(-1, block_size, *rows.shape[2:])


def join_blocks(rows: Tensor, num_blocks: int) -> Tensor:
    """Put the blocks of each sequence together again: (B * L / S, S, ...) to (B, L, ...).

    Args:
        rows: Blocks, those of one sequence in consecutive rows.
        num_blocks: L / S.

    Example:
        >>> import torch
        >>> join_blocks(torch.tensor([[1, 2], [3, 4]]), num_blocks=2)
        tensor([[1, 2, 3, 4]])
    """
    return rows.reshape(-1, num_blocks * rows.shape[1], *rows.shape[2:])


def check_block_size(block_size: int, length: int) -> None:
    """Check that blocks of a size fill a sequence.

    Raises:
        ValueError: If the size does not divide the length; names the sizes that do.

    Example:
        >>> check_block_size(4, 12)
    """
    if length % block_size:
        divisors = ", ".join(str(n) for n in range(1, length + 1) if length % n == 0)
        raise ValueError(
            f"block_size: expected a divisor of the sequence length {length}, got {block_size}; choose among "
            f"{divisors}, or choose another sequence length"
        )

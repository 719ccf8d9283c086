"""Randomness as a pure function: the same keys give the same numbers on every machine and numpy version."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

UInt64 = NDArray[np.uint64]

_MASK = (1 << 64) - 1
_STEP = np.uint64(0x9E3779B97F4A7C15)


def mix(values: UInt64) -> UInt64:
    """Scramble 64-bit integers with the finaliser of SplitMix64 (Steele, Lea, Flood 2014).

    Args:
        values: Any shape. All arithmetic wraps modulo 2**64.

    Returns:
        Integers of the same shape; a bijection of the input.
    """
    with np.errstate(over="ignore"):
        values = values + _STEP
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def hash_keys(*keys: int | NDArray[np.integer]) -> UInt64:
    """Hash broadcastable integer keys into independent-looking 64-bit integers.

    Args:
        keys: Python integers of any size, or integer arrays, broadcast against each other.

    Returns:
        Integers of the broadcast shape.
    """
    state: UInt64 = np.zeros(1, np.uint64)
    for key in keys:
        part = np.uint64(key & _MASK) if isinstance(key, int) else key.astype(np.uint64)
        state = mix(mix(state) ^ part)
    return state


def random_permutations(keys: UInt64, size: int) -> NDArray[np.int64]:
    """Draw one permutation of ``size`` items for every key.

    Args:
        keys: Shape (...).
        size: Number of items permuted.

    Returns:
        Shape (..., size).
    """
    draws = hash_keys(keys[..., None], np.arange(size))
    return np.argsort(draws, axis=-1, kind="stable")

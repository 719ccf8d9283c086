"""What a backbone has read: keys and values of earlier positions."""

from __future__ import annotations

from torch import Tensor


class KeyValueCache:
    """Keys and values of the positions a backbone has read, so that the next ones need not read them again.

    Attributes:
        length: Number of positions held.
        layers: Keys and values of every layer, (B, G, capacity, E) each.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self.layers: list[tuple[Tensor, Tensor]] = []

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the keys and values, (B, G, n, E), of n new positions; return those of all positions so far."""
        end = self.length + k.shape[2]
        if layer == len(self.layers):
            shape = (*k.shape[:2], self.capacity, k.shape[3])
            self.layers.append((k.new_empty(shape), v.new_empty(shape)))
        keys, values = self.layers[layer]
        keys[:, :, self.length : end], values[:, :, self.length : end] = k, v
        return keys[:, :, :end], values[:, :, :end]

    def select(self, rows: Tensor) -> KeyValueCache:
        """Return a cache of these rows, (n,), of the batch alone."""
        cache = KeyValueCache(self.capacity)
        cache.length = self.length
        for keys, values in self.layers:
            cache.layers.append((self._rows(keys, rows), self._rows(values, rows)))
        return cache

    def _rows(self, held: Tensor, rows: Tensor) -> Tensor:
        chosen = held.new_empty(len(rows), *held.shape[1:])
        # What is not filled yet need not be copied.
        chosen[:, :, : self.length] = held[rows, :, : self.length]
        return chosen

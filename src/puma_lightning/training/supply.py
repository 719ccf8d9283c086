"""Fresh sequences in the memory of the device, where rows take them without the host knowing how many."""

from collections import deque

import torch
from torch import Tensor

from puma_lightning.training.sequences import CleanSequences

STEPS = 64  # that the ring has room for


class DeviceSupply:
    """A ring of clean sequences on the device, topped up as it empties.

    The k-th sequence that enters the batch is the k-th of ``CleanSequences``: what is taken, and in which order, is
    what it is without the ring. How far the rows are is a number on the device. The host knows a bound, which is at
    most B more with each step, and waits only if the ring could run dry by it.

    Args:
        sequences: Where they come from; all of one length.
        batch_size: B, the most that enter in a step.
        length: L.
        device: Where the ring lies.
    """

    def __init__(self, sequences: CleanSequences, batch_size: int, length: int, device: torch.device) -> None:
        self.length = length
        self._sequences = sequences
        self._batch_size = batch_size
        self._room = STEPS * batch_size
        self._ring = {
            "input_ids": torch.zeros(self._room, length, dtype=torch.long, device=device),
            "prompt_mask": torch.zeros(self._room, length, dtype=torch.bool, device=device),
        }
        self._staging = _Staging(device)
        self._taken = torch.zeros((), dtype=torch.long, device=device)
        self._upcoming = torch.arange(batch_size, device=device)
        self._put = 0  # sequences that have been put into the ring
        self._steps = 0  # that may have taken some
        self._known = self._known_at = 0  # how many were taken after how many of these steps
        self._notes: deque[tuple[int, _Note]] = deque()

    def upcoming(self) -> dict[str, Tensor]:
        """Return the next B sequences, (B, L) each, of which any number may be taken; work on the device alone."""
        places = (self._taken + self._upcoming) % self._room
        return {name: rows[places] for name, rows in self._ring.items()}

    def take(self, number: Tensor) -> None:
        """Take the first of them, () int64; work on the device alone."""
        self._taken.add_(number)

    def make_ready(self) -> None:
        """See to it that the next step can take as many as it may.

        Raises:
            OtherLength: If a sequence does not fit; all that were not taken can still be given back.
        """
        self._learn()
        while self._put < self._known + self._batch_size * (self._steps + 1 - self._known_at):
            if self._put + self._batch_size > self._known + self._room:
                self._learn(wait=True)
                continue
            start = self._put % self._room  # a multiple of B, as the room is
            batch = self._sequences.take_ahead(self._batch_size)
            places = {name: rows[start : start + self._batch_size] for name, rows in self._ring.items()}
            if "attention_mask" in batch or batch["input_ids"].shape != places["input_ids"].shape:
                raise OtherLength
            self._staging.upload(batch, places)
            self._put += self._batch_size
        self._steps += 1

    def note(self) -> None:
        """Have the host learn, some time later, how many have been taken by the work that is queued so far."""
        if len(self._notes) < 4:
            self._notes.append((self._steps, _Note(self._taken)))

    def settle(self) -> None:
        """Learn how many have been taken, and count them; the host waits for the device."""
        self._notes.clear()
        self._notes.append((self._steps, _Note(self._taken)))
        self._learn(wait=True)

    def _learn(self, wait: bool = False) -> None:
        if wait and not self._notes:
            self._notes.append((self._steps, _Note(self._taken)))
        while self._notes and (wait or self._notes[0][1].arrived):
            self._known_at, note = self._notes.popleft()
            number = note.value()
            self._sequences.settle(number - self._known)
            self._known, wait = number, False


class OtherLength(Exception):
    """A sequence of another length has come, or one with padding."""


class _Note:
    """A number on the device, as it is after the work that is queued so far."""

    def __init__(self, number: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if number.is_cuda:
            self._copy = number.to("cpu", non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(number.device))
        else:
            self._copy = number.clone()

    @property
    def arrived(self) -> bool:
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def value(self) -> int:
        if self._event is not None:
            self._event.synchronize()
        return int(self._copy)


class _Staging:
    """Copies rows to a device by way of pinned memory that is allocated once: allocating it anew would wait."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._used: deque[tuple[dict[str, Tensor], torch.cuda.Event]] = deque()

    def upload(self, rows: dict[str, Tensor], to: dict[str, Tensor]) -> None:
        """Copy rows, on the CPU, to the place of as many on the device, in the order of what is queued there."""
        if self._device.type != "cuda":
            for name, place in to.items():
                place.copy_(rows[name])
            return
        if self._used and self._used[0][1].query():  # type: ignore[no-untyped-call]
            pinned, copied = self._used.popleft()
        else:
            pinned = {name: torch.empty_like(rows[name], pin_memory=True) for name in to}
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        for name, place in to.items():
            pinned[name].copy_(rows[name])
            place.copy_(pinned[name], non_blocking=True)
        copied.record(torch.cuda.current_stream(self._device))
        self._used.append((pinned, copied))

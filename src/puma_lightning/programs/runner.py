"""Runs many programs at once, each in a process of its own.

The pool is a thread for each worker process over ``subprocess``. Pebble and ``concurrent.futures`` pickle results,
which a hostile program could turn into code in the trainer, and their processes are copies of the trainer or import
its main module; here a worker is a bare Python that inherits nothing and answers in plain text.
"""

import contextlib
import os
import platform
import queue
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from puma_lightning.programs.extraction import MAX_CHARS, cut_at_end_token
from puma_lightning.programs.worker import ARCHITECTURES, FLAGS, START

Outcome = Literal["ok", "unparsable", "crashed", "timed_out"]
_WORKER = Path(__file__).with_name("worker.py")
_GRACE = START + 10.0  # seconds beyond the wall limit after which a worker itself is given up
_PATIENCE = 5.0  # seconds that a worker may take to end
_LONGEST_ANSWER = 1 << 16  # bytes; a worker writes far less
_KEPT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME")  # what some builds of Python need to start
_PER_WORKER = 8  # programs that make another worker worth its start


@dataclass(frozen=True)
class ProgramRun:
    """What became of one program.

    Args:
        outcome: ``ok``: returned a value. ``unparsable``: does not parse, or has no ``simple_math_problem``.
            ``crashed``: raised, died, did what is forbidden or broke a limit other than time. ``timed_out``.
        result: The value of an ``ok`` one, a string of at most 500 characters if it is neither int nor float;
            for objects that are no number it only names the type, because their repr is code of the program.
        error: Why it crashed.
    """

    outcome: Outcome
    result: int | float | str | None = None
    error: str = ""


def default_workers(ranks: int = 1) -> int:
    """Return how many cores a rank has, at most 8: those of this process, shared by ``LOCAL_WORLD_SIZE`` ranks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, max(1, cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or ranks))))


def check_filter(unsafe_without_filter: bool = False) -> None:
    """Refuse to run programs where no filter of system calls can hold them, unless that is asked for.

    Raises:
        ValueError: If this is not Linux on x86_64 or aarch64.
    """
    here = f"{sys.platform} on {platform.machine()}"
    if not unsafe_without_filter and (sys.platform != "linux" or platform.machine() not in ARCHITECTURES):
        raise ValueError(
            f"programs: expected Linux on {' or '.join(ARCHITECTURES)}, whose kernel keeps a program from files and "
            f"network, got {here}; run them there, or set unsafe_without_filter=True where nothing can be harmed"
        )


def run_programs(
    texts: Sequence[str],
    timeout: float = 2.0,
    memory_mb: int = 256,
    workers: int | None = None,
    unsafe_without_filter: bool = False,
) -> list[ProgramRun]:
    """Find the program in each generated text (see ``extract_program``) and run it in isolation.

    Nothing is left of a program for the next one. All processes end with the call.

    Args:
        texts: What the model wrote.
        timeout: Seconds a program may take.
        memory_mb: MiB of address space a program may use.
        workers: Programs at a time; None for ``default_workers``.
        unsafe_without_filter: Run programs though no filter of system calls holds them. What is left keeps out what a
            model writes by mistake, not what is written to break out.

    Returns:
        As many results, in order.

    Raises:
        ValueError: If the system has no such filter (see ``check_filter``).
        RuntimeError: If workers cannot be started, or the kernel refuses the filter.
    """
    check_filter(unsafe_without_filter)
    runs: list[ProgramRun] = [ProgramRun("unparsable")] * len(texts)
    jobs: queue.SimpleQueue[tuple[int, bytes]] = queue.SimpleQueue()
    for i, text in enumerate(texts):
        text = cut_at_end_token(text)
        if len(text) <= MAX_CHARS and "def " in text:
            jobs.put((i, text.encode("utf-8", "replace")))
    pending = jobs.qsize()
    if not pending:
        return runs
    done: queue.SimpleQueue[tuple[int, ProgramRun] | RuntimeError] = queue.SimpleQueue()
    count = min(workers or default_workers(), -(-pending // _PER_WORKER))
    with tempfile.TemporaryDirectory(prefix="programs-") as folder:
        limits = (str(timeout), str(memory_mb), "unfiltered" if unsafe_without_filter else "filtered")
        lanes = [_Lane(jobs, done, folder, timeout, limits) for _ in range(count)]
        try:
            for lane in lanes:
                lane.start()
            for _ in tqdm(range(pending), "programs", unit="program", delay=3):
                finished = done.get()
                if isinstance(finished, RuntimeError):
                    raise finished
                runs[finished[0]] = finished[1]
        finally:
            for lane in lanes:
                lane.close()
            for lane in lanes:
                lane.join()
    return runs


class _Lane(threading.Thread):
    """A worker process and the thread that talks to it."""

    def __init__(
        self,
        jobs: "queue.SimpleQueue[tuple[int, bytes]]",
        done: "queue.SimpleQueue[tuple[int, ProgramRun] | RuntimeError]",
        folder: str,
        timeout: float,
        limits: tuple[str, ...],
    ) -> None:
        super().__init__(daemon=True)
        self.jobs, self.done, self.folder = jobs, done, folder
        self.timeout, self.limits = timeout, limits
        self.lock = threading.Lock()  # close() comes from another thread
        self.closed = False
        self.process: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        try:
            while not self.closed:
                try:
                    i, source = self.jobs.get_nowait()
                except queue.Empty:
                    break
                self.done.put((i, self._judge(source)))
        except Exception as error:  # whatever it is, somebody waits for an answer
            words = str(error) if isinstance(error, RuntimeError) else f"programs: {type(error).__name__}: {error}"
            self.done.put(RuntimeError(words))
        finally:
            self._end_worker()

    def close(self) -> None:
        """End the worker, whatever it is doing; its programs die with it."""
        with self.lock:
            self.closed = True
            if self.process is not None:
                self.process.terminate()

    def _judge(self, source: bytes) -> ProgramRun:
        worker = self.process or self._start_worker()
        watchdog = threading.Timer(self.timeout + _GRACE, worker.kill)
        watchdog.start()
        try:
            answer = _ask(worker, source)
        finally:
            watchdog.cancel()
        if answer is None:  # killed by the system, for want of memory perhaps: the next program gets a new one
            self._end_worker()
            return ProgramRun("crashed", error="its worker process died")
        if answer.startswith(b"failed "):
            words = answer.removeprefix(b"failed ").decode(errors="replace")
            raise RuntimeError(
                f"programs: expected to be run, got a system that refuses: {words}; check that disk, processes and "
                "memory are left"
            )
        return _read_answer(answer.decode("utf-8", "replace"))

    def _start_worker(self) -> "subprocess.Popen[bytes]":
        if not sys.executable or not hasattr(os, "fork"):
            raise RuntimeError("programs need a Python executable on a system with fork(): run them on Linux or macOS")
        kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
        with self.lock:
            if self.closed:
                raise RuntimeError("closed")
            self.process = subprocess.Popen(
                [sys.executable, *FLAGS, str(_WORKER), *self.limits],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=self.folder,
                env={**kept, "PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "TZ": "UTC0"}, start_new_session=True,
            )  # fmt: skip
        if (answer := _receive(self.process)) != b"ready":
            self.process.kill()
            assert self.process.stderr is not None
            words = (answer or self.process.stderr.read()).decode(errors="replace")[-2000:]
            raise RuntimeError(
                f"programs: expected a process that can be locked in, got: {words}; check that {sys.executable} runs, "
                "that processes and memory are left and that this system allows filters of system calls (seccomp)"
            )
        return self.process

    def _end_worker(self) -> None:
        with self.lock:
            worker, self.process = self.process, None
        if worker is not None:
            worker.terminate()  # it takes its program with it
            try:
                worker.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                worker.kill()
            for pipe in (worker.stdin, worker.stdout, worker.stderr):
                assert pipe is not None
                with contextlib.suppress(OSError):  # an unsent rest of a request
                    pipe.close()
            worker.wait()


def _ask(worker: "subprocess.Popen[bytes]", source: bytes) -> bytes | None:
    assert worker.stdin is not None
    try:
        worker.stdin.write(struct.pack("<I", len(source)) + source)
        worker.stdin.flush()
    except OSError:
        return None
    return _receive(worker)


def _receive(worker: "subprocess.Popen[bytes]") -> bytes | None:
    assert worker.stdout is not None
    header = worker.stdout.read(4)
    if len(header) < 4:
        return None
    size = min(struct.unpack("<I", header)[0], _LONGEST_ANSWER)
    answer = worker.stdout.read(size)
    return answer if len(answer) == size else None


def _read_answer(answer: str) -> ProgramRun:
    """Turn a worker's words into a result; words that no worker would write are a crash."""
    outcome, _, rest = answer.partition(" ")
    if outcome == "unparsable":
        return ProgramRun("unparsable")
    if outcome == "timed_out":
        return ProgramRun("timed_out")
    if outcome != "ok":
        return ProgramRun("crashed", error=rest)
    kind, _, value = rest.partition(" ")
    try:
        if kind == "int":
            return ProgramRun("ok", int(value, 16))
        if kind == "float":
            return ProgramRun("ok", float.fromhex(value))
    except (ValueError, OverflowError):
        return ProgramRun("crashed", error="its result could not be read")
    return ProgramRun("ok", value if kind == "str" else f"<{value}>")

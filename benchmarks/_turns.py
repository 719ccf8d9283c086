"""The sides of a comparison, run in turn: times, ratios, and the peak memory of each in a process of its own."""

import json
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm


def in_turn(
    sides: Mapping[str, Callable[[], object]], rounds: int, label: str, device: str = "cpu", warmup: int = 0
) -> dict[str, Any]:
    """Wall and processor time of the sides, in random order within every round; the first side is ours.

    Returns:
        ``compared``.
    """
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    order, shuffled = list(sides), random.Random(0)
    for done in tqdm(range(-warmup, rounds), desc=label, mininterval=1):
        shuffled.shuffle(order)
        for name in order:
            seconds, cpu_seconds = timed(sides[name], device)
            if done >= 0:
                wall[name].append(seconds)
                cpu[name].append(cpu_seconds)
    return compared(wall, cpu)


def timed(run: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds of wall time and of processor time."""
    synchronise(device)
    start, start_cpu = time.perf_counter(), time.process_time()
    run()
    synchronise(device)
    return time.perf_counter() - start, time.process_time() - start_cpu


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def compared(wall: Mapping[str, list[float]], cpu: Mapping[str, list[float]]) -> dict[str, Any]:
    """Times of all sides, and how many times as fast as each other side the first one is."""
    ours, *others = wall
    return {
        "seconds": {name: spread(values) for name, values in wall.items()},
        "cpu_seconds": {name: spread(values) for name, values in cpu.items()},
        "times_as_fast": {
            name: {"wall": ratios(wall[name], wall[ours]), "cpu": ratios(cpu[name], cpu[ours])} for name in others
        },
    }


def ratios(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """Spread of the medians, and round by round."""
    by_round = [a / b for a, b in zip(slow, fast, strict=True)]
    return {"of_medians": round(statistics.median(slow) / statistics.median(fast), 3), **spread(by_round)}


def spread(values: Sequence[float]) -> dict[str, float]:
    named = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, 6) for name, value in named.items()}


def peak_memory_of(side: str) -> dict[str, float]:
    """This script again, which is to print ``peak_memory`` when it is given ``--memory-of SIDE``."""
    words = [sys.executable, *sys.argv, "--memory-of", side]  # argv[0] is the script
    child = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(child.stdout.splitlines()[-1])
    print(f"peak memory, {side}: {found}", flush=True)
    return found


def peak_memory(run: Callable[[], object], device: str = "cpu") -> dict[str, float]:
    """Memory of this process, which should have done nothing else: in all, and above what was there before the run."""
    if device == "cpu":
        forget = Path("/proc/self/clear_refs")
        if forget.exists():
            forget.write_text("5")  # the peak so far, which may be of memory that is free again
        before = resident_peak()
        run()
        peak = resident_peak()
    else:
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        peak = torch.cuda.max_memory_allocated(device)
    return {"total_gb": round(peak / 1e9, 3), "working_gb": round((peak - before) / 1e9, 3)}


def resident_peak() -> int:
    """Bytes this process has had in memory at its peak."""
    status = Path("/proc/self/status")
    if status.exists():
        # Unlike ru_maxrss without that of the process it was started from.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def print_table(measured: Mapping[str, Any], memory: Mapping[str, Mapping[str, float]] | None = None) -> None:
    """A line for each side."""
    print(f"{'':14}{'median':>10}{'min':>10}{'max':>10}{'processor':>11}{'ratio':>8}{'processor':>11}{'memory':>10}")
    for side, times in measured["seconds"].items():
        cpu = measured["cpu_seconds"][side]["median"]
        ratio = measured["times_as_fast"].get(side, {name: {"of_medians": 1.0} for name in ("wall", "cpu")})
        gb = f"{memory[side]['working_gb']:7.2f} GB" if memory else ""
        print(
            f"{side:14}{times['median']:9.3f}s{times['min']:9.3f}s{times['max']:9.3f}s{cpu:10.3f}s"
            f"{ratio['wall']['of_medians']:8.2f}{ratio['cpu']['of_medians']:11.2f}{gb:>10}"
        )

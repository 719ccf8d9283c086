"""A trial: a run left alone, and the same run stopped at random and resumed, whose every number must be the same."""

import faulthandler
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from puma_lightning.training.checkpoints import load_checkpoint
from tests.soak.configs import NUMBERED, Config
from tests.soak.dealt import compare_passes, random_processes
from tests.soak.run import POISONED, contents, train

GRACE = 10.0  # seconds within which a run that is asked to end must have ended
LIMIT = 60.0  # seconds after which a run that nobody disturbed is said to hang
ENDS = ("chains 0", "end 0")
# All: to the workers of loaders too, as a scheduler or a terminal sends it.
WAYS = (
    *("kill", "kill in a save", "term", "term all", "interrupt", "interrupt all"),
    *("kill one", "term one", "interrupt one", "poison"),
)
DAMAGES = 4  # copies of the last checkpoint in each of which a bit is flipped
ASKED = {signal.SIGTERM: 143, signal.SIGINT: 130}  # what a run exits with that ended as it was asked to


@dataclass
class Trial:
    """What became of a run.

    Attributes:
        config: What ran.
        kills: Which way it was stopped each time, and what came of it.
        wrong: What should not have been, in words; empty if all was right.
        unlike: What differed from the run that was left alone.
        damaged: How many damaged checkpoints were refused, and in how many nothing that is read had changed.
        passes: Of a run in different numbers of processes, how many passes were looked at as a whole.
    """

    config: Config
    kills: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    unlike: list[str] = field(default_factory=list)
    damaged: dict[str, int] = field(default_factory=dict)
    passes: int = 0


class Run:
    """A run in processes of its own, forked from this one, which has imported everything."""

    def __init__(
        self, config: Config, folder: Path, shared: Path, ckpt: Path | None, poison: int | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.config, self.folder = config, folder
        self.said = {path.name: path.stat().st_size for path in folder.glob("output.*.txt")}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.living = {}
        self.codes: dict[int, int] = {}
        self.group = 0  # of the processes of this run
        for rank in range(config["processes"]):
            pid = os.fork()
            if not pid:
                _child(config, folder, shared, ckpt, rank, port, poison)
            self.group = self.group or pid
            os.setpgid(pid, self.group)
            self.living[rank] = pid

    def poll(self) -> bool:
        """Return whether all processes have ended."""
        for rank, pid in list(self.living.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.codes[rank] = os.waitstatus_to_exitcode(status)
                del self.living[rank]
        return not self.living

    def wait(self, seconds: float) -> bool:
        """Wait for the end, and return whether it came in time."""
        end = time.monotonic() + seconds
        while not self.poll():
            if time.monotonic() > end:
                return False
            time.sleep(0.005)
        return True

    def send_to_all(self, number: int) -> None:
        """Send a signal to all processes of the run and to those that they have started."""
        with suppress(ProcessLookupError):
            os.killpg(self.group, number)

    def send(self, number: int, ranks: list[int] | None = None) -> None:
        """Send a signal to some ranks, or to all."""
        for rank, pid in self.living.items():
            if ranks is None or rank in ranks:
                os.kill(pid, number)

    def heard(self, ranks: list[int], words: str = "saving after this batch") -> list[bool]:
        """Return whether processes said something; that it was asked to end one can say only while it trains."""
        paths = [self.folder / f"output.{rank}.txt" for rank in ranks]
        texts = [path.read_bytes()[self.said.get(path.name, 0) :] if path.exists() else b"" for path in paths]
        return [words.encode() in text for text in texts]

    def kill(self) -> None:
        """End what is left, and have it say where it was."""
        self.send(signal.SIGUSR2)
        time.sleep(0.5)
        self.send(signal.SIGKILL)
        self.wait(GRACE)


def _child(
    config: Config, folder: Path, shared: Path, ckpt: Path | None, rank: int, port: int, poison: int | None
) -> None:
    code = 1
    try:
        log = os.open(folder / f"output.{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.register(signal.SIGUSR2, all_threads=True)  # where a run hangs, for its output
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if config["processes"] > 1:
            os.environ |= {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "LOCAL_RANK": str(rank),
                "NODE_RANK": "0",
                "WORLD_SIZE": str(config["processes"]),
            }
        train(config, folder, shared, ckpt, rank, poison)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def trial(
    config: Config, rng: random.Random, folder: Path, shared: Path, max_kills: int = 3, ways: tuple[str, ...] = WAYS
) -> Trial:
    """Run a config twice, once left alone and once stopped in some of the ways, and compare."""
    result = Trial(config)
    begun = time.monotonic()
    alone = Run(config | {"steps_per_execution": 1, "captured": False}, folder / "alone", shared, None)
    if not alone.wait(LIMIT) or any(alone.codes.values()):
        alone.kill()
        result.wrong.append(f"left alone it ended with {alone.codes}")
        return result
    duration = time.monotonic() - begun
    weights = {"kill": 3, "term": 2}
    numbered = config["data"] in NUMBERED
    for kills_left in range(rng.randint(1, max_kills), -1, -1):
        if numbered:
            config = random_processes(config, rng, run=max_kills - kills_left)
        now = config | {
            "steps_per_execution": rng.choice([1, config["steps_per_execution"]]),
            "captured": rng.choice([False, config["captured"]]),
        }
        possible = [way for way in ways if config["processes"] > 1 or not way.endswith("one")] or ["kill"]
        ckpt = _checkpoint(folder / "killed", rng)
        way = rng.choices(possible, [weights.get(way, 1) for way in possible])[0] if kills_left else ""
        poison = rng.randrange(_batches(folder / "alone")) if way == "poison" else None
        run = Run(now, folder / "killed", shared, ckpt, poison)
        if way == "poison":
            _expect_a_stop(run, result)
        elif way:
            _disturb(run, way, rng, duration, result)
        elif not run.wait(LIMIT):
            result.wrong.append("the last resume hung")
            run.kill()
        done = run.codes and not any(run.codes.values())
        if done or (not kills_left):
            if not done:
                result.wrong.append(f"the last resume, from {ckpt}, ended with {run.codes}")
            break
    if numbered:
        for part in (folder / "alone", folder / "killed"):
            unlike, result.passes = compare_passes(part, config["num_train"])
            result.unlike += unlike
    else:
        result.unlike = _compare(folder / "alone", folder / "killed", config["processes"])
    _in_a_fork(lambda: _look_at_checkpoints(folder / "killed", rng, result))
    if (found := folder / "killed" / "checkpoints.json").exists():
        wrong, result.damaged = json.loads(found.read_text())
        result.wrong += wrong
    else:
        result.wrong.append("its checkpoints could not be looked at")
    return result


def _in_a_fork(do: Callable[[], None]) -> None:
    """Do what may start threads, which this process must not have when it forks."""
    pid = os.fork()
    if not pid:
        try:
            do()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def _look_at_checkpoints(folder: Path, rng: random.Random, result: Trial) -> None:
    """Look for numbers that are not finite, and for damage that is not seen."""
    wrong, damaged = [], {"refused": 0, "harmless": 0}
    paths = sorted([*(folder / "checkpoints").glob("*.ckpt"), *(folder / "best").glob("*.ckpt")])
    for path in paths:
        if "nan" in (whole := contents(load_checkpoint(path)))[1]:
            wrong.append(f"{path.name} is not finite: {whole[1]}")
    for number in range(DAMAGES if paths else 0):
        path = rng.choice(paths)
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        copy = folder / f"damaged-{number}.ckpt"
        copy.write_bytes(data)
        try:
            same = contents(load_checkpoint(copy)) == contents(load_checkpoint(path))
        except ValueError:
            damaged["refused"] += 1
        else:
            damaged["harmless"] += same
            if not same:
                wrong.append(f"{copy.name}, a damaged copy of {path.name}, was read")
    (folder / "checkpoints.json").write_text(json.dumps([wrong, damaged]))


def _batches(folder: Path) -> int:
    """Return how many batches a run took."""
    return 1 + max(line["at"] for lines in _lines(folder / "records.0.jsonl").values() for line in lines)


def _expect_a_stop(run: Run, result: Trial) -> None:
    """Wait for a run whose gradients become NaN."""
    in_time = run.wait(LIMIT)
    poisoned = any(run.heard([0], POISONED))
    result.kills.append(f"poison: {run.codes}" if poisoned else "poison: too late")
    if not in_time:
        result.wrong.append("poisoned, it hung")
        run.kill()
    elif poisoned and not all(code == 1 for code in run.codes.values()):
        result.wrong.append(f"poisoned, it ended with {run.codes}")


def _disturb(run: Run, way: str, rng: random.Random, duration: float, result: Trial) -> None:
    """Stop a run at a random moment."""
    if way == "kill in a save":
        folders = [run.folder / "checkpoints", run.folder / "best"]
        saves = rng.randint(1, 4)
        seen: set[str] = set()
        end = time.monotonic() + 3 * duration
        while not run.poll() and time.monotonic() < end:
            seen |= {name for part in folders if part.is_dir() for name in os.listdir(part) if name.endswith(".part")}
            if len(seen) >= saves:
                break
    else:
        run.wait(rng.uniform(0, duration))
    if run.poll():
        result.kills.append(f"{way}: too late")
        if any(run.codes.values()):
            result.wrong.append(f"ended by itself with {run.codes}")
        return
    number = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "inte": signal.SIGINT}[way[:4]]
    ranks = sorted(run.living)
    whom = [rng.choice(ranks)] if way.endswith("one") else ranks
    begun = time.monotonic()
    if way.endswith("all"):
        run.send_to_all(number)
    else:
        run.send(number, whom)
    in_time = run.wait(GRACE)
    said = f"{way}: {time.monotonic() - begun:.1f} s, {run.codes}"
    result.kills.append(said)
    # One that had not begun to train is gone, the others wait for it. Whatever started them would end them.
    unready = any(run.codes.get(rank) and not heard for rank, heard in zip(whom, run.heard(whom), strict=True))
    if not in_time and unready:
        run.kill()
    elif not in_time:
        result.wrong.append(f"not ended after {GRACE:.0f} s: {said}, of {len(ranks)}")
        run.kill()
    elif number in ASKED and any(code not in _right_codes(run, number, unready) for code in run.codes.values()):
        result.wrong.append(f"exit code: {said}")


def _right_codes(run: Run, number: int, unready: bool) -> tuple[int, ...]:
    """Return what processes may exit with that were asked to end: while they train, or before, by the signal itself."""
    if not unready:
        return (0, ASKED[number])
    before = (1, -number) if number == signal.SIGINT else (-number,)  # Ctrl-C is an exception there
    # The others lose the one that is gone.
    return (0, *before) if run.config["processes"] == 1 else (0, 1, ASKED[number], *before)


def _checkpoint(folder: Path, rng: random.Random) -> Path | None:
    """Return what to go on from: the last checkpoint as a rule, sometimes another one."""
    last = sorted((folder / "checkpoints").glob("last*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    others = [*(folder / "checkpoints").glob("step*.ckpt"), *(folder / "best").glob("*.ckpt")]
    if others and (not last or rng.random() < 0.2):
        return rng.choice(sorted(others))
    return last[-1] if last else None


def _lines(path: Path) -> dict[str, list[dict]]:
    lines: dict[str, list[dict]] = {}
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # the line that a kill cut short
        lines.setdefault(f"{line['kind']} {line['at']}", []).append(line)
    return lines


def _last_batch(lines: dict[str, list[dict]]) -> str:
    """Return the key of the last batch."""
    return max((key for key in lines if key.startswith("batch ")), key=lambda key: lines[key][0]["at"])


def _compare(alone: Path, killed: Path, processes: int) -> list[str]:
    """Say what a killed run computed otherwise, or left out."""
    unlike = []
    for rank in range(processes):
        expected = _lines(alone / f"records.{rank}.jsonl")
        found = _lines(killed / f"records.{rank}.jsonl")
        if _last_batch(expected) in found:  # a run that is resumed when it is over does not say again what it led to
            ends = {*ENDS, _last_batch(expected).replace("batch", "validation")}
            expected = {key: lines for key, lines in expected.items() if key in found or key not in ends}
        unlike += [f"rank {rank}: {key} is missing" for key in expected if key not in found]
        unlike += [f"rank {rank}: {key} is new" for key in found if key not in expected]
        for key, lines in found.items():
            unlike += [
                f"rank {rank}: {key}: {line} instead of {expected[key][0]}"
                for line in lines
                if key in expected and line != expected[key][0]
            ]
    return unlike


def clean(folder: Path) -> None:
    """Delete what a trial left."""
    shutil.rmtree(folder, ignore_errors=True)

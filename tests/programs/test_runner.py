"""Hostile programs are wrong, cost no more than their limits, and change nothing outside their process."""

import gc
import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from puma_lightning.data.word_problems.generate import make_problems
from puma_lightning.programs import parse_number, run_programs, same_number
from puma_lightning.programs import runner as runner_module
from puma_lightning.programs.extraction import MODULES


def beside(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ATTACKS = beside("attacks").ATTACKS
hostile = beside("hostile")

GOOD = "def simple_math_problem():\n    return 6 * 7\n"
PROGRAMS = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train_programs.jsonl"
WORKER = Path(runner_module.__file__).with_name("worker.py")


def body(*lines: str) -> str:
    return "def simple_math_problem():\n" + "".join(f"    {line}\n" for line in lines)


def workers_alive() -> list[str]:
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            commands.append(path.read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return [command for command in commands if str(WORKER) in command]


def surroundings() -> tuple[dict[str, str], str, int]:
    """Environment, folder and number of open files of this process."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    return environment, os.getcwd(), len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0


@pytest.fixture
def nothing_changes(tmp_path, monkeypatch):
    """The process, its folder and /tmp/sentinel are afterwards as they were."""
    monkeypatch.chdir(tmp_path)
    sentinels = [Path("/tmp/sentinel"), tmp_path / "sentinel"]
    gc.collect()  # what earlier tests left may hold files open
    before = surroundings()
    yield
    gc.collect()
    assert surroundings() == before
    assert not any(path.exists() for path in sentinels)
    assert not workers_alive()


def test_there_are_enough_attacks() -> None:
    assert len(ATTACKS) >= 100


def test_every_attack_fails(nothing_changes) -> None:
    names = list(ATTACKS)
    texts = [text for name in names for text in (ATTACKS[name], GOOD)]
    start = time.monotonic()
    runs = run_programs(texts, timeout=0.5, memory_mb=128, workers=2)
    assert time.monotonic() - start < 60
    assert [run.result for run in runs[1::2]] == [42] * len(names)  # and the pool went on
    right = {name: run for name, run in zip(names, runs[::2], strict=True) if same_number(run.result, 42)}
    assert not right
    assert all(len(str(run.result)) < 2000 and len(run.error) < 2000 for run in runs)


def test_every_combination_fails(nothing_changes) -> None:
    """Each thing to try, in each way to hide it, beside good programs, which are all judged right."""
    programs = hostile.programs(200)
    assert len(programs) == 200
    assert {way for way in hostile.HIDE} == {name.split(", ")[-1] for name in programs}
    runs = run_programs([text for program in programs.values() for text in (program, GOOD)], 0.5, 128, workers=2)
    assert [run.result for run in runs[1::2]] == [42] * len(programs)
    assert not [name for name, run in zip(programs, runs[::2], strict=True) if same_number(run.result, 42)]


def test_mutated_programs_fail(nothing_changes) -> None:
    draw = random.Random(0)
    problems = make_problems(60, 0, "test")
    texts = [text for p in problems for text in (hostile.mutated(p["code"], draw), p["code"])]
    runs = run_programs(texts, timeout=0.5, memory_mb=128, workers=2)
    golds = [parse_number(problem["answer"]) for problem in problems]
    assert all(same_number(run.result, gold) for run, gold in zip(runs[1::2], golds, strict=True))
    assert not any(same_number(run.result, hostile.REACHED) for run in runs)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_ten_thousand_programs_leave_nothing_behind(nothing_changes, tmp_path: Path, monkeypatch) -> None:
    def memory() -> int:
        gc.collect()
        return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    monkeypatch.setattr(runner_module.tempfile, "tempdir", str(tmp_path))
    draw = random.Random(1)
    problems = make_problems(4000, 1, "test")
    bad = [*hostile.programs(600).values(), *ATTACKS.values()]
    good = [(problem["code"], parse_number(problem["answer"])) for problem in problems]
    texts = [draw.choice(good) for _ in range(9000)]
    texts += [(text, None) for text in (draw.choice(bad) for _ in range(500))]
    texts += [(hostile.mutated(draw.choice(good)[0], draw), None) for _ in range(500)]
    draw.shuffle(texts)
    run_programs([text for text, _ in texts[:100]], 0.5, 128)
    before = memory()
    runs = run_programs([text for text, _ in texts], timeout=0.5, memory_mb=128)
    wrong = [run for run, (_, gold) in zip(runs, texts, strict=True) if gold is not None and run.result != gold]
    assert not wrong
    assert memory() - before < 16 << 10
    assert not list(tmp_path.iterdir())


def test_attacks_end_as_they_should() -> None:
    names = ["loop catching everything", "str bomb", "os._exit", "smuggled os.write", "gi_frame", "empty", "null byte"]
    runs = run_programs([ATTACKS[name] for name in names], timeout=0.5, memory_mb=128)
    outcomes = {name: run.outcome for name, run in zip(names, runs, strict=True)}
    assert outcomes == {
        "loop catching everything": "timed_out",
        "str bomb": "crashed",
        "os._exit": "crashed",
        "smuggled os.write": "crashed",
        "gi_frame": "crashed",
        "empty": "unparsable",
        "null byte": "unparsable",
    }
    assert "forbidden: import os" in runs[2].error and "forbidden" in runs[4].error


@pytest.mark.parametrize(
    ("lines", "result"),
    [
        (["return 42"], 42),
        (["return 41.5 + 0.5"], 42.0),
        (["return '$1,234'"], "$1,234"),
        (["from fractions import Fraction", "return Fraction(85, 2)"], 42.5),
        (["from decimal import Decimal", "return Decimal('42.5')"], 42.5),
        (["from collections import namedtuple", "return namedtuple('P', 'x')(42).x"], 42),
        (["from datetime import datetime", "return datetime.strptime('2024-03-02', '%Y-%m-%d').day"], 2),
        (["from datetime import date", "return int(date.today().year > 2000)"], 1),
        (["from dataclasses import dataclass", "@dataclass", "class A:", "    x: int", "return A(42).x"], 42),
        (["from enum import Enum", "return Enum('E', 'a b').b.value"], 2),
        (["from typing import NamedTuple, List", "class A(NamedTuple):", "    x: int", "return A(42).x"], 42),
        (["import statistics, math, re", "return math.comb(5, 2) + statistics.mean([1, 3])"], 12),
        (["import functools", "@functools.lru_cache(None)", "def f(n):",
          "    return n if n < 2 else f(n - 1) + f(n - 2)", "print('working')", "return f(50)"], 12586269025),
        (["return 42 if 1 is 1 else 0"], 42),  # a SyntaxWarning
        (["import copy", "class A:", "    x = 41", "a = copy.deepcopy(A())", "a.x += 1", "return copy.copy(a).x"], 42),
        (["import functools", "@functools.singledispatch", "def f(x): return 0", "@f.register",
          "def _(x: int): return x + 1", "return f(41)"], 42),
        (["class A: pass", "class B:", "    x = 42", "a = A()", "a.__class__ = B", "return a.x"], 42),
        (["import collections", "return collections.Counter('abracadabra').most_common(1)[0][1]"], 5),
        (["import calendar", "return calendar.monthrange(2024, 2)[1]"], 29),
        (["try:", "    import numpy", "except ImportError:", "    numpy = 42", "return numpy"], 42),
        (["import random, string", "return len(random.choice(string.ascii_letters)) + 41"], 42),
        (["import bisect, heapq, operator, cmath, numbers, itertools", "return bisect.bisect([1, 2], 1)"], 1),
        (["return {1: 42}"], "<dict>"),
        (["return '\\d'"], "\\d"),
    ],
)  # fmt: skip
def test_ordinary_programs(lines: list[str], result: object) -> None:
    (run,) = run_programs([body(*lines)])
    assert (run.outcome, run.result) == ("ok", result), run.error
    assert type(run.result) is type(result)


def test_a_program_finds_no_trace_of_the_one_before(nothing_changes) -> None:
    leave = body("import math, typing", "math.pi = 3", "print.__self__.len = None", "typing.left = 1", "return math.pi")
    look = body("import math, typing", "return len([hasattr(typing, 'left'), math.pi == 3].__repr__())")
    runs = run_programs([leave, look] * 4, workers=1)
    assert [run.result for run in runs] == [3, len("[False, False]")] * 4


def test_memory_is_limited() -> None:
    take = body("return len(bytearray(300 << 20))")
    (within,), (beyond,) = (run_programs([take], memory_mb=memory) for memory in (1024, 128))
    assert within.result == 300 << 20
    assert beyond.outcome == "crashed" and "MemoryError" in beyond.error


def test_patched_builtins_do_not_reach_the_harness() -> None:
    runs = run_programs([ATTACKS["patched builtins"], ATTACKS["patched __builtins__"], ATTACKS["patched random"]])
    assert [(run.outcome, run.result) for run in runs] == [("ok", 41)] * 3


def test_no_harmful_module_is_left() -> None:
    """Some of their functions raise no audit event, so only their absence stops them."""
    look = body(
        "found = []",
        "for c in object.__subclasses__():",
        "    for f in list(vars(c).values()):",
        "        if type(f) is type(lambda: 0):",
        "            for v in f.__globals__.values():",
        "                if type(v) is type(f.__globals__.get('_os', 0)):",
        "                    found += [v.__name__ for name in ('write', 'dup2', 'alarm') if hasattr(v, name)]",
        "import typing",
        "found += [n for n in ('os', 'posix', 'signal', 'gc', '_imp', '__main__') if n in typing.sys.modules]",
        "return ' '.join(found)",
    )
    (run,) = run_programs([look])
    assert (run.outcome, run.result) == ("ok", ""), run


def test_results_are_repeatable() -> None:
    draw = body("import random", "return f'{random.random()} {hash(0.5)} {hash(\"a\")}'")
    assert len({run.result for run in run_programs([draw] * 20, workers=2)}) == 1


# Types that read or write memory, call native code or come from a module that does.
WALK = """
found, seen, pending = [], set(), [object]
while pending:
    for c in type.__subclasses__(pending.pop()):
        if c not in seen:
            seen.add(c)
            pending.append(c)
            if c.__module__.split('.')[0] in ('ctypes', '_ctypes', 'mmap', '_cffi_backend', '_multiprocessing') or (
                any(hasattr(c, name) for name in ('from_address', 'from_buffer', 'in_dll', 'from_param'))
            ):
                found.append(c.__name__)
found = f"{len(seen) > 100} {' '.join(sorted(set(found)))}"
"""


def test_no_type_that_reaches_memory_can_be_found() -> None:
    imports = "\n".join(f"import {name}" for name in importable())
    (run,) = run_programs([f"{imports}\ndef simple_math_problem():\n{indented(WALK)}    return found\n"])
    assert (run.outcome, run.result) == ("ok", "True "), run
    elsewhere = subprocess.check_output([sys.executable, "-c", f"import ctypes\n{WALK}print(found)"], text=True)
    assert "_SimpleCData" in elsewhere and "_Pointer" in elsewhere  # where there are some, it finds them


def importable() -> list[str]:
    """All that a program may import."""
    return [name for name in MODULES if name != "__future__"]


def indented(source: str) -> str:
    return "".join(f"    {line}\n" for line in source.strip().split("\n"))


@pytest.mark.skipif(sys.platform != "linux", reason="filters of system calls are of Linux")
@pytest.mark.parametrize(
    "call",
    ["os.fork()", "os.kill(os.getpid(), 0)", "os.execv('/bin/true', ['true'])", "socket.socket()", "os.unlink('x')",
     "os.mkdir('x')", "os.rename('x', 'y')", "os.chmod('.', 0o700)", "os.symlink('x', 'y')", "os.truncate('x', 0)",
     "os.open('x', os.O_WRONLY)", "os.open('x', os.O_RDWR)", "os.open('.', os.O_CREAT)", "os.open('x', os.O_TRUNC)",
     "os.pipe()", "os.memfd_create('x')", "os.setsid()", "os.nice(1)", "signal.setitimer(0, 0)", "time.sleep(9)",
     "fcntl.fcntl(1, fcntl.F_SETOWN, 1)", "resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE)",
     "resource.prlimit(1, resource.RLIMIT_CPU, (1, 1))", "libc.ptrace(0, 0, 0, 0)", "libc.unshare(0)",
     "libc.syscall(425, 0, 0)", "libc.syscall(321, 0, 0, 0)", "libc.process_vm_readv(1, 0, 0, 0, 0, 0)"],
)  # fmt: skip
def test_the_kernel_refuses_what_gets_past_all_else(call: str, tmp_path: Path) -> None:
    """The list of system calls has no way to harm, even for native code."""
    code = (
        f"import sys; sys.path.insert(0, {str(WORKER.parent)!r}); import worker, os, fcntl, resource, signal, time\n"
        "import socket, ctypes\nlibc = worker._LIBC\nworker._filter_syscalls(0)\n"
        "open('/dev/null').close()\n"
        f"try: answer = {call}\nexcept OSError as error: answer = -error.errno\n"
        "os.write(1, str(-ctypes.get_errno() if answer == -1 else answer).encode())"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], stdout=subprocess.PIPE, check=True, cwd=tmp_path)
    assert done.stdout == b"-38"  # ENOSYS, as if the kernel did not have it
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="filters of system calls are of Linux")
def test_where_the_filter_is_refused_no_program_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel, for which an option that it does not know stands here."""
    for path in WORKER.parent.glob("*.py"):
        shutil.copy(path, tmp_path)
    worker = tmp_path / "worker.py"
    worker.write_text(re.sub(r"(PR_SET_NO_NEW_PRIVS = 1, 4, )22", r"\g<1>12345", worker.read_text()))
    monkeypatch.setattr(runner_module, "_WORKER", worker)
    with pytest.raises(RuntimeError, match=r"prctl 12345 refused.*seccomp"):
        run_programs([GOOD])
    (run,) = run_programs([GOOD], unsafe_without_filter=True)
    assert run.result == 42


@pytest.mark.parametrize(("system", "machine"), [("darwin", "arm64"), ("linux", "riscv64")])
def test_systems_without_a_filter_are_named(system: str, machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(runner_module.platform, "machine", lambda: machine)
    with pytest.raises(ValueError, match=f"programs: expected Linux.*got {system} on {machine}.*unsafe_without_filter"):
        runner_module.check_filter()
    runner_module.check_filter(unsafe_without_filter=True)


@pytest.mark.parametrize(
    ("script", "allowed"),
    [
        ("worker.py", sys.stdlib_module_names - {"site"}),
        ("cell.py", {"_warnings", "builtins", "os", "resource", "sys"}),
        ("extraction.py", {"_ast", "builtins", "sys"}),
    ],
)
def test_what_runs_programs_imports_little(script: str, allowed: set[str]) -> None:
    assert set(re.findall(r"^(?:from|import) (\w+)", WORKER.with_name(script).read_text(), re.M)) <= allowed


def test_a_stuck_or_killed_worker_is_replaced(monkeypatch: pytest.MonkeyPatch, nothing_changes) -> None:
    judge, asked = runner_module._ask, []

    def kill_first(worker, source):
        asked.append(worker.pid)
        if len(asked) == 2:
            worker.kill()
        return judge(worker, source)

    monkeypatch.setattr(runner_module, "_ask", kill_first)
    runs = run_programs([GOOD] * 4, workers=1)
    assert [run.outcome for run in runs] == ["ok", "crashed", "ok", "ok"]
    assert len(set(asked)) == 2


def test_an_interrupt_ends_the_workers(monkeypatch: pytest.MonkeyPatch, nothing_changes) -> None:
    def interrupt(*args, **options):
        time.sleep(0.5)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner_module, "tqdm", interrupt)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_programs([body("while True: pass")] * 20, timeout=30, workers=2)
    assert time.monotonic() - start < 5


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_programs_die_with_the_trainer(tmp_path: Path) -> None:
    code = (
        # The package without its __init__, which would import torch.
        "import os, sys, threading, types; package = types.ModuleType('puma_lightning'); "
        f"package.__path__ = [{str(WORKER.parents[1])!r}]; sys.modules['puma_lightning'] = package; "
        "from puma_lightning.programs import run_programs; "
        "threading.Timer(1, os._exit, [0]).start(); "
        f"run_programs([{body('while True: pass')!r}] * 20, timeout=60, workers=2)"
    )
    subprocess.run([sys.executable, "-c", code], check=False, timeout=30)
    deadline = time.monotonic() + 5
    while workers_alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not workers_alive()


def test_a_python_that_does_not_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match=r"expected a process that can be locked in.*check that /bin/false"):
        run_programs([GOOD])


@pytest.mark.skipif(not PROGRAMS.exists(), reason="needs the GSM8K programs")
def test_programs_of_gsm8k_are_right_and_altered_ones_wrong() -> None:
    rows = [json.loads(line) for line in PROGRAMS.read_text().splitlines()[:300]]
    golds = [parse_number(row["answer"]) for row in rows]
    codes = [row["code"] for row in rows]
    altered = [re.sub(r"\n    return (\w+)\n$", r"\n    return \1 + 1\n", code) for code in codes]
    assert all(one != other for one, other in zip(codes, altered, strict=True))
    for texts, share in ((codes, 1), (altered, 0)):
        runs = run_programs(texts)
        right = [same_number(run.result, gold) for run, gold in zip(runs, golds, strict=True)]
        assert sum(right) == share * len(rows)
        assert {run.outcome for run in runs} == {"ok"}

"""The process that runs programs: a bare script, which never imports the package.

Started by the runner, it imports what programs may import, gives up its privileges and then forks once for every
program. So a program costs a fork instead of a start of Python, and needs no file: a child can be denied all of them.

What holds a child, from the outside in; each layer has to fail before the next one matters:

1. this process reads a bounded message from it and kills its process group at the wall limit;
2. resource limits: CPU time, memory, no new file descriptors, no processes, no file growth;
3. on Linux a seccomp filter: a system call beyond memory, time and writing to open descriptors is death. As root also
   another user and an empty root directory;
4. an audit hook ends the child at the first event that is not on a list, such as an import, an open or a look at a
   frame; Python code cannot remove it;
5. the modules that could do harm without raising an event (``os.write``) are emptied.

A message counts only behind a nonce that lies in a local variable of a frame, so printing, or finding the descriptor,
forges nothing. The right answer is never sent here.
"""

import builtins
import contextlib
import ctypes
import importlib
import os
import platform
import resource
import select
import signal
import struct
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

# Functions below look names up here, out of reach of a program that patches builtins.
globals()["__builtins__"] = dict(vars(builtins))

MODULES = (
    "bisect", "calendar", "cmath", "collections", "collections.abc", "copy", "dataclasses", "datetime", "decimal",
    "enum", "fractions", "functools", "heapq", "itertools", "math", "numbers", "operator", "random", "re",
    "statistics", "string", "typing",
)  # fmt: skip
# Imported by those, or by Python itself, when first needed.
INTERNAL = (
    "_strptime",
    "_pylong",
    "_decimal",
    "_pydecimal",
    "encodings",
    "unicodedata",
    "warnings",
    "contextlib",
    "time",
)
HARMFUL = (
    "posix", "os", "_imp", "ctypes", "_ctypes", "_thread", "threading", "signal", "_signal", "gc", "select", "resource",
    "importlib", "_posixsubprocess", "_socket", "fcntl", "faulthandler", "atexit", "marshal",
)  # fmt: skip

EVENTS = frozenset({"builtins.id", "compile", "exec", "sys._getframemodulename", "sys.unraisablehook"})
# What decorators and named tuples read and set; of the others, frames lead to the harness.
READABLE = frozenset({"__code__", "__defaults__", "__kwdefaults__"})
SETTABLE = frozenset(
    {"__module__", "__name__", "__qualname__", "__doc__", "__defaults__", "__kwdefaults__", "__bases__"}
)

# brk, clock_gettime, exit, exit_group, futex, getpid, getrandom, gettimeofday, madvise, mmap, mprotect, mremap, munmap,
# restart_syscall, rseq, rt_sigprocmask, rt_sigreturn, sched_yield, sigaltstack, write
SYSCALLS = {
    "x86_64": (
        0xC000003E,
        (12, 228, 60, 231, 202, 39, 318, 96, 28, 9, 10, 25, 11, 219, 334, 14, 15, 24, 131, 1),
    ),
    "aarch64": (
        0xC00000B7,
        (214, 113, 93, 94, 98, 172, 278, 169, 233, 222, 226, 216, 215, 128, 293, 135, 139, 124, 132, 64),
    ),
}

NOBODY = 65534
MAX_MESSAGE = 4096  # bytes, what a pipe takes at once
MAX_TEXT = 500  # characters of a string or an error
MAX_BITS = 4096  # of an int
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38


def main(timeout: float, memory_mb: int) -> None:
    """Answer requests until standard input ends. Both directions: four bytes of length, then as many of UTF-8."""
    warnings.simplefilter("ignore")  # showing one would open a file
    for name in (*MODULES, *INTERNAL):
        with contextlib.suppress(ImportError):  # not in every version
            importlib.import_module(name)
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))
    from extraction import extract_program  # type: ignore[import-not-found]

    time.localtime()  # reads its files now
    null = os.open(os.devnull, os.O_RDWR)
    prctl = _prctl()
    _drop_privileges()
    prctl(PR_SET_DUMPABLE, 0)  # no tracing by others of the same user
    _send(b"ready")
    while (text := _receive()) is not None:
        nonce = os.urandom(16)
        end, result = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.setsid()
                for fd in (0, 1, 2):
                    os.dup2(null, fd)
                os.closerange(3, result)
                os.closerange(result + 1, 1024)
                _child(text.decode(), extract_program, result, nonce, timeout, memory_mb, prctl)
            finally:
                _exit(1)
        os.close(result)
        answer = _watch(child, end, nonce, time.monotonic() + timeout)
        os.close(end)
        _send(answer)


def _watch(child: int, end: int, nonce: bytes, deadline: float) -> bytes:
    """Wait for a child's message and end, and put an end to the child at the deadline at the latest."""
    message, in_time = b"", True
    poller = select.poll()
    poller.register(end, select.POLLIN)
    poller.register(0, 0)  # hangs up when the trainer is gone
    while len(message) <= MAX_MESSAGE:
        events = poller.poll(max(0.0, deadline - time.monotonic()) * 1000)
        if any(fd == 0 for fd, _ in events) or not events:
            in_time = False
            break
        chunk = os.read(end, MAX_MESSAGE)
        if not chunk:
            break
        message += chunk
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not in_time or status == -signal.SIGXCPU:
        return b"timed_out"
    if not message.startswith(nonce):
        return b"unparsable"
    verdict = message[len(nonce) :]
    if verdict.startswith(nonce) and nonce not in verdict[len(nonce) :] and len(message) <= MAX_MESSAGE:
        return verdict[len(nonce) :]
    if status < 0:
        return f"crashed ended by {signal.Signals(-status).name}".encode()
    return b"crashed ended without a result"


def _child(
    text: str,
    extract_program: Callable[[str], str | None],
    result: int,
    nonce: bytes,
    timeout: float,
    memory_mb: int,
    prctl: Callable[..., Any],
) -> NoReturn:
    """Lock this process in, run the program and report."""
    write, random = os.write, sys.modules["random"]
    describe = _describer()
    _limit(timeout, memory_mb)
    namespace: dict[str, Any] = {"__name__": "program", "__builtins__": dict(vars(builtins))}
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    filter_syscalls = _syscall_filter(prctl)

    def refuse(what: str) -> NoReturn:
        write(result, nonce + b"crashed forbidden: " + what.encode("utf-8", "backslashreplace")[:MAX_TEXT])
        _exit(1)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        harmless = event in EVENTS
        harmless |= event == "object.__getattr__" and args[1] in READABLE
        harmless |= event == "object.__setattr__" and args[1] in SETTABLE
        if not harmless:
            refuse(f"{event} {args[0]}" if event == "import" and type(args[0]) is str else event)

    random.seed(0)  # a program is judged alike each time
    filter_syscalls()
    _empty_modules()
    sys.addaudithook(hook)

    source = extract_program(text)
    if source is None:
        _exit(0)
    write(result, nonce)
    try:
        exec(compile(source, "<program>", "exec"), namespace)
        verdict = b"ok " + describe(namespace["simple_math_problem"]())
    except BaseException as error:
        verdict = b"crashed " + describe(error)
    write(result, nonce + verdict)
    _exit(0)


def _describer() -> Callable[[object], Any]:
    """Return a function that puts a value into plain words without calling a method that a program could define."""
    decimal, fraction = sys.modules["decimal"].Decimal, sys.modules["fractions"].Fraction
    numerator, denominator = fraction._numerator, fraction._denominator
    name_of, args_of = type.__dict__["__name__"].__get__, BaseException.args.__get__  # type: ignore[attr-defined]
    bits = int.bit_length

    def number(value: Any) -> Any:
        kind = type(value)
        if kind is int:
            return b"int %x" % value if bits(value) <= MAX_BITS else b"other int of %d bits" % bits(value)
        if kind is float:
            return b"float " + float.hex(value).encode()
        if kind is decimal:
            return b"float " + float.hex(float(value)).encode()
        if kind is fraction:
            above, below = numerator.__get__(value), denominator.__get__(value)
            if type(above) is int and type(below) is int and bits(above) < 900 and 0 < bits(below) < 900:
                return b"float " + float.hex(above / below).encode()
        return None

    def describe(value: Any) -> Any:
        kind = type(value)
        known = number(value)
        if known is not None:
            return known
        if kind is str:
            return b"str " + value[:MAX_TEXT].encode("utf-8", "backslashreplace")
        name = name_of(kind)[:MAX_TEXT].encode("utf-8", "backslashreplace")
        if not issubclass(kind, BaseException):
            return b"other " + name
        words = args_of(value)
        if len(words) > 0 and type(words[0]) is str:
            return name + b": " + words[0][:MAX_TEXT].encode("utf-8", "backslashreplace")
        return name

    return describe


def _limit(timeout: float, memory_mb: int) -> None:
    seconds = int(timeout) + 1
    for name, value in (
        ("RLIMIT_CPU", seconds),
        ("RLIMIT_AS", memory_mb << 20),
        ("RLIMIT_FSIZE", 0),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_NPROC", 0),
        ("RLIMIT_NOFILE", 0),
    ):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # macOS has not all of them
            resource.setrlimit(getattr(resource, name), (value, value))


def _empty_modules() -> None:
    """Leave nothing to import but the whitelist, and nothing in the modules that act without an audit event."""
    modules = sys.modules
    kept = {name for name in modules if name in MODULES or name.split(".")[0] in INTERNAL}
    harmful = [vars(modules[name]) for name in HARMFUL if name in modules]
    for name in set(modules) - kept:
        del modules[name]
    sys.path.clear()
    del sys._getframe  # named tuples and type variables do without, while calling it is forbidden
    for names in harmful:
        names.clear()


def _drop_privileges() -> None:
    if os.geteuid() != 0:
        return
    changes: tuple[tuple[Callable[[Any], None], Any], ...] = (
        (os.chroot, "."),
        (os.setgroups, []),
        (os.setgid, NOBODY),
        (os.setuid, NOBODY),
    )
    for change, value in changes:
        with contextlib.suppress(OSError):  # containers may forbid any of them
            change(value)


def _prctl() -> Callable[..., Any]:
    if sys.platform != "linux":
        return lambda *args: -1
    prctl = ctypes.CDLL(None).prctl
    prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    return lambda *args: prctl(*args, *[0] * (5 - len(args)))


def _syscall_filter(prctl: Callable[..., Any]) -> Callable[[], None]:
    """Return a function that lets the kernel kill this process at any system call that is not listed."""
    if sys.platform != "linux" or platform.machine() not in SYSCALLS:
        return lambda: None
    architecture, allowed = SYSCALLS[platform.machine()]
    load, equal, give = 0x20, 0x15, 0x06
    kill, allow = 0x80000000, 0x7FFF0000
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    code += [(equal, len(allowed) - i, 0, number) for i, number in enumerate(allowed)]
    code += [(give, 0, 0, kill), (give, 0, 0, allow)]
    instructions = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in code))
    program = ctypes.create_string_buffer(struct.pack("@HxxxxxxQ", len(code), ctypes.addressof(instructions)))
    address = ctypes.addressof(program)

    def install() -> None:
        assert instructions and program  # alive until here
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        prctl(PR_SET_SECCOMP, 2, address)

    return install


_exit = os._exit


def _send(message: bytes) -> None:
    data = struct.pack("<I", len(message)) + message
    while data:
        data = data[os.write(1, data) :]


def _receive() -> bytes | None:
    header = _read(4)
    return None if header is None else _read(struct.unpack("<I", header)[0])


def _read(size: int) -> bytes | None:
    data = b""
    while len(data) < size:
        chunk = os.read(0, size - len(data))
        if not chunk:
            return None
        data += chunk
    return data


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))

"""The process that starts programs: a bare script, which never imports the package.

Started by the runner, it answers requests one at a time. For each it forks, gives up what a program does not need and
starts a bare Python in the fork, which runs ``cell.py``. What holds a program, from the outside in; each layer has to
fail before the next one matters:

1. this process reads a bounded message from it and kills its process group at the wall limit;
2. resource limits: CPU time, memory, no processes, no file growth, and from ``cell.py`` on no new file descriptors;
3. on Linux a filter of system calls. It is set before Python starts, so it lets Python read files; it knows no other
   process, no network and no way to change a file. As root also another user and an empty root directory;
4. an audit hook ends the program at the first event that is not on a list, such as an import, an open or a look at a
   frame; Python code cannot remove it;
5. the modules that could do harm without raising an event (``os.write``) are emptied.

Limits and filter are set by way of ``ctypes``, whose types read and write memory and call native code. The interpreter
of a program has never had it, so they are not there to be found.

A message counts only behind a nonce that lies in a local variable of a frame, so printing, or finding the descriptor,
forges nothing. The right answer is never sent here.
"""

import contextlib
import ctypes
import os
import platform
import resource
import select
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable

CELL = os.path.join(os.path.dirname(os.path.abspath(__file__)), "cell.py")
FLAGS = ("-s", "-S", "-P", "-B")  # not -I, which would ignore the fixed seed of hashes
MAX_MESSAGE = 4096  # bytes, what a pipe takes at once
RESULT = 3  # the descriptor that a program's process answers on
START = 10.0  # seconds in which a Python starts and finds the program; a machine may be slow, or have much to do
DESCRIPTORS = 16  # what Python needs while it starts
PROBE = "def simple_math_problem():\n    return 42\n"

# What a starting Python, its C library and a program need, with its numbers on x86_64 and aarch64.
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
Numbers = tuple[int | None, ...]
SYSCALLS: dict[str, Numbers] = {
    "access": (21, None), "arch_prctl": (158, None), "brk": (12, 214), "clock_getres": (229, 114),
    "clock_gettime": (228, 113), "close": (3, 57), "dup": (32, 23), "exit": (60, 93), "exit_group": (231, 94),
    "faccessat": (269, 48), "faccessat2": (439, 439), "fstat": (5, 80), "futex": (202, 98), "getcwd": (79, 17),
    "getdents64": (217, 61), "getegid": (108, 177), "geteuid": (107, 175), "getgid": (104, 176),
    "getpid": (39, 172), "getrandom": (318, 278), "gettid": (186, 178), "gettimeofday": (96, 169),
    "getuid": (102, 174), "lseek": (8, 62), "lstat": (6, None), "madvise": (28, 233),
    "mmap": (9, 222), "mprotect": (10, 226), "mremap": (25, 216), "munmap": (11, 215), "newfstatat": (262, 79),
    "pread64": (17, 67), "read": (0, 63), "readlink": (89, None), "readlinkat": (267, 78), "readv": (19, 65),
    "restart_syscall": (219, 128), "rseq": (334, 293), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "sched_getaffinity": (204, 123), "sched_yield": (24, 124),
    "set_robust_list": (273, 99), "set_tid_address": (218, 96), "sigaltstack": (131, 132), "stat": (4, None),
    "statx": (332, 291), "sysinfo": (99, 179), "uname": (63, 160), "write": (1, 64), "writev": (20, 66),
}  # fmt: skip
# Those that only root may use, to become another user in an empty root directory.
OF_ROOT: dict[str, Numbers] = {
    "chroot": (161, 51),
    "setgid": (106, 144),
    "setgroups": (116, 159),
    "setuid": (105, 146),
}
# Those that depend on an argument: which one, the bits of it that count, and the values that these may have.
WORD = 0xFFFFFFFF
READ_ONLY = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CONDITIONS: dict[str, tuple[Numbers, int, int, tuple[int, ...]]] = {
    "fcntl": ((72, 25), 1, WORD, (1, 2, 3, 1030)),  # F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC
    "ioctl": ((16, 29), 1, WORD, (0x5401, 0x5413, 0x5450, 0x5451)),  # TCGETS, TIOCGWINSZ, FIONCLEX, FIOCLEX
    "open": ((2, None), 1, READ_ONLY, (0,)),
    "openat": ((257, 56), 2, READ_ONLY, (0,)),
    "prlimit64": ((302, 261), 0, WORD, (0,)),  # of this process
}
EXECVE = (59, 221)
ENOSYS = 38
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38


def main(timeout: float, memory_mb: int, unfiltered: bool) -> None:
    """Answer requests until standard input ends. Both directions: four bytes of length, then as many of UTF-8."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    with contextlib.suppress(OSError):
        _prctl(PR_SET_DUMPABLE, 0)  # no tracing by others of the same user
    start = _Start(timeout, memory_mb, unfiltered)
    answer = _run(PROBE.encode(), start, timeout)
    _send(b"ready" if answer == b"ok int 2a" else answer)
    while (text := _receive()) is not None:
        try:
            answer = _run(text, start, timeout)
        except OSError as error:  # no room for the text, no process left
            answer = f"failed {error}".encode()
        _send(answer)


def _run(text: bytes, start: "_Start", timeout: float) -> bytes:
    """Run one program in a process of its own and return the verdict."""
    nonce = os.urandom(16)
    end, result = os.pipe()
    with tempfile.TemporaryFile(dir=".") as request:
        request.write(nonce + text)
        request.flush()
        request.seek(0)
        child = os.fork()
        if child == 0:
            try:
                start(request.fileno(), result)
            except BaseException as error:
                os.write(RESULT, b"failed " + f"{type(error).__name__}: {error}".encode())
            finally:
                os._exit(1)
    os.close(result)
    answer = _watch(child, end, nonce, timeout)
    os.close(end)
    return answer


def _watch(child: int, end: int, nonce: bytes, timeout: float) -> bytes:
    """Wait for a child's message and end, and put an end to the child when its time is over.

    The time of the program begins with the first words of the message.
    """

    def kill(*_: object) -> None:
        for how in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError):
                how(child, signal.SIGKILL)

    def end_both(*_: object) -> None:
        kill()
        os._exit(0)

    before = signal.signal(signal.SIGTERM, end_both)
    message, in_time, deadline = b"", True, time.monotonic() + START
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
        if not message:
            deadline = time.monotonic() + timeout
        message += chunk
    kill()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    signal.signal(signal.SIGTERM, before)
    if not in_time:
        return b"timed_out"
    if message.startswith(b"failed "):
        return message
    if not message.startswith(nonce):
        return b"unparsable"
    verdict = message[len(nonce) :]
    if verdict.startswith(nonce) and nonce not in verdict[len(nonce) :] and len(message) <= MAX_MESSAGE:
        return verdict[len(nonce) :]
    if status < 0:
        return f"crashed ended by {signal.Signals(-status).name}".encode()
    return b"crashed ended without a result"


class _Start:
    """Locks the calling process in and turns it into the Python that runs a program; never returns.

    Raises:
        OSError: If the process cannot be locked in, or Python does not start.
    """

    def __init__(self, timeout: float, memory_mb: int, unfiltered: bool) -> None:
        self.limits = {
            "RLIMIT_CPU": int(timeout + START) + 1,  # which a start takes from too
            "RLIMIT_AS": memory_mb << 20,
            "RLIMIT_FSIZE": 0,
            "RLIMIT_CORE": 0,
            "RLIMIT_NPROC": 0,
            "RLIMIT_NOFILE": DESCRIPTORS,
        }
        self.worker = os.getpid()
        self.patience = int(timeout + START) + 5
        words = [sys.executable, *FLAGS, CELL]
        self.path = ctypes.create_string_buffer(words[0].encode())
        self.words = (ctypes.c_char_p * (len(words) + 1))(*[word.encode() for word in words], None)
        settings = [f"{name}={value}".encode() for name, value in os.environ.items()]
        self.environment = (ctypes.c_char_p * (len(settings) + 1))(*settings, None)
        self.unfiltered = unfiltered

    def __call__(self, request: int, result: int) -> None:
        os.setsid()
        request, result = (os.dup(fd) for fd in (request, result))  # none of them is one of those below
        null = os.open(os.devnull, os.O_RDWR)
        for fd, source in enumerate((request, null, null, result)):
            os.dup2(source, fd)
        os.closerange(RESULT + 1, 1024)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.alarm(self.patience)  # the end of one that outlives the process that watches it
        for name, value in self.limits.items():
            with contextlib.suppress(AttributeError, OSError, ValueError):  # macOS has not all of them
                resource.setrlimit(getattr(resource, name), (value, value))
        if sys.platform == "linux":
            # Forgotten when root becomes another user: a program that outlives the worker then has its limits alone.
            _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != self.worker:
                os._exit(1)
        if not self.unfiltered:
            _filter_syscalls(ctypes.addressof(self.path))
        _LIBC.execve(self.path, self.words, self.environment)
        raise OSError(ctypes.get_errno(), f"cannot start {sys.executable}")


_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.execve.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p]


def _prctl(option: int, value: int, pointer: int = 0) -> None:
    prctl: Callable[..., int] = getattr(_LIBC, "prctl", lambda *_: -1)
    zero = ctypes.c_ulong(0)
    if prctl(ctypes.c_int(option), ctypes.c_ulong(value), ctypes.c_ulong(pointer), zero, zero) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option} refused")


def _filter_syscalls(path: int) -> None:
    """Make every system call that is not listed fail as one that the kernel does not have.

    Args:
        path: The address that ``execve`` must be given, for the start of Python that is still to come.

    Raises:
        OSError: If the kernel does not take the filter.
    """
    if sys.platform != "linux" or platform.machine() not in ARCHITECTURES:
        raise OSError(ENOSYS, f"no filter of system calls for {sys.platform} on {platform.machine()}")
    column, architecture = ARCHITECTURES[platform.machine()]
    load, mask_with, equal, give = 0x20, 0x54, 0x15, 0x06
    allow, refuse = (give, 0, 0, 0x7FFF0000), (give, 0, 0, 0x00050000 | ENOSYS)
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, 0x80000000), (load, 0, 0, 0)]

    def permit(number: int | None, *conditions: tuple[int, int, tuple[int, ...]]) -> None:
        """Allow a call where the masked bits at each offset are one of the values."""
        if number is None:  # not on this architecture
            return
        body = []
        for offset, mask, values in conditions:
            body += [(load, 0, 0, offset), (mask_with, 0, 0, mask)]
            body += [(equal, len(values) - i, 0, value) for i, value in enumerate(values)] + [refuse]
        code.extend([(equal, 0, len(body) + 1, number), *body, allow])

    for numbers in (SYSCALLS | (OF_ROOT if os.geteuid() == 0 else {})).values():
        permit(numbers[column])
    for numbers, argument, mask, values in CONDITIONS.values():
        permit(numbers[column], (16 + 8 * argument, mask, values))
    permit(EXECVE[column], (16, WORD, (path & WORD,)), (20, WORD, (path >> 32,)))
    code.append(refuse)
    instructions = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in code))
    program = ctypes.create_string_buffer(struct.pack("@HxxxxxxQ", len(code), ctypes.addressof(instructions)))
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _prctl(PR_SET_SECCOMP, 2, ctypes.addressof(program))


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
    main(float(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "unfiltered")

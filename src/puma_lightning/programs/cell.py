"""The interpreter of one program: a bare script, started by ``worker.py`` in a process that is locked in already.

It reads the request, imports what the program may import, closes what its start needed and runs the program. It must
never import anything that reaches memory, such as ``ctypes``: a program can find every type that was ever loaded.
"""

import _warnings
import builtins
import os
import resource
import sys

# Functions below look names up here, out of reach of a program that patches builtins.
globals()["__builtins__"] = dict(vars(builtins))

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

# What those modules, and Python itself, import only when first needed.
INTERNAL = (
    "_strptime", "_decimal", "_pydecimal", "abc", "contextlib", "copyreg", "encodings", "time", "types", "unicodedata",
    "warnings", "weakref",
)  # fmt: skip
HARMFUL = (
    "posix", "os", "_imp", "_thread", "threading", "signal", "_signal", "gc", "select", "resource", "importlib",
    "_posixsubprocess", "_socket", "fcntl", "faulthandler", "atexit", "marshal", "zipimport",
)  # fmt: skip

EVENTS = frozenset({"builtins.id", "compile", "exec", "sys._getframemodulename", "sys.unraisablehook"})
# What decorators and named tuples read and set; of the others, frames lead to the harness.
READABLE = frozenset({"__code__", "__defaults__", "__kwdefaults__"})
SETTABLE = frozenset(
    {"__module__", "__name__", "__qualname__", "__doc__", "__defaults__", "__kwdefaults__", "__bases__", "__class__"}
)

REQUEST, RESULT = 0, 3
NONCE = 16  # bytes, at the head of a request
NOBODY = 65534
MAX_TEXT = 500  # characters of a string or an error
MAX_BITS = 4096  # of an int


def main() -> "NoReturn":
    """Run the program of the request and report."""
    with open(REQUEST, "rb") as request:
        data = request.read()
    nonce, text = data[:NONCE], data[NONCE:].decode()
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))
    from extraction import MODULES, extract_program  # type: ignore[import-not-found]

    _import_what_is_named(text, MODULES)
    write = os.write
    describe = _describer()
    namespace: dict[str, Any] = {"__name__": "program", "__builtins__": dict(vars(builtins))}

    def refuse(what: str) -> "NoReturn":
        write(RESULT, nonce + b"crashed forbidden: " + what.encode("utf-8", "backslashreplace")[:MAX_TEXT])
        _exit(1)

    def hook(event: str, args: "tuple[Any, ...]") -> None:
        if event == "import":  # of what is not loaded: as if it were not there
            raise ImportError(f"forbidden: import {args[0]}" if type(args[0]) is str else "forbidden: import")
        harmless = event in EVENTS
        harmless |= event == "object.__getattr__" and args[1] in READABLE
        harmless |= event == "object.__setattr__" and args[1] in SETTABLE
        if not harmless:
            refuse(event)

    _drop_privileges()
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    source = extract_program(text)  # before the hook: to report an error the parser tries to open a file
    if source is None:
        _exit(0)
    _empty_modules(MODULES)
    sys.addaudithook(hook)
    write(RESULT, nonce)  # from here on the time of the program is counted
    try:
        exec(compile(source, "<program>", "exec"), namespace)
        verdict = b"ok " + describe(namespace["simple_math_problem"]())
    except BaseException as error:
        verdict = b"crashed " + describe(error)
    write(RESULT, nonce + verdict)
    _exit(0)


def _import_what_is_named(text: str, modules: "dict[str, tuple[str, ...]]") -> None:
    """Import what a text may import. That takes time, so only what it has the names of."""
    _warnings.filters.insert(0, ("ignore", None, Warning, None, 0))  # showing one would open a file
    words = set("".join([c if c.isalnum() or c == "_" else " " for c in text]).split())
    needed = [module for name, more in modules.items() if name in words for module in (name, *more)]
    if "\\N" in text:
        needed.append("unicodedata")  # the names of characters in strings
    if "class" in words:
        needed.append("copyreg")  # copies of objects
        needed += ["typing"] if sys.version_info >= (3, 12) else []  # class A[T]
    for name in needed:
        __import__(name)
    if "random" in sys.modules:
        sys.modules["random"].seed(0)  # a program is judged alike each time


def _describer() -> "Callable[[object], Any]":
    """Return a function that puts a value into plain words without calling a method that a program could define."""
    decimal = getattr(sys.modules.get("decimal"), "Decimal", None)
    fraction: Any = getattr(sys.modules.get("fractions"), "Fraction", None)
    numerator: Any = getattr(fraction, "_numerator", None)
    denominator: Any = getattr(fraction, "_denominator", None)
    name_of, args_of = type.__dict__["__name__"].__get__, BaseException.args.__get__  # type: ignore[attr-defined]
    bits = int.bit_length

    def number(value: "Any") -> "Any":
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

    def describe(value: "Any") -> "Any":
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


def _empty_modules(whitelist: "dict[str, tuple[str, ...]]") -> None:
    """Leave nothing to import but the whitelist, and nothing in the modules that act without an audit event."""
    modules = sys.modules
    kept = {name for name in modules if name.split(".")[0] in whitelist or name.split(".")[0] in INTERNAL}
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
        try:
            change(value)
        except OSError:  # containers may forbid any of them
            continue


_exit = os._exit

if __name__ == "__main__":
    main()

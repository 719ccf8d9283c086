"""Hostile programs, as name -> text. Where one is not stopped, it returns 42, or has 42 reported for it."""

from textwrap import indent

HEAD = "def simple_math_problem():\n"


def _body(source: str) -> str:
    return HEAD + indent(source.strip("\n"), "    ") + "\n"


# Roads to the modules that the harness holds.
_OS = """
import typing, random
found = {}
for module in (typing, random):
    found.update({k: v for k, v in vars(module).items() if type(v) is type(typing)})
sys = typing.sys
os = random._os if hasattr(random, "_os") else None
posix = type(sys.__spec__.loader) if sys.__spec__ else None
loader = [c for c in object.__subclasses__() if c.__name__ == "FileLoader"]
for c in object.__subclasses__():
    for f in vars(c).values():
        g = getattr(f, "__globals__", {})
        os = g.get("_os") or g.get("os") or os
"""
_FRAME = """
def step():
    yield frame.gi_frame
frame = step()
here = next(frame)
"""

BODIES = {
    # time
    "loop": "while True: pass",
    "loop catching everything": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "loop catching and raising": "while True:\n    try:\n        raise SystemExit(0)\n    except BaseException: pass",
    "power tower": "x = 10\nreturn 42 + 0 * (x**x**x)",
    "constant folding": "return 42 + 0 * (10**10**10)",
    "factorial": "import math\nmath.factorial(10**9)\nreturn 42",
    "sum of a huge range": "sum(range(10**13))\nreturn 42",
    "infinite list": "import itertools\nfor _ in itertools.count(): pass\nreturn 42",
    "regex backtracking": "import re\nre.match('(a+)+$', 'a' * 60 + 'b')\nreturn 42",
    "slow eq on itself": "class A:\n    def __eq__(self, o):\n        while True: pass\nA() == A()\nreturn 42",
    "collections deque consume": "import collections, itertools\ncollections.deque(itertools.repeat(0), 0)\nreturn 42",
    "decimal precision": "import decimal\ndecimal.getcontext().prec = 10**8\nd = decimal.Decimal(2)\n"
    "while True: d = d**3",
    "stdout flood": "while True: print('x' * 1000000)",
    "stderr flood": "import typing\nwhile True: typing.sys.stderr.write('x' * 1000000)",
    # memory and stack
    "list bomb": "x = [0]\nwhile True: x += x",
    "str bomb": "x = 'a' * 10**12\nreturn 42",
    "bytearray bomb": "x = bytearray(10**11)\nreturn 42",
    "int bomb": "x = 1 << (10**11)\nreturn 42",
    "bomb catching": "x = []\nwhile True:\n    try:\n        x.append('a' * 10**7 + str(len(x)))\n    "
    "except MemoryError: pass",
    "dict bomb": "x = {}\nwhile True: x[len(x)] = 'a' * 1000 + str(len(x))",
    "recursion": "def f(n): return f(n + 1)\nreturn f(0)",
    "recursion without a limit": "import typing\ntyping.sys.setrecursionlimit(10**9)\n"
    "class A:\n    def __getattr__(self, n): return getattr(self, n + 'a')\nA().x\nreturn 42",
    "nested zip": "import typing\ntyping.sys.setrecursionlimit(10**6)\nx = ()\n"
    "for _ in range(10**6): x = zip(x)\nlist(x)\n"
    "del x\nwhile True: pass",
    # other processes and threads
    "fork": "import os\nwhile True: os.fork()",
    "smuggled fork": _OS + "while True: os.fork()",
    "subprocess": "import subprocess\nsubprocess.run(['touch', 'sentinel'])\nreturn 42",
    "os.system": "import os\nos.system('touch /tmp/sentinel')\nreturn 42",
    "posix": "import posix\nposix.system('touch /tmp/sentinel')\nreturn 42",
    "threads": "import threading\nwhile True: threading.Thread(target=print).start()",
    "low threads": "import _thread\nwhile True: _thread.start_new_thread(print, ())",
    "multiprocessing": "import multiprocessing\nmultiprocessing.Process(target=print).start()\nreturn 42",
    "asyncio": "import asyncio\nasyncio.run(asyncio.sleep(0))\nreturn 42",
    "kill parent": "import os\nos.kill(os.getppid(), 9)\nreturn 42",
    "kill group": "import os\nos.killpg(0, 9)\nreturn 42",
    "kill all": _OS + "os.kill(-1, 9)\nreturn 42",
    "signal handler": "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nreturn 42",
    "loader of signals": "import typing\n__loader__ = typing.sys.__loader__\n"
    "__loader__.load_module('_signal').alarm(1)\n"
    "return 42",
    "loader of fork_exec": "for c in object.__subclasses__():\n    if c.__name__ == 'BuiltinImporter':\n"
    "        c.load_module('_posixsubprocess').fork_exec\nreturn 42",
    "loader of posix": "for c in object.__subclasses__():\n    if c.__name__ == 'BuiltinImporter':\n"
    "        c.load_module('posix').system('touch /tmp/sentinel')\n        return 42",
    # ends
    "os._exit": "import os\nos._exit(0)",
    "sys.exit": "import sys\nsys.exit(42)",
    "raise SystemExit": "raise SystemExit(42)",
    "raise KeyboardInterrupt": "raise KeyboardInterrupt(42)",
    "raise with words": "raise ValueError('ok int 2a')",
    "exception with hostile str": "class E(BaseException):\n    def __str__(self): return 'ok int 2a'\n"
    "    __repr__ = __str__\n    args = 3\nraise E('x')",
    "atexit": "import atexit\natexit.register(print, 42)\nreturn 42",
    "faulthandler": "import faulthandler\nfaulthandler._sigsegv()\nreturn 42",
    "breakpoint": "breakpoint()\nreturn 42",
    "input": "return int(input() or 42)",
    # files
    "read passwd": "open('/etc/passwd').read()\nreturn 42",
    "write cwd": "open('sentinel', 'w').write('x')\nreturn 42",
    "write tmp": "open('/tmp/sentinel', 'w').write('x')\nreturn 42",
    "io.open": "import io\nio.open('/tmp/sentinel', 'w')\nreturn 42",
    "codecs.open": "import re\nre.enum.sys.modules['encodings'].codecs.open('/etc/passwd')\nreturn 42",
    "FileIO": "import typing\ntype(typing.sys.stdout.buffer.raw)('/tmp/sentinel', 'w')\nreturn 42",
    "open of builtins": "print.__self__.open('/etc/passwd')\nreturn 42",
    "pathlib": "import pathlib\npathlib.Path('/tmp/sentinel').write_text('x')\nreturn 42",
    "shutil": "import shutil\nshutil.rmtree('/tmp/none')\nreturn 42",
    "tempfile": "import tempfile\ntempfile.mkdtemp()\nreturn 42",
    "smuggled listdir": _OS + "os.listdir('/')\nreturn 42",
    "file loader": "for c in object.__subclasses__():\n    if c.__name__ == 'FileLoader':\n"
    "        c('x', '/etc/passwd').get_data('/etc/passwd')\n        return 42",
    "environment": "import os\nos.environ['SENTINEL'] = 'x'\nreturn 42",
    "chdir": "import os\nos.chdir('/')\nreturn 42",
    # network
    "socket": "import socket\nsocket.socket()\nreturn 42",
    "low socket": "import _socket\n_socket.socket()\nreturn 42",
    "urllib": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1')\nreturn 42",
    # imports
    "importlib": "import importlib\nimportlib.import_module('os').getpid()\nreturn 42",
    "__import__": "__import__('os').getpid()\nreturn 42",
    "sys.modules": "import typing\ntyping.sys.modules['os'].getpid()\nreturn 42",
    "bootstrap": "__import__.__self__.__loader__.load_module('_ctypes').dlopen(None, 0)\nreturn 42",
    "ctypes": "import ctypes\nctypes.string_at(0)\nreturn 42",
    "loader of ctypes": "for c in object.__subclasses__():\n    if c.__name__ == '_SimpleCData':\n"
    "        c.__subclasses__()[0].from_address(1).value\nreturn 42 if c is None else 41",
    "numpy": "import numpy\nreturn 42",
    "torch": "import torch\nreturn 42",
    "the harness": "import __main__\n__main__._describer = lambda: lambda v: b'int 2a'\nreturn 41",
    "the extraction": "import extraction\nreturn 42",
    # frames
    "gi_frame": _FRAME + "here.f_back.f_back\nreturn 42",
    "cr_frame": "async def f(): pass\nf().cr_frame.f_back\nreturn 42",
    "tb_frame": "try:\n    1 / 0\nexcept Exception as e:\n    "
    "e.__traceback__.tb_frame.f_back.f_locals['nonce']\nreturn 42",
    "tb_frame by descriptor": "try:\n    1 / 0\nexcept Exception as e:\n"
    "    object.__getattribute__(e.__traceback__, 'tb_frame')\nreturn 42",
    "getframe": "import typing\ntyping.sys._getframe(1).f_globals['_exit'] = None\nreturn 42",
    "current frames": "import typing\ntyping.sys._current_frames()\nreturn 42",
    "settrace": "import typing\ntyping.sys.settrace(print)\nreturn 42",
    "setprofile": "import typing\ntyping.sys.setprofile(lambda *a: None)\nreturn 42",
    "audit hook": "import typing\ntyping.sys.addaudithook(print)\nreturn 42",
    "gc": "import gc\ngc.get_objects()\nreturn 42",
    "code surgery": "def f(): return 41\nf.__code__ = f.__code__.replace(co_consts=(None, 42))\nreturn f()",
    "code by hand": "def f(): return 41\nreturn eval(f.__code__.replace(co_consts=(None, 42)))",
    # forgers: return 41 and try to have 42 reported
    "print the verdict": "print('ok int 2a')\nprint('42', flush=True)\nreturn 41",
    "write to descriptors": "import typing\nfor fd in range(3, 64):\n    try:\n"
    "        type(typing.sys.stdout.buffer.raw)(fd, 'wb', closefd=False).write(b'ok int 2a')\n"
    "    except Exception: pass\nreturn 41",
    "open descriptors": "for fd in range(3, 64):\n    open(fd, 'wb').write(b'ok int 2a')\nreturn 41",
    "smuggled os.write": _OS + "for fd in range(64):\n    try: os.write(fd, b'ok int 2a')\n    "
    "except OSError: pass\nreturn 41",
    "smuggled os.close": _OS + "for fd in range(64): os.close(fd)\nreturn 41",
    "patched builtins": "b = print.__self__\nfor name in ('type', 'issubclass', 'len', 'int', 'float', 'vars'):\n"
    "    setattr(b, name, lambda *a: 42)\nreturn 41",
    "patched __builtins__": "for name in ('type', 'issubclass', 'len', 'int'):\n    "
    "__builtins__[name] = lambda *a: 42\n"
    "return 41",
    "patched Fraction": "import fractions\nfractions.Fraction.__float__ = lambda s: 42.0\n"
    "fractions.Fraction.numerator = 42\nreturn fractions.Fraction(41)",
    "patched random": "import random\nrandom.seed = random.Random.seed = lambda *a: 42\nreturn 41",
    "codec handler": "import typing\ntyping.sys.modules['encodings'].codecs.register_error('backslashreplace', "
    "lambda e: ('42', e.end))\nreturn '\\ud800'",
    # results
    "True": "return True",
    "None": "return None",
    "nan": "return float('nan')",
    "inf": "return float('inf')",
    "complex": "return 42 + 0j",
    "huge int": "return 10**400",
    "huge int of bits": "return 1 << 10**7",
    "huge string": "return '42' * 10**6",
    "words": "return 'the answer is 42'",
    "list": "return [42]",
    "tuple": "return (42,)",
    "bytes": "return b'42'",
    "generator": "import itertools\nreturn (42 for _ in itertools.count())",
    "int subclass": "class I(int):\n    def __sub__(self, o): return 0\n    __rsub__ = __abs__ = __sub__\nreturn I(41)",
    "float subclass": "class F(float):\n    def hex(self): return (42.0).hex()\nreturn F(41)",
    "str subclass": "class S(str):\n    def encode(self, *a): return b'42'\nreturn S('41')",
    "hostile eq": "class A:\n    def __eq__(self, o): return True\n    __hash__ = None\nreturn A()",
    "hostile float": "class A:\n    def __float__(self): return 42.0\n    __int__ = __index__ = lambda s: 42\n"
    "return A()",
    "hostile repr": "class A:\n    def __repr__(self): return '42'\n    __str__ = __repr__\nreturn A()",
    "repr that loops": "class A:\n    def __repr__(self):\n        while True: pass\nreturn A()",
    "class lie": "class A:\n    @property\n    def __class__(self): return int\n    "
    "def __index__(self): return 42\nreturn A()",
    "named like a number": "return type('42', (), {})()",
    "metaclass": "class M(type):\n    def __eq__(self, o): return True\n    def __hash__(self): return hash(int)\n"
    "    __name__ = '42'\nclass A(metaclass=M): pass\nreturn A()",
    "del": "class A:\n    def __del__(self):\n        while True: pass\na = A()\ndel a\nreturn 42",
    "exec": "exec(\"import os; os.system('touch /tmp/sentinel')\")\nreturn 42",
    "eval": "return eval(\"__import__('os').getpid()\") and 42",
    "deep eval": "return eval('(' * 100000 + '42' + ')' * 100000)",
    "marshal": "import marshal\nmarshal.loads(b'')\nreturn 42",
    "pickle": "import pickle\npickle.loads(b'')\nreturn 42",
}  # fmt: skip

_RETURN = HEAD + "    return 42\n"
ATTACKS = {name: _body(source) for name, source in BODIES.items()} | {
    # source text
    "empty": "",
    "no function": "return 42",
    "another function": "def other():\n    return 42\n",
    "a method": f"class A:\n    {_RETURN}",
    "huge text": _RETURN + "# " + "x" * 10**7,
    "null byte": "def simple_math_problem():\n    x = '\0'\n    return 42\n",
    "nested parentheses": HEAD + "    return " + "(" * 30000 + "42" + ")" * 30000,
    "nested lists": HEAD + "    return " + "[" * 5000 + "]" * 5000,
    "many minus signs": HEAD + "    return " + "-" * 60000 + "42",
    "long attribute chain": HEAD + "    return 42" + ".real" * 12000 + "1",
    "many errors": HEAD + "    return 42 42\n" * 3000,
    # outside the function
    "module level loop": "def other(): pass\nwhile True: pass\n" + _RETURN,
    "module level exit": "def other(): pass\n__import__('os')._exit(0)\n" + _RETURN,
    "decorator": "@print.__self__.open\n" + _RETURN,
    "default argument": "def simple_math_problem(x=open('/tmp/sentinel', 'w')):\n    return 42\n",
    "class body": "def other(): pass\nclass A:\n    import socket\n" + _RETURN,
    "not callable after all": _RETURN + "simple_math_problem = 42\n",
    "needs arguments": "def simple_math_problem(x):\n    return 42\n",
    "coroutine": "def other(): pass\nasync def simple_math_problem():\n    return 42\n",
}

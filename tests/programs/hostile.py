"""Hostile programs made by combination: each thing to try, in each way to hide it. One that succeeds returns 42."""

import random
from textwrap import indent

# The bodies of ``attack``, which returns True where it got what it wanted; those of FAKE return what might pass for 42.
ALLOCATE = {
    "bytes": "return len(bytearray(1 << 30)) > 0",
    "doubling": "x = [0]\nwhile len(x) < 1 << 28: x += x\nreturn True",
    "string": "return len('a' * (1 << 31)) > 0",
    "integer": "return (1 << (1 << 34)) > 0",
    "dictionary": "x = {}\nwhile len(x) < 10**8: x[len(x)] = str(len(x)) * 100\nreturn True",
    "pieces": "keep = []\nwhile len(keep) < 64: keep.append(bytearray(1 << 24))\nreturn True",
    "join": "return len(','.join(map(str, range(10**9)))) > 0",
    "width": "return len(f'{1:>{1 << 31}}') > 0",
    "set": "return len(set(range(10**9))) > 0",
    "matrix": "return len([[0] * 10**5 for _ in range(10**5)]) > 0",
}
LOOP = {
    "while": "while True: pass",
    "catching": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "iterator": "for _ in iter(int, 1): pass\nreturn True",
    "power": "return (9**9**9) > 0",
    "regex": "import re\nreturn not re.match('(a|aa)+$', 'a' * 80 + 'b')",
    "sum": "return sum(range(10**14)) > 0",
    "deque": "import collections, itertools\ncollections.deque(itertools.cycle([0]), 0)\nreturn True",
    "recursion": "def f(n):\n    try: return f(n + 1)\n    except RecursionError: return f(n)\nreturn f(0)",
}
ESCAPE = {
    "import": "import os\nreturn os.getpid() > 0",
    "dynamic import": "return bool(__import__('so' + 'cket').socket())",
    "write": "open('/tmp/sentinel', 'w').write('x')\nreturn True",
    "read": "return bool(open('/etc/passwd').read())",
    "read this program": "return bool(open(0, 'rb').read())",
    "raw file": "import typing\nreturn bool(type(typing.sys.stdout.buffer.raw)('/etc/passwd').read())",
    "closing of pipes": "c = [c for c in object.__subclasses__() if c.__name__ == '_wrap_close'][0]\n"
    "return c.__init__.__globals__['system']('touch /tmp/sentinel') == 0",
    "importer": "c = [c for c in object.__subclasses__() if c.__name__ == 'BuiltinImporter'][0]\n"
    "return c.load_module('posix').getpid() > 0",
    "library": "c = [c for c in object.__subclasses__() if c.__name__ == 'FileLoader'][0]\n"
    "return bool(c('x', '/etc/passwd').get_data('/etc/passwd'))",
    "memory": "c = [c for b in object.__subclasses__() for c in (b, *type.__subclasses__(b))\n"
    "     if hasattr(c, 'from_address') or c.__name__ in ('_SimpleCData', '_Pointer', '_CData', 'mmap')][0]\n"
    "return bool(c)",
    "frame": "try: 1 / 0\nexcept ZeroDivisionError as error: frame = error.__traceback__.tb_frame\n"
    "while frame.f_back: frame = frame.f_back\nreturn 'nonce' in frame.f_locals",
    "code": "f = lambda: 0\nf.__code__ = f.__code__.replace(co_consts=(True,))\nreturn f()",
    "trace": "import typing\ntyping.sys.settrace(print)\nreturn True",
    "hook": "import typing\ntyping.sys.addaudithook(print)\nreturn True",
    "modules": "import typing\nreturn typing.sys.modules['posix'].fork() >= 0",
    "globals of a function": "import random\nreturn random.Random.__init__.__globals__['_os'].getpid() > 0",
    "globals of the harness": "import re\nfor c in object.__subclasses__():\n    for f in vars(c).values():\n"
    "        g = getattr(f, '__globals__', {})\n        if 'posix' in g: return g['posix'].getpid() > 0",
    "limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))\nreturn True",
    "debugger": "breakpoint()\nreturn True",
    "input": "return bool(input() or True)",
}
FAKE = {
    "print": "print('ok int 2a', flush=True)\nreturn 41",
    "descriptor": "open(3, 'wb').write(b'ok int 2a')\nreturn 41",
    "exit": "raise SystemExit('ok int 2a')",
    "exception": "raise BaseException('ok int 2a')",
    "class name": "return type('ok int 2a', (), {})()",
    "number-like": "class A(int):\n    __eq__ = __le__ = lambda *a: True\n    __hash__ = None\nreturn A(41)",
    "text": "return '41\\nok int 2a'",
    "float-like": "class A(float):\n    __float__ = __abs__ = hex = lambda self: 42.0\nreturn A(41)",
    "builtins": "b = print.__self__\nfor name in vars(b).copy():\n    if name in ('type', 'int', 'float', 'len'):\n"
    "        setattr(b, name, lambda *a: 42)\nreturn 41",
}
OUTLIVE = {
    "fork": "import os\nreturn os.fork() >= 0",
    "thread": "import threading\nthreading.Thread(target=print).start()\nreturn True",
    "low thread": "import _thread\n_thread.start_new_thread(print, ())\nreturn True",
    "at exit": "import atexit\natexit.register(print)\nreturn True",
    "subprocess": "import subprocess\nreturn bool(subprocess.Popen(['sleep', '99']))",
    "pool": "import concurrent.futures as f\nreturn bool(f.ProcessPoolExecutor().submit(print))",
    "finalizer": "import weakref\nweakref.finalize(print, open, '/tmp/sentinel', 'w')\nreturn True",
    "signal": "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nreturn True",
}
PAYLOADS = {"allocate": ALLOCATE, "loop": LOOP, "escape": ESCAPE, "fake": FAKE, "outlive": OUTLIVE}

# Ways to hide the call: source at the top level that binds won.
HIDE = {
    "plain": "won = attack()",
    "catching all": "try: won = attack()\nexcept BaseException: won = False",
    "string": "space = {}\nexec(SOURCE + '\\nwon = attack()', space)\nwon = space['won']",
    "compiled": "space = {}\nexec(compile(SOURCE + '\\nwon = attack()', 'x', 'exec'), space)\nwon = space['won']",
    "generator": "def go():\n    yield attack()\nwon = next(go())",
    "closing a generator": "won = []\ndef go():\n    try: yield\n    finally: won.append(attack())\n"
    "g = go()\nnext(g)\ng.close()\nwon = won[0]",
    "decorator": "won = []\n@(lambda f: won.append(attack()) or f)\ndef other(): pass\nwon = won[0]",
    "default": "def other(won=attack()): return won\nwon = other()",
    "class body": "class A:\n    won = attack()\nwon = A.won",
    "metaclass": "class M(type):\n    def __getattr__(self, name): return attack()\n"
    "class A(metaclass=M): pass\nwon = A.won",
    "deletion": "won = []\nclass A:\n    def __del__(self): won.append(attack())\na = A()\ndel a\n"
    "won = won[0] if won else False",
    "sorting": "won = []\nsorted([1, 2], key=lambda x: won.append(attack()) or x)\nwon = won[0]",
    "hashing": "won = []\nclass A:\n    def __hash__(self): return won.append(attack()) or 1\n{A(): 1}\nwon = won[0]",
    "context": "class A:\n    def __enter__(self): return attack()\n    def __exit__(self, *a): return True\n"
    "won = False\nwith A() as won: pass",
    "coroutine": "async def go(): return attack()\nwon = False\ntry: go().send(None)\n"
    "except StopIteration as stop: won = stop.value",
}
END = "def simple_math_problem():\n    return 42 if won is True else won\n"


def programs(count: int, seed: int = 0) -> dict[str, str]:
    """Return that many combinations, as name -> text; every payload and every way to hide is among the first 110."""
    draw = random.Random(seed)
    names = [(kind, name) for kind, payloads in PAYLOADS.items() for name in payloads]
    ways = list(HIDE)
    pairs = [(names[i % len(names)], way) for i, way in enumerate(ways * -(-len(names) // len(ways)))]
    others = [(name, way) for name in names for way in ways if (name, way) not in pairs]
    draw.shuffle(others)
    chosen = (pairs + others)[:count]
    return {f"{kind}: {name}, {way}": _program(PAYLOADS[kind][name], way) for (kind, name), way in chosen}


def _program(payload: str, way: str) -> str:
    source = "def attack():\n" + indent(payload, "    ") + "\n"
    return f"{source}SOURCE = {source!r}\n{HIDE[way]}\n{END}"


REACHED = 424242  # what a mutated program returns whose hostile line got what it wanted


def mutated(source: str, draw: random.Random) -> str:
    """Return a program with a hostile line put in at random, and a few characters and lines changed."""
    lines = source.rstrip("\n").split("\n")
    kind = draw.choice([kind for kind in PAYLOADS if kind != "fake"])
    payload = draw.choice(list(PAYLOADS[kind].values()))
    at = draw.randrange(1, len(lines))
    errors = draw.choice(["Exception", "BaseException", "OSError"])
    call = f"    try:\n        if attack() is True: return {REACHED}\n    except {errors}: pass"
    lines[at:at] = ["    def attack():", *indent(payload, " " * 8).split("\n"), *call.split("\n")]
    for _ in range(draw.randrange(4)):
        i = draw.randrange(len(lines))
        change = draw.randrange(4)
        if change == 0:
            lines.insert(draw.randrange(len(lines) + 1), lines[i])
        elif change == 1 and lines[i]:
            j = draw.randrange(len(lines[i]))
            lines[i] = lines[i][:j] + lines[i][j + 1 :]
        elif change == 2:
            lines[i] = lines[i].replace("*", "**").replace("+", "<<")
        else:
            lines[i] = lines[i].replace("=", "= 10 **", 1)
    return "\n".join(lines) + "\n"

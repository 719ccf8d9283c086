"""Finding the program in a model's text.

The process that a program may harm does this, and starts for that program alone. So only what is built in is imported.
"""

import _ast
import builtins
import sys

FUNCTION = "simple_math_problem"
END_TOKENS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "</s>", "<eos>", "<pad>", "[PAD]")
MAX_CHARS = 1 << 16  # longer ones are refused unread: no answer to a word problem needs them

# What a program may import, and what that imports only when first needed.
MODULES: dict[str, tuple[str, ...]] = {
    "__future__": (),
    "bisect": (),
    "calendar": ("_strptime",),
    "cmath": (),
    "collections": ("collections.abc", "heapq"),
    "copy": (),
    "dataclasses": (),
    "datetime": ("_strptime",),
    "decimal": (),
    "enum": (),
    "fractions": (),
    "functools": ("types", "weakref", "typing"),
    "heapq": (),
    "itertools": (),
    "math": (),
    "numbers": (),
    "operator": (),
    "random": (),
    "re": (),
    "statistics": (),
    "string": (),
    "typing": (),
}

_PARSE, _INCOMPLETE = 0x400, 0x4000  # PyCF_ONLY_AST and PyCF_ALLOW_INCOMPLETE_INPUT, as in ast and codeop
_READINGS = 16  # of the whole text, counted in characters given to the parser
_CLOSING = ("#", ")", "]", "}")  # how a line begins that starts no statement; or with one of these words:
_CONTINUING = ("else", "elif", "except", "finally")
_DEFINITIONS = (_ast.FunctionDef, _ast.AsyncFunctionDef, _ast.ClassDef)
_IMPORTS = (_ast.Import, _ast.ImportFrom)
_ASSIGNMENTS = (_ast.Assign, _ast.AnnAssign, _ast.AugAssign)
_NEVER = (_ast.Raise, _ast.Assert, _ast.Delete)  # a function needs none of them at the top level
_BINDS_ANYTHING = ("exec", "globals", "locals", "vars")


def extract_program(text: str) -> str | None:
    """Cut the source that defines ``simple_math_problem`` out of a generated text.

    The text ends at the first end token. Where a fenced block of Python defines the function, the first that does and
    those before it are read, otherwise the whole text. Of it every statement at the top level is kept that parses, can
    run and may be needed. Left out are, for instance, imports of what programs may not import, statements that read a
    name which nothing has bound (often prose), and after the function all but definitions, imports and assignments.
    Where a statement does not parse, it is cut before the line of the error.

    This parses, and a text can be made to crash the parser: what a model wrote belongs to ``run_programs``, which
    calls this in the process that the program may harm.

    Returns:
        The source, None where there is no such function or the text is longer than ``MAX_CHARS``.
    """
    text = cut_at_end_token(text)
    if len(text) > MAX_CHARS or FUNCTION not in text:
        return None
    first: list[str] = []  # imports from __future__, which must come first
    kept: list[str] = []
    bound, found, lazy = set(dir(builtins)), False, sys.version_info >= (3, 14)
    for lines, statements in _statements(_code(text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", " "))):
        if all(isinstance(node, _ast.ImportFrom) and node.module == "__future__" for node in statements):
            first += lines
            lazy = True
            continue
        defines = any(isinstance(node, _ast.FunctionDef) and node.name == FUNCTION for node in statements)
        reads, binds = _names(statements, lazy)
        known = "*" in bound or reads <= bound | binds
        if defines or (known and all(_may_be_needed(node, found, reads) for node in statements)):
            kept += lines
            bound |= binds
            found |= defines
    return "\n".join(first + kept).rstrip() + "\n" if found else None


def cut_at_end_token(text: str) -> str:
    """Return the text up to the first end token of a usual tokenizer."""
    return min((text.split(token, 1)[0] for token in END_TOKENS), key=len)


def _code(text: str) -> str:
    """Return the fenced blocks of Python up to the first that defines the function, the whole text if none does."""
    blocks = []
    for block in text.split("```")[1::2]:
        language, _, source = block.partition("\n")
        if language.strip().lower() in ("", "py", "python", "python3"):
            blocks.append(_dedented(source))
            if any(map(_begins_the_function, source.split("\n"))):
                return "\n".join(blocks)
    return _dedented(text)


def _begins_the_function(line: str) -> bool:
    word, _, rest = line.strip().partition(" ")
    return word == "def" and rest.partition("(")[0].strip() == FUNCTION


def _dedented(source: str) -> str:
    """Return a source without what all its lines begin with, and without what its first line alone begins with."""
    source = source.lstrip("\ufeff")
    lines = source.split("\n")
    indents = [len(line) - len(line.lstrip()) for line in lines if line.strip()]
    depth = min(indents, default=0)
    return "\n".join(line[depth:] for line in lines).lstrip(" \t")


def _statements(text: str) -> list[tuple[list[str], list[_ast.stmt]]]:
    """Split a text into top-level statements, as their lines and what they parse to; what does not parse is left out.

    A statement begins in the first column. It ends before the next line there with which it is complete.
    """
    lines = text.split("\n")
    starts = [i for i, line in enumerate(lines) if _begins_a_statement(line)] + [len(lines)]
    parser = _Parser(_READINGS * len(text))
    found, first = [], 0
    while first < len(starts) - 1:
        last, statements = first + 1, parser.read(lines[starts[first] : starts[first + 1]])
        while statements is None and parser.wants_more and last < len(starts) - 1:
            last += 1
            statements = parser.read(lines[starts[first] : starts[last]])
        if statements is None:  # not a statement at all, or one whose first lines may be whole
            last = first + 1
        piece = lines[starts[first] : starts[last]]
        while statements is None and piece:
            piece = piece[: parser.line_of_error(piece) - 1]
            statements = parser.read(piece)
        if statements:
            found.append((piece, statements))
        first = last
    return found


def _begins_a_statement(line: str) -> bool:
    if not line.strip() or line[0].isspace() or line.startswith(_CLOSING):
        return False
    return not any(line.startswith(word) and not f"{line} "[len(word)].isidentifier() for word in _CONTINUING)


class _Parser:
    """Parses up to so many characters in all, and then nothing.

    Attributes:
        wants_more: Whether what was read last could be the beginning of something.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self.wants_more = False

    def read(self, lines: list[str]) -> list[_ast.stmt] | None:
        """Return the statements of a source; None where there is an error."""
        statements, error = self._parse(lines, _INCOMPLETE)
        self.wants_more = error is not None and error.msg == "incomplete input"
        return None if error is not None else statements

    def line_of_error(self, lines: list[str]) -> int:
        """Return the line of the error in a source as it stands, counted from 1."""
        _, error = self._parse(lines, 0)
        return min((error and error.lineno) or 1, len(lines))

    def _parse(self, lines: list[str], flags: int) -> tuple[list[_ast.stmt], SyntaxError | None]:
        self._budget -= sum(map(len, lines)) + 1
        if self._budget < 0:
            return [], None
        try:
            tree = compile("\n".join(lines) + "\n", "<program>", "exec", _PARSE | flags)
            compile(tree, "<program>", "exec")  # a return outside of a function is found only now
        except SyntaxError as error:
            return [], error
        except (ValueError, MemoryError, RecursionError):  # null bytes, lone surrogates, deep nesting
            return [], None
        return tree.body, None


def _may_be_needed(node: _ast.stmt, found: bool, reads: set[str]) -> bool:
    """Tell whether the function may need a statement, which parses and reads nothing unknown.

    Args:
        node: The statement.
        found: Whether it comes after the function.
        reads: What it reads.
    """
    if isinstance(node, _IMPORTS):
        modules = [node.module or ""] if isinstance(node, _ast.ImportFrom) else [each.name for each in node.names]
        return all(module.split(".")[0] in MODULES for module in modules)
    if isinstance(node, _DEFINITIONS):
        return True
    if found:  # it may be an example of how the function is called
        return isinstance(node, _ASSIGNMENTS) and FUNCTION not in reads
    if isinstance(node, _ast.Expr):
        return any(isinstance(each, _ast.Call) for each in _walk([node]))
    return not isinstance(node, _NEVER)


def _names(statements: list[_ast.stmt], lazy: bool) -> tuple[set[str], set[str]]:
    """Return which names statements read and bind when they run; "*" among those bound stands for any.

    Args:
        statements: The statements. The body of a function runs later; what it declares to be global may be bound.
        lazy: Whether annotations are not looked at.
    """
    reads: set[str] = set()
    binds: set[str] = set()
    for node in _walk(list(statements), lazy):
        if isinstance(node, _ast.Name):
            (reads if isinstance(node.ctx, _ast.Load) else binds).add(node.id)
            if node.id in _BINDS_ANYTHING:
                binds.add("*")
        elif isinstance(node, _ast.alias):
            binds.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, _ast.arg):
            binds.add(node.arg)
        elif isinstance(bound := getattr(node, "name", None) or getattr(node, "rest", None), str):
            binds.add(bound)  # by a definition, a handler or a pattern
        if isinstance(node, _ast.FunctionDef | _ast.AsyncFunctionDef):
            for each in _walk(list(node.body)):
                binds.update(each.names if isinstance(each, _ast.Global) else ())
    return reads, binds


def _walk(pending: list[object], lazy: bool = False) -> list[_ast.AST]:
    """Return the nodes below some that run when they do."""
    nodes: list[_ast.AST] = []
    while pending:
        node = pending.pop()
        if isinstance(node, list):
            pending += node
        if not isinstance(node, _ast.AST):
            continue
        nodes.append(node)
        later = isinstance(node, _ast.FunctionDef | _ast.AsyncFunctionDef | _ast.Lambda)
        skipped = ("body" if later else "", *(("annotation", "returns") if lazy else ()))
        pending += [getattr(node, field, None) for field in node._fields if field not in skipped]
    return nodes

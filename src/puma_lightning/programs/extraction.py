"""Finding the program in a model's text.

The process that a program may harm does this, and starts for that program alone. So only what is built in is imported.
"""

import _ast
import builtins

FUNCTION = "simple_math_problem"
END_TOKENS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "</s>", "<eos>", "<pad>", "[PAD]")
MAX_CHARS = 1 << 16  # longer ones are refused unread: no answer to a word problem needs them

_PARSE, _INCOMPLETE = 0x400, 0x4000  # PyCF_ONLY_AST and PyCF_ALLOW_INCOMPLETE_INPUT, as in ast and codeop
_READINGS = 16  # of the whole text, counted in characters given to the parser
_CONTINUES = ("#", ")", "]", "}", "else", "elif", "except", "finally")  # how a line begins that starts no statement


def extract_program(text: str) -> str | None:
    """Cut the source that defines ``simple_math_problem`` out of a generated text.

    The text ends at the first end token. Where a fenced block of Python defines the function, that block and those
    before it are read, otherwise the whole text. Of it every statement at the top level is kept that parses and can
    run: one that reads a name which nothing has bound is prose, or fails. Where a statement does not parse, it is cut
    before the line of the error.

    This parses, and a text can be made to crash the parser: what a model wrote belongs to ``run_programs``, which
    calls this in the process that the program may harm.

    Returns:
        The source, None where there is no such function or the text is longer than ``MAX_CHARS``.
    """
    text = cut_at_end_token(text)
    if len(text) > MAX_CHARS or f"def {FUNCTION}" not in text:
        return None
    kept: list[str] = []
    bound, found = set(dir(builtins)), False
    for lines, statements in _statements(_code(text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", " "))):
        defines = any(isinstance(node, _ast.FunctionDef) and node.name == FUNCTION for node in statements)
        reads, binds, acts = _names(statements)
        if defines or (acts and ("*" in bound or reads <= bound | binds)):
            kept += lines
            bound |= binds
            found |= defines
    return "\n".join(kept).rstrip() + "\n" if found else None


def cut_at_end_token(text: str) -> str:
    """Return the text up to the first end token of a usual tokenizer."""
    return min((text.split(token, 1)[0] for token in END_TOKENS), key=len)


def _code(text: str) -> str:
    """Return the fenced blocks of Python up to the first that defines the function, the whole text if none does."""
    blocks = []
    for block in text.split("```")[1::2]:
        language, _, source = block.partition("\n")
        if language.strip().lower() in ("", "py", "python", "python3"):
            blocks.append(source)
            if f"def {FUNCTION}" in source:
                return "\n".join(blocks)
    return text


def _statements(text: str) -> list[tuple[list[str], list[_ast.stmt]]]:
    """Split a text into top-level statements, as their lines and what they parse to; what does not parse is left out.

    A statement begins in the first column. It ends before the next line there with which it is complete.
    """
    lines = text.split("\n")
    starts = [i for i, line in enumerate(lines) if line.strip() and not line[0].isspace()]
    starts = [i for i in starts if not lines[i].startswith(_CONTINUES)] + [len(lines)]
    budget = _READINGS * len(text)
    found, first = [], 0
    while first < len(starts) - 1:
        last = first + 1
        piece = lines[starts[first] : starts[last]]
        statements, error = _parse(piece)
        while error is not None and error.msg == "incomplete input" and last < len(starts) - 1 and budget > 0:
            last += 1
            longer = lines[starts[first] : starts[last]]
            budget -= sum(map(len, longer))
            statements, error = _parse(longer)
            piece = longer if error is None else piece
        if error is not None:  # its first part may be whole
            last = first + 1
        while error is not None and piece and budget > 0:
            _, error = _parse(piece, 0)
            piece = piece[: min((error and error.lineno) or 1, len(piece)) - 1]
            budget -= sum(map(len, piece)) + 1
            statements, error = _parse(piece)
        if statements:
            found.append((piece, statements))
        first = last
    return found


def _parse(lines: list[str], flags: int = _INCOMPLETE) -> tuple[list[_ast.stmt], SyntaxError | None]:
    """Return the statements of a source; none and the error where it is no program."""
    try:
        tree = compile("\n".join(lines) + "\n", "<program>", "exec", _PARSE | flags)
        compile(tree, "<program>", "exec")  # a return outside of a function is found only now
    except SyntaxError as error:
        return [], error
    except (ValueError, MemoryError, RecursionError):  # null bytes, lone surrogates, deep nesting
        return [], None
    return tree.body, None


def _names(statements: list[_ast.stmt]) -> tuple[set[str], set[str], bool]:
    """Return which names statements read and bind when they run, and whether running them can have an effect.

    A function's body runs later, so it does not count.
    """
    reads: set[str] = set()
    binds: set[str] = set()
    acts = any(not isinstance(node, _ast.Expr) for node in statements)
    pending: list[object] = list(statements)
    while pending:
        node = pending.pop()
        if isinstance(node, list):
            pending += node
        if not isinstance(node, _ast.AST):
            continue
        acts |= isinstance(node, _ast.Call)
        if isinstance(node, _ast.Name):
            (reads if isinstance(node.ctx, _ast.Load) else binds).add(node.id)
        if isinstance(node, _ast.alias):
            binds.add((node.asname or node.name).split(".")[0])
        if isinstance(node, _ast.arg):
            binds.add(node.arg)
        bound = getattr(node, "name", None) or getattr(node, "rest", None)  # of definitions, handlers and patterns
        if isinstance(bound, str) and not isinstance(node, _ast.alias):
            binds.add(bound)
        later = isinstance(node, _ast.FunctionDef | _ast.AsyncFunctionDef | _ast.Lambda)
        pending += [getattr(node, field, None) for field in node._fields if not (later and field == "body")]
    return reads, binds, acts

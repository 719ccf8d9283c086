"""Finding the program in a model's text. Imported by the worker too, so only the standard library is used."""

import ast
import re

FUNCTION = "simple_math_problem"
END_TOKENS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "</s>", "<eos>", "<pad>", "[PAD]")
MAX_CHARS = 1 << 16  # longer ones are refused unread: no answer to a word problem needs them
_MAX_CUTS = 16  # every cut costs a parse

_FENCE = re.compile(r"```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_IMPORT = re.compile(r"import\s+\w|from\s+\w[\w.]*\s+import\s|@\w")


def extract_program(text: str) -> str | None:
    """Cut the source that defines ``simple_math_problem`` out of a generated text.

    The text ends at the first end token. A fenced block is preferred; otherwise the source begins at the first line
    that starts with ``def``, or at the imports directly above it. Where it does not parse, it is cut before the line
    of the error, at most 16 times.

    This parses, and a text can be made to crash the parser: what a model wrote belongs to ``run_programs``, which
    calls this in the process that the program may harm.

    Returns:
        The source, None where there is no such function or the text is longer than ``MAX_CHARS``.
    """
    text = cut_at_end_token(text)
    if len(text) > MAX_CHARS:
        return None
    lines = _candidate(text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", " ")).split("\n")
    for _ in range(_MAX_CUTS):
        source = "\n".join(lines)
        if f"def {FUNCTION}" not in source:
            return None
        try:
            body = ast.parse(source).body
        except SyntaxError as error:
            lines = lines[: min((error.lineno or 1), len(lines)) - 1]
        except (ValueError, MemoryError, RecursionError):  # null bytes, lone surrogates, deep nesting
            return None
        else:
            defined = any(isinstance(node, ast.FunctionDef) and node.name == FUNCTION for node in body)
            return source.rstrip() + "\n" if defined else None
    return None


def cut_at_end_token(text: str) -> str:
    """Return the text up to the first end token of a usual tokenizer."""
    return min((text.split(token, 1)[0] for token in END_TOKENS), key=len)


def _candidate(text: str) -> str:
    """Return the part of the text where the source begins, with junk perhaps behind it."""
    blocks: list[str] = _FENCE.findall(text)
    if blocks:
        return next((block for block in blocks if f"def {FUNCTION}" in block), blocks[0])
    lines = text.split("\n")
    first = next((i for i, line in enumerate(lines) if line.startswith("def ")), len(lines))
    start = first
    for i in range(first - 1, -1, -1):
        if _IMPORT.match(lines[i]):
            start = i
        elif lines[i].strip():
            break
    return "\n".join(lines[start:])

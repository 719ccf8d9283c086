"""When a program's result is the answer."""

import math
import re
from fractions import Fraction

TOLERANCE = 1e-3

# A sign before or after the currency, digits with or without commas in the right places, decimals.
_NUMBER = re.compile(r"([+-]?)\s*[$€£]?\s*([+-]?)((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)", re.ASCII)
_LONGEST = 1000  # characters; also below the length at which int() refuses


def parse_number(text: str) -> int | float | None:
    """Read a plain number such as ``72``, ``1,234``, ``-3`` or ``$10.50``.

    Nothing else may stand next to it: exponents, percent signs, units, NaN and infinity are no plain numbers.

    Returns:
        An int where there is no decimal point, None where the text is no plain number.
    """
    if len(text) > _LONGEST:
        return None
    match = _NUMBER.fullmatch(text.strip())
    if match is None or (match[1] and match[2]):
        return None
    digits = match[1] + match[2] + match[3].replace(",", "")
    if "." not in digits:
        return int(digits)
    number = float(digits)
    return number if math.isfinite(number) else None


def same_number(result: object, gold: int | float) -> bool:
    """Tell whether a result is the gold number, up to an absolute 1e-3.

    A string counts if it is a plain number (see ``parse_number``): TinyGSM programs now and then format their
    result. Booleans, NaN, infinities and everything that is not an int or a float are wrong.
    """
    if type(result) is str:
        result = parse_number(result)
    if type(result) is not int and type(result) is not float:
        return False
    if not (_finite(result) and _finite(gold)):
        return False
    # Fractions, because an int may be too large for a float.
    return abs(Fraction(result) - Fraction(gold)) <= TOLERANCE


def _finite(number: int | float) -> bool:
    return isinstance(number, int) or math.isfinite(number)

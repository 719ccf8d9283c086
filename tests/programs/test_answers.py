import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puma_lightning.programs import parse_number, same_number


@pytest.mark.parametrize(
    ("text", "number"),
    [("72", 72), ("1,234", 1234), ("-3", -3), ("$10.50", 10.5), ("-$1,000,000.25", -1000000.25), ("$-3", -3),
     (" +7 ", 7), (".5", 0.5), ("5.", 5.0), ("1" + "0" * 400, 10**400)],
)  # fmt: skip
def test_plain_numbers(text: str, number: int | float) -> None:
    assert parse_number(text) == number
    assert type(parse_number(text)) is type(number)


@pytest.mark.parametrize(
    "text",
    ["", ".", "-", "$", "abc", "1e5", "nan", "inf", "12,34", "1,2345", "5%", "7 apples", "--3", "-$-3", "1 2", "0x10",
     "1_000", "٣", "1\n2", "9" * 10**5, "9" * 400 + ".0"],
)  # fmt: skip
def test_no_plain_numbers(text: str) -> None:
    assert parse_number(text) is None


@given(st.integers(-(10**300), 10**300))
def test_every_int_in_every_writing(number: int) -> None:
    for text in (str(number), f"{number:,}", f" {number} "):
        assert parse_number(text) == number
        assert same_number(text, number)
    assert parse_number(f"${number:,}") == number


@given(st.floats(-1e15, 1e15))
def test_every_decimal(number: float) -> None:
    assert parse_number(f"{number:,.6f}") == pytest.approx(number, abs=1e-6)


@given(st.text())
def test_never_raises(text: str) -> None:
    number = parse_number(text)
    assert number is None or math.isfinite(number)
    assert same_number(text, 42) == (number is not None and abs(number - 42) <= 1e-3)


@given(st.integers() | st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_itself_and_no_other(number: int | float) -> None:
    assert same_number(number, number)
    assert not same_number(math.floor(number) - 1, number)
    assert not same_number(math.ceil(number) + 1, number)


@given(st.integers(-(10**9), 10**9), st.floats(-0.01, 0.01))
def test_tolerance(number: int, error: float) -> None:
    if abs(abs(error) - 1e-3) > 1e-5:
        assert same_number(number + error, number) == (abs(error) < 1e-3)


@pytest.mark.parametrize("result", [True, None, math.nan, math.inf, 42j, [42], b"42", "42 apples", "nan", 10**400])
def test_what_is_never_right(result: object) -> None:
    for gold in (1, 42, 42.0, math.nan):
        assert not same_number(result, gold)


def test_ints_beyond_floats() -> None:
    assert same_number(10**400, 10**400) and not same_number(10**400 + 1, 10**400)
    assert not same_number(1.5, 10**400)

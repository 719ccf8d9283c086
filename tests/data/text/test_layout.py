from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from puma_lightning.data.text.layout import Packer, check_examples, documents, lay_out, lay_out_prompts

EOS, MASK, V = 0, 1, 10
ids = st.lists(st.integers(2, V - 1), min_size=1, max_size=12)


@st.composite
def examples(draw: st.DrawFn) -> list[tuple[list[int], int] | None]:
    rows = []
    for tokens in draw(st.lists(st.none() | ids | st.just([]), min_size=1, max_size=6)):
        rows.append(None if tokens is None else (tokens, draw(st.integers(0, len(tokens)))))
    return rows


@given(examples(), st.integers(2, 10), st.sampled_from(["eos", "first_eos", "none"]), st.integers(1, 4))
def test_one_example_per_sequence(rows: Any, length: int, padding: Any, shortest: int) -> None:
    laid = lay_out(rows, length, EOS, padding, shortest)
    assert laid.tokens.shape == (len(laid.kept), length)
    assert len(rows) == len(laid.kept) + laid.counts.total() - laid.counts["cut"]
    cut = 0
    for row, tokens, prompt, end in zip(laid.kept, laid.tokens.tolist(), laid.prompt, laid.end, strict=True):
        whole, size = rows[row]
        if size == 0:
            whole, size = [EOS, *whole], 1
        # The first L - 1 tokens of what is too long, and at least one EOS.
        kept = whole[: length - 1]
        cut += len(whole) > length - 1
        assert tokens == kept + [EOS] * (length - len(kept))
        assert prompt == size
        assert end == {"eos": length, "first_eos": len(kept) + 1, "none": len(kept)}[padding]
        assert end - prompt >= shortest
        assert len(kept) > prompt or len(whole) == prompt  # never EOS alone in the place of an answer
    assert cut == laid.counts["cut"]
    for row, example in enumerate(rows):
        if example and example[0] and row not in laid.kept:
            size = max(example[1], 1)
            room = min(len(example[0]) + (example[1] == 0), length - 1)
            short = {"eos": length, "first_eos": room + 1, "none": room}[padding] - size < shortest
            cut_off = room <= size < len(example[0]) + (example[1] == 0)
            assert short or cut_off


@given(examples(), st.integers(2, 10), st.sampled_from(["eos", "first_eos", "none"]), st.integers(1, 4))
def test_the_reason_is_the_prompt_if_no_other_answer_would_do(
    rows: Any, length: int, padding: Any, shortest: int
) -> None:
    """Each row alone, then with its prompt kept and the answer that fills the sequence."""
    for row in filter(None, rows):
        laid = lay_out([row], length, EOS, padding, shortest)
        whole, size = row
        longest = (whole[:size] + [2] * max(length - 1 - max(size, 1), 1), size)
        skipped = bool(whole) and not len(laid.kept)
        would_do = len(lay_out([longest], length, EOS, padding, shortest).kept) == 1
        assert laid.counts["short answer"] == (skipped and would_do)
        assert laid.counts["without room for an answer"] == (skipped and not would_do)
        assert not (padding == "eos" and laid.counts["short answer"])


@pytest.mark.parametrize(
    ("padding", "reasons"),
    [("eos", {"without room for an answer": 1}), ("first_eos", {"without room for an answer": 1, "short answer": 1}),
     ("none", {"without room for an answer": 1, "short answer": 2})],
)  # fmt: skip
def test_reasons_by_padding(padding: Any, reasons: dict[str, int]) -> None:
    """At least 3 positions of 10: answers of 1, 2 and 3 tokens, and a prompt of 8."""
    rows: Any = [([2] * 4, 3), ([2] * 5, 3), ([2] * 6, 3), ([2] * 9, 8)]
    assert +lay_out(rows, 10, EOS, padding, 3).counts == reasons


@given(st.lists(st.none() | ids, min_size=1, max_size=6), st.integers(2, 10), st.integers(1, 4))
def test_prompts(prompts: Any, length: int, shortest: int) -> None:
    assume(length > shortest)
    laid = lay_out_prompts(prompts, length, MASK, shortest)
    assert laid.kept.tolist() == [i for i, p in enumerate(prompts) if p and len(p) <= length - shortest]
    for row, tokens, prompt, end in zip(laid.kept, laid.tokens.tolist(), laid.prompt, laid.end, strict=True):
        assert tokens == prompts[row] + [MASK] * (length - prompt) and (prompt, end) == (len(prompts[row]), length)
    assert laid.counts["empty"] == prompts.count(None)
    assert laid.counts.total() + len(laid.kept) == len(prompts)


@given(st.lists(examples(), max_size=5), st.integers(2, 7))
def test_packing_keeps_every_token_in_order(chunks: Any, length: int) -> None:
    pack, tokens, counts = Packer(length, EOS), [], Counter[str]()
    chunks = [[row and (row[0], 0) for row in rows] for rows in chunks]
    for rows in chunks:
        laid = pack(*documents(rows, EOS))
        assert (laid.tokens[:, 0] == EOS).all() and (laid.prompt == 1).all() and (laid.end == length).all()
        tokens += laid.tokens[:, 1:].ravel().tolist()
        counts += laid.counts
    filled = [row[0] for rows in chunks for row in rows if row and row[0]]
    assert tokens + pack.rest.tolist() == [token for text in filled for token in [*text, EOS]]
    assert len(pack.rest) < length - 1
    assert counts["empty"] == sum(map(len, chunks)) - len(filled)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([([2], 0)] * 2, "expected one example for each of 3 rows, got 2"),
        ([([2, 10], 0), None, None], r"expected token ids in 0..9, got 2..10"),
        ([([-1], 0), None, None], r"expected token ids in 0..9, got -1..-1"),
        ([([2, MASK], 0), None, None], "expected no mask token 1"),
        ([([2, 3], 3), None, None], r"expected a prompt of 0..2 .* got 3"),
    ],
)
def test_impossible_examples(rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_examples(rows, 3, V, MASK)


def test_packing_has_no_place_for_prompts() -> None:
    with pytest.raises(ValueError, match="set packing to false"):
        documents([([2, 3], 1)], EOS)


def test_possible_examples() -> None:
    check_examples([([2, 3], 2), ([], 0), None], 3, V, MASK)
    assert np.array_equal(documents([None, ([], 0)], EOS)[0], [])

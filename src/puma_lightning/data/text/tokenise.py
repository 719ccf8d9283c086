"""From rows to fixed-length sequences on disk, a bounded number of rows at a time."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from tqdm import tqdm

from puma_lightning.data.text.layout import (
    Example,
    Packer,
    Padding,
    Sequences,
    check_examples,
    documents,
    lay_out,
    lay_out_prompts,
)
from puma_lightning.data.text.rows import Rows, Selection
from puma_lightning.data.text.token_cache import TokenWriter

In = TypeVar("In")
Out = TypeVar("Out")
Answers = Callable[[Rows], list[str] | None]

_REASONS = {
    "empty": "{:,} empty rows skipped",
    "without room for an answer": "{:,} rows skipped whose prompt leaves too few positions for an answer",
    "short answer": "{:,} rows skipped whose answer has too few positions",
    "cut": "{:,} rows too long for a sequence cut",
    "left over": "{:,} tokens at the end left over",
}


@dataclass(frozen=True)
class Format:
    """How examples become sequences.

    Args:
        length: L.
        vocab_size: V.
        eos_id: EOS, and the padding.
        mask_id: The mask token.
        packing: Whether examples follow each other in a sequence.
        padding: See ``lay_out``; without packing.
        min_answer_length: See ``lay_out``; without packing.
    """

    length: int
    vocab_size: int
    eos_id: int
    mask_id: int
    packing: bool
    padding: Padding
    min_answer_length: int

    @property
    def hides_padding(self) -> bool:
        """Whether what follows an answer is padding rather than given."""
        return self.padding == "none" and not self.packing


def write_examples(
    writer: TokenWriter,
    rows: Selection,
    form: Format,
    encode: Callable[[Rows], Sequence[Example]],
    answers: Answers,
    description: str,
) -> None:
    """Write rows with their answers.

    Args:
        writer: Takes the sequences.
        rows: The rows.
        form: What the sequences look like.
        encode: Token ids and how many of them are the prompt, or None, for each row; called from two threads.
        answers: The gold answers of rows, if there are any; without packing.
        description: What the progress bar says.

    Raises:
        ValueError: If an example is impossible, or there is not one sequence.
    """

    def checked(some: Rows) -> Sequence[Example]:
        examples = encode(some)
        check_examples(examples, len(some.index), form.vocab_size, form.mask_id)
        return examples

    if not form.packing:

        def work(some: Rows) -> tuple[Sequences, list[str] | None]:
            laid = lay_out(checked(some), form.length, form.eos_id, form.padding, form.min_answer_length)
            return laid, _of_kept(laid, answers(some))

        return _write(writer, rows, ahead(work, _counted(writer, rows, description)), form.length)

    pack = Packer(form.length, form.eos_id)
    streams = ahead(lambda some: documents(checked(some), form.eos_id), _counted(writer, rows, description))
    _write(writer, rows, ((pack(stream, counts), None) for stream, counts in streams), form.length, pack)


def write_prompts(
    writer: TokenWriter,
    rows: Selection,
    form: Format,
    encode: Callable[[Rows], Sequence[list[int] | None]],
    answers: Answers,
    description: str,
    skip: bool,
) -> None:
    """Write rows of which only the prompts are known; everything after them is masked.

    Args:
        writer: Takes the sequences.
        rows: The rows.
        form: What the sequences look like.
        encode: Token ids of each row's prompt, or None; called from two threads.
        answers: The gold answers of rows, if there are any.
        description: What the progress bar says.
        skip: Whether empty prompts and those that leave no room for an answer are skipped, or an error.

    Raises:
        ValueError: If a prompt is impossible, or there is not one sequence.
    """

    def work(some: Rows) -> tuple[Sequences, list[str] | None]:
        prompts = encode(some)
        examples = [(ids, len(ids)) if ids else None for ids in prompts]
        check_examples(examples, len(some.index), form.vocab_size, form.mask_id)
        laid = lay_out_prompts(prompts, form.length, form.mask_id, form.min_answer_length)
        if not skip and len(laid.kept) < len(prompts):
            missing = min(set(range(len(prompts))) - set(laid.kept.tolist()))
            raise ValueError(
                f"{some.argument}: expected a prompt of 1 to {form.length - form.min_answer_length} tokens in row "
                f"{some.index[missing] + 1}, got one of {len(prompts[missing] or ())}; change it, or raise "
                "sequence_length"
            )
        return laid, _of_kept(laid, answers(some))

    _write(writer, rows, ahead(work, _counted(writer, rows, description)), form.length)


def describe(counts: Counter[str]) -> str:
    """Return in words what was left out; an empty text if nothing was."""
    return ", ".join(text.format(counts[reason]) for reason, text in _REASONS.items() if counts[reason])


def ahead(function: Callable[[In], Out], items: Iterable[In], threads: int = 2) -> Iterator[Out]:
    """Yield the function's result for each item, in order, while threads work on the next items.

    One thread turns tokens into arrays while the tokenizer works, on all cores, for another; few items are in memory.
    """
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Out]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()


def _counted(writer: TokenWriter, rows: Selection, description: str) -> Iterator[Rows]:
    with tqdm(total=len(rows), desc=description, unit=" rows", delay=2) as bar:
        for some in rows.read():
            yield some
            writer.rows += len(some.index)
            bar.update(len(some.index))


def _of_kept(sequences: Sequences, answers: list[str] | None) -> list[str] | None:
    return None if answers is None else [answers[i] for i in sequences.kept]


def _write(
    writer: TokenWriter,
    rows: Selection,
    parts: Iterable[tuple[Sequences, list[str] | None]],
    length: int,
    pack: Packer | None = None,
) -> None:
    for laid, answers in parts:
        writer.write(laid.tokens, laid.prompt, laid.end, answers)
        writer.counts.update(laid.counts)
    if pack is not None:
        writer.counts["left over"] = len(pack.rest)
    if not len(writer):
        reason = describe(writer.counts) or "there are no rows"
        raise ValueError(
            f"{rows.argument}: expected enough text for one sequence of {length} tokens, got none from "
            f"{writer.rows:,} rows ({reason}); give more, or change sequence_length"
        )

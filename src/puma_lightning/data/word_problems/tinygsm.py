"""TinyGSM as a DataModule: questions with programs to train on, GSM8K's questions to be judged by."""

from collections.abc import Sequence
from typing import Any

from puma_lightning.data.base import at_least, check_name
from puma_lightning.data.cache import DEFAULT_CACHE
from puma_lightning.data.text.datamodule import TextDataModule, Tokenize
from puma_lightning.data.text.layout import Example, Padding
from puma_lightning.data.text.rows import Rows, texts_of
from puma_lightning.data.text.sources import find_source
from puma_lightning.programs import parse_number


class TinyGSMDataModule(TextDataModule):
    """Word problems and programs that solve them: the question is the prompt, the program is what the model fills in.

    A sequence is question, separator, program, EOS. Validation has two sets: ``val``, rows held out of the training
    rows, for the loss; and ``gsm8k``, questions with gold answers, for programs that the model writes.

    Every ``*_file`` is a file, a glob (``data/*.jsonl``) or a list of these (.json, .jsonl, .csv, .tsv, .parquet;
    also compressed as .gz), or ``NAME[:CONFIG[:SPLIT]]`` on the Hugging Face hub. Tokenised text is kept in
    ``cache_dir``; a data set on the hub is taken to stay as it is.

    Args:
        train_file: Questions with programs.
        val_file: The same for validation; null to hold out a part of the training rows.
        gsm8k_file: Questions with gold answers (columns ``question`` and ``answer``: a number, or a text with the
            number after ``####``); null for none.
        test_file: The same for testing; null for ``gsm8k_file``.
        predict_file: Questions to answer, with or without gold answers; null for ``gsm8k_file``.
        question_column: The column with the questions.
        code_column: The column with the programs.
        answer_column: A column of gold answers in the validation rows, which their batches then carry; null for none.
        separator: What stands between question and program; part of the prompt.
        tokenizer: A ``tokenizer.json``, a folder with one or with ``vocab.json`` and ``merges.txt``, or a name on the
            hub. Null: a byte-level BPE is trained from the training rows.
        vocab_size: Size of a tokenizer that is trained, with EOS (id 0) and mask (id 1); null for 4,096. Any other
            tokenizer has its own size, which the attribute of this name tells.
        eos_token: Name of the token at the end of a program; null for the tokenizer's own (one of the usual names), or
            a new one.
        mask_token: Name of the mask token; added to the tokenizer if it has none of this name. (The paper uses
            ``<|im_start|>`` of ``Qwen/Qwen2-0.5B``.)
        sequence_length: L, in tokens. A longer row keeps its first L - 1 tokens, and EOS after them.
        padding: What is trained on after the program. ``eos``: all remaining positions, which are EOS, as in the paper.
            ``first_eos``: the first EOS; the rest of the sequence is EOS marked as given. ``none``: nothing, not even
            EOS: what follows is padding, of which an ``attention_mask`` tells, and no model learns to end. With either,
            a model that fills in any order knows in training how long the answer is, does not learn to end it, and
            fills all the room there is when it generates: take ``eos`` for one.
        min_answer_length: Skip rows with fewer positions to train on.
        num_train: Train on this many rows at most; null for all.
        num_val: Number of rows held out (null: a tenth, 1,000 at most), or read this many of ``val_file`` at most
            (null: all).
        num_gsm8k: Validate on this many questions at most; null for all.
        num_test: Test on this many questions at most; null for all.
        batch_size: Sequences in a training batch of one device.
        eval_batch_size: Sequences in a validation, test or prediction batch; null for ``batch_size``.
        num_workers: Processes that load batches; loading is fast enough for 0.
        seed: Chooses the rows that are held out.
        cache_dir: Where tokenised text is kept. The default follows ``$XDG_CACHE_HOME`` if set.

    Attributes:
        eos_id: EOS, which is also the padding.
        mask_id: The mask token; no text contains it.
        val_names: What the validation loaders hold, by position.
        test_names: What the test loaders hold, by position.

    Raises:
        ValueError: If an argument is out of range, or a file or the tokenizer can't be used.
    """

    def __init__(
        self,
        train_file: str | list[str] | None = "TinyGSM/TinyGSM",
        val_file: str | list[str] | None = None,
        gsm8k_file: str | list[str] | None = "openai/gsm8k:main",
        test_file: str | list[str] | None = None,
        predict_file: str | list[str] | None = None,
        question_column: str = "question",
        code_column: str = "code",
        answer_column: str | None = None,
        separator: str = "\n",
        tokenizer: str | None = None,
        vocab_size: int | None = None,
        eos_token: str | None = None,
        mask_token: str = "<|mask|>",
        sequence_length: int = 512,
        padding: Padding = "eos",
        min_answer_length: int = 1,
        num_train: int | None = None,
        num_val: int | None = None,
        num_gsm8k: int | None = None,
        num_test: int | None = None,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: str = DEFAULT_CACHE,
    ) -> None:
        super().__init__(
            train_file=train_file,
            val_file=val_file,
            test_file=test_file,
            predict_file=predict_file,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            eos_token=eos_token,
            mask_token=mask_token,
            sequence_length=sequence_length,
            packing=False,
            padding=padding,
            num_train=num_train,
            num_val=num_val,
            num_test=num_test,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            cache_dir=cache_dir,
        )
        self.question_column = check_name("question_column", question_column)
        self.code_column = check_name("code_column", code_column)
        self.answer_column = None if answer_column is None else check_name("answer_column", answer_column)
        if not isinstance(separator, str):
            raise ValueError(f"separator: expected a text, got {separator!r}; give one")
        self.separator = separator
        self.min_answer_length = at_least("min_answer_length", min_answer_length, 1)
        at_least("sequence_length", sequence_length, min_answer_length + 1)
        self.limits["gsm8k"] = None if num_gsm8k is None else at_least("num_gsm8k", num_gsm8k, 1)
        if gsm8k_file is not None:
            self.sources["gsm8k"] = find_source("gsm8k_file", gsm8k_file, "test")
            self.val_names = ["val", "gsm8k"]
            for name, given in (("test", test_file), ("predict", predict_file)):
                if given is None:
                    self.sources[name] = self.sources["gsm8k"]
            self._warn_of_training_data("gsm8k")

    def encode(self, rows: dict[str, list[Any]], tokenize: Tokenize) -> Sequence[Example]:
        prompts = self.encode_prompt(rows, tokenize)
        programs = tokenize([text.strip() for text in texts_of(rows, self.code_column)])
        return [
            (prompt + program, len(prompt)) if prompt and program else None
            for prompt, program in zip(prompts, programs, strict=True)
        ]

    def encode_prompt(self, rows: dict[str, list[Any]], tokenize: Tokenize) -> Sequence[list[int] | None]:
        (separator,) = tokenize([self.separator])
        questions = [text.strip() for text in texts_of(rows, self.question_column)]
        return [ids + separator if ids else None for ids in tokenize(questions)]

    def answers(self, rows: Rows, name: str) -> list[str] | None:
        column = "answer" if self.prompts_only(name) else self.answer_column
        if column is None or (name == "predict" and column not in rows):
            return None
        return [
            gold_answer(answer, f"{rows.argument}, row {index + 1}")
            for answer, index in zip(rows[column], rows.index, strict=True)
        ]

    def prompts_only(self, name: str) -> bool:
        return name in ("gsm8k", "test", "predict")


def gold_answer(answer: object, where: str = "answer") -> str:
    """Return the number in a gold answer, without thousands separators: ``"... #### 1,072"`` gives ``"1072"``.

    Args:
        answer: A number, or a text that is one or ends in one after ``####``.
        where: For the message.

    Raises:
        ValueError: If there is no number.
    """
    text = str(int(answer) if isinstance(answer, float) and answer.is_integer() else answer)
    number = parse_number(text.split("####")[-1].strip().removesuffix("."))
    if number is None:
        raise ValueError(
            f"{where}: expected a number as the gold answer, or one after ####, got {text[-80:]!r}; correct the answer"
        )
    return str(number)

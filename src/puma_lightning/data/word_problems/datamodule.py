"""Built-in word problems as a DataModule: questions, programs and gold answers without a download."""

from typing import TYPE_CHECKING, Any, Literal, cast

from puma_lightning.data.base import in_range
from puma_lightning.data.cache import DEFAULT_CACHE
from puma_lightning.data.text.layout import Padding
from puma_lightning.data.word_problems.generate import make_problems
from puma_lightning.data.word_problems.tinygsm import TinyGSMDataModule

if TYPE_CHECKING:
    from datasets import Dataset

# Part of the cache's name: raise it when the same seed gives other problems than before.
VERSION = 1
# They are made in memory, and templates do not give many more.
_MOST = 10_000_000
_VOCAB_SIZE = 1024  # of a tokenizer that is trained


class WordProblemsDataModule(TinyGSMDataModule):
    """Word problems made from templates, in TinyGSM's format: the question is the prompt, the program the answer.

    No template has the same numbers in two of training, validation and test set. All sets have programs and gold
    answers, so validation gives the loss and the share of right programs on the same problems.

    Args:
        num_train: Number of training problems.
        num_val: Number of validation problems.
        num_test: Number of test problems.
        predict_file: Questions of your own to answer, with or without gold answers; null for the test problems.
        tokenizer: A ``tokenizer.json``, a folder with one or with ``vocab.json`` and ``merges.txt``, or a name on the
            hub. Null: a byte-level BPE is trained from the training problems.
        vocab_size: Size of a tokenizer that is trained, with EOS (id 0) and mask (id 1); null for 1,024.
        sequence_length: L, in tokens.
        padding: What is trained on after the program: ``eos``, ``first_eos`` or ``none``, see ``TinyGSMDataModule``.
        batch_size: Sequences in a training batch of one device.
        eval_batch_size: Sequences in a validation, test or prediction batch; null for ``batch_size``.
        num_workers: Processes that load batches; loading is fast enough for 0.
        seed: Chooses the problems.
        cache_dir: Where tokenised text is kept. The default follows ``$XDG_CACHE_HOME`` if set.

    Raises:
        ValueError: If an argument is out of range, or the tokenizer can't be used.
    """

    def __init__(
        self,
        num_train: int = 100_000,
        num_val: int = 500,
        num_test: int = 1_000,
        predict_file: str | list[str] | None = None,
        tokenizer: str | None = None,
        vocab_size: int | None = None,
        sequence_length: int = 96,
        padding: Padding = "eos",
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: str = DEFAULT_CACHE,
    ) -> None:
        for name, number in (("num_train", num_train), ("num_val", num_val), ("num_test", num_test)):
            in_range(name, number, 1, _MOST)
        super().__init__(
            train_file=None,
            gsm8k_file=None,
            predict_file=predict_file,
            answer_column="answer",
            tokenizer=tokenizer,
            vocab_size=_VOCAB_SIZE if vocab_size is None and tokenizer is None else vocab_size,
            sequence_length=sequence_length,
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
        self.held_out = False

    def load(self, name: str) -> "Dataset":
        if name in self.sources:
            return super().load(name)
        from datasets import Dataset

        recipe = self.identity(name)
        split = cast(Literal["train", "val", "test"], recipe["split"])
        return Dataset.from_list(make_problems(recipe["number"], self.seed, split, progress=True))

    def identity(self, name: str) -> dict[str, Any]:
        if name in self.sources:
            return super().identity(name)
        split = "test" if name == "predict" else name
        return {"word_problems": VERSION, "split": split, "number": self.limits[split], "seed": self.seed}

    def has(self, name: str) -> bool:
        return True

    def prompts_only(self, name: str) -> bool:
        return name == "predict"

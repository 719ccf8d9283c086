"""Text as a DataModule: rows from files or the hub, a tokenizer, sequences of one length kept on disk."""

from puma_lightning.data.text.datamodule import TextDataModule, TextUnit, Tokenize
from puma_lightning.data.text.layout import Example, Padding

__all__ = ["Example", "Padding", "TextDataModule", "TextUnit", "Tokenize"]

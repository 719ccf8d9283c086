"""Text as a DataModule: files or the hub, a tokenizer, sequences of fixed length, and a cache on disk."""

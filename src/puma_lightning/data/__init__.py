"""DataModules: Sudoku, text and word problems. What a DataModule of yours may offer is in ``base.py``."""

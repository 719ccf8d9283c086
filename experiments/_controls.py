"""What is not worth having in a library, and is needed to tell causes apart."""

from torch.utils.data import DataLoader

from puma_lightning.data.batch import Batch
from puma_lightning.data.sudoku.datamodule import SudokuDataModule


class UnshuffledSudoku(SudokuDataModule):
    """The same batches in every pass over the data, in the same order."""

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return training batches in the order of the data."""
        return self._loader(self._sets["train"][0], self.batch_size, shuffle=False)

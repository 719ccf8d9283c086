"""What a training run needs besides the method: objects with one task each, which a LightningModule holds."""

"""What the model says: predictions, the output layer without its logits, drawn tokens, losses, alignment."""

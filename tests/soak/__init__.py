"""Random runs are killed at random, resumed, and compared bit by bit with the same runs left alone."""

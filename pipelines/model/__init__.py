"""The classifier itself: batches of windows, the forward pass, and `Scorer`."""

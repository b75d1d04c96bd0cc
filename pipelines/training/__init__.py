"""Fine-tuning: losses, optimizer, data order, the training loop and its checkpoints."""

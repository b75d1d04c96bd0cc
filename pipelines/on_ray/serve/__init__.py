"""The online server: one Ray Serve deployment that answers HTTP with the same `Scorer` as everything else."""

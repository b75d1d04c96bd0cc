"""Scoring of many files: the job, its work units, the output folder and its summary."""

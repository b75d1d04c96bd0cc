"""Estimate how long requests take, from the forward passes so far."""

from __future__ import annotations

LONG_PASS_SECONDS = 0.1
"""A pass of at least this duration shows what the model can do. In shorter ones, fixed costs count too much."""


class Rate:
    """Tokens per second of a model in large forward passes.

    Windows with the same tokens are computed once, so repetitive texts make the estimate too high: less is refused.
    """

    def __init__(self, tokens_per_second: float | None = None) -> None:
        """Take a first estimate. None means that nothing is known yet."""
        self.tokens_per_second = tokens_per_second

    def add(self, num_tokens: int, seconds: float) -> None:
        """Learn from a forward pass. A short one can only raise the estimate."""
        found = num_tokens / max(seconds, 1e-6)
        before = self.tokens_per_second
        if before is None or found > before:
            self.tokens_per_second = found
        elif seconds >= LONG_PASS_SECONDS:
            self.tokens_per_second = (before + found) / 2

    def seconds(self, num_tokens: int) -> float:
        """Return the estimated duration of a number of tokens. 0 if nothing is known yet."""
        return num_tokens / self.tokens_per_second if self.tokens_per_second else 0.0

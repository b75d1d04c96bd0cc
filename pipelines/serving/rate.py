"""Estimate how long forward passes and requests take, from the forward passes so far."""

from __future__ import annotations

import math

import numpy as np

KEPT = 0.9
"""Weight of the earlier passes when one more is counted."""
LEAST_SPREAD = 0.5
"""Passes differ enough to tell their fixed cost from that of their tokens, if the standard deviation of their tokens is
this share of the mean."""
MOST_GROWTH = 4
"""A pass has at most this many times the tokens of the largest one so far."""


class Rate:
    """How long forward passes take: a fixed time for each, and a time for each token.

    Windows with the same tokens are computed once, so repetitive texts make the estimate too high: less is refused.
    """

    def __init__(self, tokens_per_second: float | None = None) -> None:
        """Take a first estimate, of one second. None means that nothing is known yet."""
        self.tokens_per_second: float | None = None
        """In large passes. Short texts say nothing about long ones, because of the fixed time of each pass."""
        self._sums = np.zeros(5)
        """Of the passes, the later ones with more weight: number, tokens, seconds, tokens**2, tokens * seconds."""
        self._fixed, self._per_token, self._is_told_apart = 0.0, 0.0, False
        self._last, self._largest = 0, 0
        if tokens_per_second is not None:
            self._sums[0] = 1  # a pass of no tokens in no time
            self.add(round(tokens_per_second), 1.0)

    def add(self, num_tokens: int, seconds: float) -> None:
        """Learn from a forward pass."""
        seconds = max(seconds, 1e-6)
        self._last, self._largest = num_tokens, max(self._largest, num_tokens)
        found, before = num_tokens / seconds, self.tokens_per_second
        if before is None or found > before:
            self.tokens_per_second = found
        elif num_tokens >= self._largest / 4:
            self.tokens_per_second = (before + found) / 2
        passed = [1, num_tokens, seconds, num_tokens**2, num_tokens * seconds]
        self._sums = KEPT * self._sums + np.array(passed, np.float64)
        self._tell_apart()

    def _tell_apart(self) -> None:
        """Divide the time of the passes into what is fixed and what their tokens take."""
        tokens, seconds, squares, products = self._sums[1:] / self._sums[0]
        variance = squares - tokens**2
        if variance > (LEAST_SPREAD * tokens) ** 2:
            slope = (products - tokens * seconds) / variance
            self._per_token = min(max(slope, 0.0), seconds / tokens)
            self._fixed, self._is_told_apart = seconds - self._per_token * tokens, True
        elif self._is_told_apart:  # as before, but slower or quicker
            factor = seconds / (self._fixed + self._per_token * tokens)
            self._fixed, self._per_token = self._fixed * factor, self._per_token * factor
        elif tokens:
            self._per_token = seconds / tokens

    def seconds(self, num_tokens: int) -> float:
        """Return the estimated duration of a number of tokens in large passes. 0 if nothing is known yet."""
        return num_tokens / self.tokens_per_second if self.tokens_per_second else 0.0

    def pass_tokens(self, seconds: float) -> float:
        """Return how many tokens make a forward pass of this duration. inf if nothing is known yet.

        If the fixed time alone takes more than half of it, it is as many as take the fixed time once more. If several
        passes do not tell what is fixed, because they are equally large, the next one may be twice as large.
        """
        if not self._largest:
            return math.inf
        plain = float(seconds * self._sums[1] / self._sums[2])  # if nothing were fixed
        if not self._is_told_apart:
            return max(plain, 2.0 * self._last if self._sums[0] > 1 else 1.0)
        wanted = max(seconds - self._fixed, self._fixed) / max(self._per_token, 1e-12)
        return max(min(wanted, float(MOST_GROWTH * self._largest)), plain, 1.0)

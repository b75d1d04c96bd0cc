"""Compute how many replicas a server needs, from the waiting tokens and the busy time of its replicas.

Ray Serve calls the policy every few seconds. It also applies the bounds and the delays (`upscale_delay_s`,
`downscale_delay_s`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from pipelines.fields import parse_range
from pipelines.serving.settings import ServeSettings

MOST_BUSY = 0.8
"""Target share of time in which a replica's model runs. Above it, waiting times grow too fast."""
LOOK_BACK_S = 10.0
QUEUED, BUSY = "queued_tokens", "busy"
"""Names of the metrics of a replica."""


def replicas_needed(queued_tokens: float, busy: float, target_queued_tokens: int) -> int:
    """Return the number of replicas that the load needs.

    Args:
        queued_tokens: Tokens that wait for a forward pass, in all replicas together.
        busy: Sum over replicas of the share of time in which a forward pass runs.
        target_queued_tokens: Waiting tokens for which one replica is enough.
    """
    return max(math.ceil(queued_tokens / target_queued_tokens), math.ceil(busy / MOST_BUSY))


class QueuedTokensPolicy:
    """Autoscaling policy of Ray Serve for the predictor deployment."""

    def __init__(self, target_queued_tokens: int) -> None:
        self._target = target_queued_tokens

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Return the number of replicas that are needed. Without replicas, one is needed if proxies have requests."""
        if not context.running_replicas:
            return int(bool(context.total_queued_requests)), {}
        reported: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
        queued, busy = (sum(reported.get(name, {}).values()) for name in (QUEUED, BUSY))
        return replicas_needed(queued, busy, self._target), {}


def autoscaling_of(settings: ServeSettings) -> AutoscalingConfig | None:
    """Return Ray Serve's configuration for num_replicas=MIN:MAX, or None for a fixed number."""
    fewest, most = parse_range("num_replicas", settings.num_replicas)
    if fewest == most:
        return None
    policy = AutoscalingPolicy(
        policy_function=f"{__name__}:{QueuedTokensPolicy.__name__}",
        policy_kwargs={"target_queued_tokens": settings.target_queued_tokens},
    )
    return AutoscalingConfig(
        min_replicas=fewest,
        max_replicas=most,
        initial_replicas=max(fewest, 1),
        look_back_period_s=LOOK_BACK_S,
        upscale_delay_s=settings.upscale_delay_s,
        downscale_delay_s=settings.downscale_delay_s,
        policy=policy,
    )

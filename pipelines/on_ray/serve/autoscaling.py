"""How many replicas a server needs, from what its replicas report: the tokens that wait, and how busy they are.

Ray Serve asks the policy every few seconds, and applies bounds and delays (`upscale_delay_s`, `downscale_delay_s`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from pipelines.settings import ServeSettings, parse_range

MOST_BUSY = 0.8
"""Share of the time in which a replica's model may run; above, waiting times grow out of proportion."""
LOOK_BACK_S = 10.0
QUEUED, BUSY = "queued_tokens", "busy"
"""What a replica reports."""


def replicas_needed(queued_tokens: float, busy: float, target_queued_tokens: int) -> int:
    """Replicas for so many waiting tokens, and so many replicas' worth of running forward passes."""
    return max(math.ceil(queued_tokens / target_queued_tokens), math.ceil(busy / MOST_BUSY))


class QueuedTokensPolicy:
    """Ray Serve's policy for the predictor."""

    def __init__(self, target_queued_tokens: int) -> None:
        self._target = target_queued_tokens

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The replicas wanted; without any, what waits at the proxies asks for the first."""
        if not context.running_replicas:
            return int(bool(context.total_queued_requests)), {}
        reported: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
        queued, busy = (sum(reported.get(name, {}).values()) for name in (QUEUED, BUSY))
        return replicas_needed(queued, busy, self._target), {}


def autoscaling_of(settings: ServeSettings) -> AutoscalingConfig | None:
    """Ray Serve's configuration for num_replicas=MIN:MAX; None for a fixed number."""
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

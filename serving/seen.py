"""What operators see of an engine: Prometheus metrics by model and version.

Ray exports them on each node's metrics port with the prefix `ray_`; the names after it follow those
that vLLM made common, so that dashboards carry over.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from serving.engines.base import Event, Failed, Finished, Predicted, Started, Stats, Tokens

TAGS = ("model", "version")
SECONDS = 1.0
"""Gauges are as old as this at most."""
FIRST_TOKEN = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]
PER_TOKEN = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1]
GAUGES: Mapping[str, tuple[str, Callable[[Stats], float]]] = {
    "heliostat_num_requests_running": ("requests in a slot", lambda s: s.running),
    "heliostat_num_requests_waiting": ("requests that wait for one", lambda s: s.waiting),
    "heliostat_queued_tokens": ("accepted work, in tokens", lambda s: s.queued_tokens),
    "heliostat_kv_cache_usage": (
        "share of the cache in use, 0 to 1",
        lambda s: s.cache_tokens / s.cache_capacity if s.cache_capacity else 0.0,
    ),
}
COUNTERS: Mapping[str, tuple[str, Callable[[Stats], float]]] = {
    "heliostat_prompt_tokens": ("tokens of accepted prompts", lambda s: s.prompt_tokens_total),
    "heliostat_prefix_cache_hit_tokens": (
        "tokens of them that were in the cache",
        lambda s: s.cached_tokens_total,
    ),
    "heliostat_generation_tokens": ("tokens generated", lambda s: s.completion_tokens_total),
}


class Meter:
    """Metrics of one loaded model.

    Args:
        stats: of its engine, at this moment.
    """

    def __init__(self, model: str, version: str, stats: Callable[[], Stats]) -> None:
        self._stats = stats
        tags = {"model": model, "version": version}

        def made(kind: Any, name: str, text: str, *more: Any, keys: tuple[str, ...] = TAGS) -> Any:
            metric = kind(name, text, *more, tag_keys=keys)
            metric.set_default_tags(tags)
            return metric

        self._gauges = {n: made(Gauge, n, text) for n, (text, _) in GAUGES.items()}
        self._counters = {n: made(Counter, n, text) for n, (text, _) in COUNTERS.items()}
        self._counted = dict.fromkeys(COUNTERS, 0.0)
        self._first = made(
            Histogram, "heliostat_time_to_first_token_seconds", "from arrival", FIRST_TOKEN
        )
        self._per_token = made(
            Histogram, "heliostat_time_per_output_token_seconds", "after the first", PER_TOKEN
        )
        self._ended = made(
            Counter, "heliostat_requests", "ended, by reason", keys=(*TAGS, "reason")
        )
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    def close(self) -> None:
        self._watching.cancel()
        self.publish(self._stats())
        self.publish(Stats(0, 0))

    async def watched(self, events: AsyncIterator[Event]) -> AsyncIterator[Event]:
        """The events as they are, timed."""
        began, first, reason = time.monotonic(), 0.0, "cancelled"
        try:
            async with aclosing(events) as coming:  # type: ignore[type-var]
                async for event in coming:
                    if isinstance(event, Tokens) and not first:
                        first = time.monotonic()
                        self._first.observe(first - began)
                    if isinstance(event, Finished) and event.completion_tokens > 1:
                        spent = time.monotonic() - first
                        self._per_token.observe(spent / (event.completion_tokens - 1))
                    reason = _reason(event, reason)
                    yield event
        finally:
            self._ended.inc(tags={"reason": reason})

    def publish(self, now: Stats) -> None:
        for name, gauge in self._gauges.items():
            gauge.set(GAUGES[name][1](now))
        for name, counter in self._counters.items():
            total = COUNTERS[name][1](now)
            if total > self._counted[name]:
                counter.inc(total - self._counted[name])
                self._counted[name] = total

    async def _watch(self) -> None:
        while True:
            self.publish(self._stats())
            await asyncio.sleep(SECONDS)


def _reason(event: Event, before: str) -> str:
    """`stop` or `length` of a finished text, `answered`, `failed`, `refused`."""
    if isinstance(event, Finished):
        return event.reason
    if isinstance(event, Failed):
        return "failed" if event.status in (500, 502) else "refused"
    if isinstance(event, Predicted):
        return "answered"
    return before if isinstance(event, Started | Tokens) else "answered"

"""How much a key may ask: requests and tokens per minute, and calls at once. Pure: time is given.

Each minute's allowance is a bucket that refills steadily, so that a burst is taken at once and a
steady stream never waits for a minute to end.
"""

import math
from dataclasses import dataclass, field

from serving.auth import Quota

MINUTE = 60.0


@dataclass(frozen=True)
class Verdict:
    """Whether a call is taken, and the headers that say what is left."""

    headers: dict[str, str]
    refusal: str | None = None
    """Why it is not."""
    retry_after: int = 0
    """Seconds after which it would be."""


@dataclass
class Bucket:
    """Holds up to a minute's allowance; may fall below zero when a call took more than expected."""

    size: int
    level: float
    at: float

    def refill(self, now: float) -> None:
        self.level = min(self.size, self.level + (now - self.at) * self.size / MINUTE)
        self.at = now

    def seconds_until(self, amount: float) -> float:
        """From its last refill."""
        return max(0.0, (min(amount, self.size) - self.level) * MINUTE / self.size)


@dataclass
class _Account:
    requests: Bucket | None
    tokens: Bucket | None
    calls: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Call -> (when it is over at the latest, tokens that it was charged)."""


class Ledger:
    """What the keys have used."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}

    def admit(
        self, key: str, quota: Quota, call: str, tokens: int, now: float, ends: float
    ) -> Verdict:
        """Charge a call, or refuse it and charge nothing.

        Args:
            tokens: what it may take at most.
            ends: when it is over at the latest; a place that is never given back is free then.
        """
        account = self._account(key, quota, now)
        refusal, seconds = _refusal(account, quota, tokens)
        if refusal is None:
            if account.requests:
                account.requests.level -= 1
            if account.tokens:
                account.tokens.level -= tokens
            account.calls[call] = (ends, tokens)
        return Verdict(_headers(account), refusal, max(1, math.ceil(seconds)) if refusal else 0)

    def settle(self, key: str, call: str, tokens: int) -> None:
        """A call is over: its place is free, and it took these tokens instead of the most."""
        account = self._accounts.get(key)
        known = account.calls.pop(call, None) if account else None
        if account is not None and known is not None and account.tokens:
            account.tokens.level += known[1] - tokens

    def _account(self, key: str, quota: Quota, now: float) -> _Account:
        account = self._accounts.setdefault(key, _Account(None, None))
        account.requests = _bucket(account.requests, quota.requests_per_minute, now)
        account.tokens = _bucket(account.tokens, quota.tokens_per_minute, now)
        account.calls = {c: known for c, known in account.calls.items() if known[0] > now}
        return account


def _bucket(bucket: Bucket | None, size: int | None, now: float) -> Bucket | None:
    """The bucket now; a new one, full, where the allowance has changed."""
    if size is None:
        return None
    if bucket is None or bucket.size != size:
        return Bucket(size, size, now)
    bucket.refill(now)
    return bucket


def _refusal(account: _Account, quota: Quota, tokens: int) -> tuple[str | None, float]:
    """The first limit in the way, and the seconds until it is not."""
    if quota.concurrent is not None and len(account.calls) >= quota.concurrent:
        return f"this key has {len(account.calls)} calls open and may have {quota.concurrent}", 1.0
    if account.requests and account.requests.level < 1:
        waiting = account.requests.seconds_until(1)
        return f"this key may send {quota.requests_per_minute} requests a minute", waiting
    if account.tokens and account.tokens.level < min(tokens, account.tokens.size):
        waiting = account.tokens.seconds_until(tokens)
        wanted = f"this call may take {tokens}"
        return f"this key may use {quota.tokens_per_minute} tokens a minute and {wanted}", waiting
    return None, 0.0


def _headers(account: _Account) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, bucket in (("requests", account.requests), ("tokens", account.tokens)):
        if bucket is not None:
            found[f"x-ratelimit-limit-{name}"] = str(bucket.size)
            found[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(bucket.level)))
            found[f"x-ratelimit-reset-{name}"] = f"{bucket.seconds_until(bucket.size):.3f}s"
    return found

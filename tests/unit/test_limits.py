"""What a key may use: decided by numbers and times that are given."""

import random

from serving.auth import Quota
from serving.limits import Ledger


def admit(
    ledger: Ledger, quota: Quota, now: float, tokens: int = 1, call: str | None = None
) -> str | None:
    name = call or f"call{random.random()}"
    return ledger.admit("key", quota, name, tokens, now, now + 60).refusal


def test_a_minutes_requests_come_at_once_or_spread_and_never_more() -> None:
    ledger, quota = Ledger(), Quota(requests_per_minute=6)
    assert [admit(ledger, quota, 0.0) is None for _ in range(8)] == [True] * 6 + [False] * 2
    assert [admit(ledger, quota, at) is None for at in (9.9, 10.0, 10.1)] == [False, True, False]
    steady = Ledger()
    assert all(admit(steady, quota, 10.0 * n) is None for n in range(100))


def test_limits_hold_over_any_stretch_of_random_calls() -> None:
    rng = random.Random(1)
    ledger, quota = Ledger(), Quota(requests_per_minute=30, tokens_per_minute=1000)
    now, taken, used = 0.0, 0, 0
    for _ in range(3000):
        now += rng.expovariate(2.0)
        tokens = rng.randint(1, 60)
        if admit(ledger, quota, now, tokens) is None:
            taken, used = taken + 1, used + tokens
    assert taken <= 30 + 30 * now / 60 and used <= 1000 + 1000 * now / 60
    assert used > 0.9 * 1000 * now / 60


def test_what_was_not_used_comes_back() -> None:
    ledger, quota = Ledger(), Quota(tokens_per_minute=100)
    assert admit(ledger, quota, 0.0, 90, "first") is None
    assert "tokens a minute" in (admit(ledger, quota, 0.0, 20) or "")
    ledger.settle("key", "first", 10)
    assert admit(ledger, quota, 0.0, 90, "second") is None
    # More than was expected counts as well, and the next call waits for it.
    ledger.settle("key", "second", 190)
    assert admit(ledger, quota, 30.0, 1) is not None
    assert admit(ledger, quota, 61.0, 1) is None


def test_a_call_above_a_minutes_allowance_waits_for_a_full_one() -> None:
    ledger, quota = Ledger(), Quota(tokens_per_minute=100)
    assert admit(ledger, quota, 0.0, 500) is None
    verdict = ledger.admit("key", quota, "next", 500, 0.0, 60.0)
    assert verdict.retry_after == 300


def test_places_are_given_back_and_lost_ones_fall_free() -> None:
    ledger, quota = Ledger(), Quota(concurrent=2)
    assert [admit(ledger, quota, 0.0, call=c) for c in "ab"] == [None, None]
    assert "2 calls open" in (admit(ledger, quota, 0.0, call="c") or "")
    ledger.settle("key", "a", 0)
    ledger.settle("key", "a", 0)  # told twice
    assert [admit(ledger, quota, 1.0, call=c) is None for c in "cd"] == [True, False]
    assert admit(ledger, quota, 61.5, call="e") is None


def test_headers_say_what_is_left_and_when_to_come_back() -> None:
    ledger, quota = Ledger(), Quota(requests_per_minute=2, tokens_per_minute=600)
    verdict = ledger.admit("key", quota, "a", 100, 0.0, 60.0)
    assert verdict.headers == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "1",
        "x-ratelimit-reset-requests": "30.000s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "500",
        "x-ratelimit-reset-tokens": "10.000s",
    }
    refused = [ledger.admit("key", quota, name, 1, 0.0, 60.0) for name in "bc"][1]
    assert refused.refusal is not None and refused.retry_after == 30


def test_keys_do_not_share() -> None:
    ledger, quota = Ledger(), Quota(requests_per_minute=1)
    assert ledger.admit("one", quota, "a", 1, 0.0, 60.0).refusal is None
    assert ledger.admit("two", quota, "b", 1, 0.0, 60.0).refusal is None
    assert ledger.admit("one", quota, "c", 1, 0.0, 60.0).refusal is not None

"""Requests and tokens per minute, by token buckets: a minute's worth at once, then as it comes back.

Over t seconds at most limit * (1 + t / 60) get through. Buckets live in this process: several servers that
share a database each have their own, which is said in the documentation.

Knows limits, numbers and a clock; must not know HTTP, or where limits come from.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from toptwo.accounts.caller import Caller, Limits

Clock = Callable[[], float]

MINUTE = 60.0


class Bucket:
    """So many units a minute."""

    def __init__(self, limit: int, clock: Clock = time.monotonic) -> None:
        self.limit = limit
        self._clock = clock
        self._level, self._at = float(limit), clock()
        self._promised = 0.0  # until when units are told to those who were refused

    @property
    def remaining(self) -> int:
        """Whole units that can be taken now."""
        return math.floor(self._refill() + 1e-9)

    @property
    def reset_seconds(self) -> float:
        """How long until it is full again if nothing is taken."""
        return (self.limit - self._refill()) * MINUTE / self.limit

    def wait_for(self, count: int) -> float:
        """Seconds until so many can be taken; 0 for now, infinite where there are never so many."""
        if count > self.limit:
            return math.inf
        return max(0.0, count - self._refill() - 1e-9) * MINUTE / self.limit

    def promise(self, count: int) -> float:
        """Seconds after which so many should be there for whoever is refused now, no more than a minute.

        Each who is refused is told of other units than those refused before.
        """
        now = self._clock()
        earliest = now + self.wait_for(count)
        behind_others = self._promised + count * MINUTE / self.limit
        self._promised = min(max(earliest, behind_others), now + MINUTE)
        return self._promised - now

    def take(self, count: int) -> None:
        """Take so many; the caller has asked whether they are there."""
        self._level = self._refill() - count

    def give_back(self, count: int) -> None:
        """Those of the taken ones that turned out not to be needed."""
        self._level = min(float(self.limit), self._refill() + count)

    def resize(self, limit: int) -> None:
        """Another limit from now on; what has been taken stays taken."""
        taken = self.limit - self._refill()
        self.limit = limit
        self._level = limit - taken

    def _refill(self) -> float:
        now = self._clock()
        self._level = min(float(self.limit), self._level + (now - self._at) * self.limit / MINUTE)
        self._at = now
        return self._level


@dataclass
class OwnerBuckets:
    """Those of one key or one account. whose: "key" or "account"."""

    whose: str
    requests: Bucket | None = None
    tokens: Bucket | None = None


class RateLimits:
    """The buckets of everybody who has limits. Only accepted keys come here, so it is bounded."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._owners: dict[str, OwnerBuckets] = {}

    def of(self, caller: Caller) -> list[OwnerBuckets]:
        """The buckets that a caller's requests and tokens come out of."""
        owners = [self._owner("key", caller.key_id, caller.key_limits)]
        if caller.account_id is not None:
            owners.append(self._owner("account", caller.account_id, caller.account_limits))
        return owners

    def _owner(self, whose: str, owner: str, limits: Limits) -> OwnerBuckets:
        buckets = self._owners.get(owner)
        if buckets is None:
            buckets = OwnerBuckets(whose)
            if limits.requests_per_minute or limits.tokens_per_minute:
                self._owners[owner] = buckets
        buckets.requests = self._sized(buckets.requests, limits.requests_per_minute)
        buckets.tokens = self._sized(buckets.tokens, limits.tokens_per_minute)
        return buckets

    def _sized(self, bucket: Bucket | None, limit: int | None) -> Bucket | None:
        if limit is None:
            return None
        if bucket is None:
            return Bucket(limit, self._clock)
        if bucket.limit != limit:
            bucket.resize(limit)
        return bucket

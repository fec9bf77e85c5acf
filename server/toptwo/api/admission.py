"""Who gets in: at most so many sequences at once, of all callers together, of each key and each account.

A permit is held from before a body is validated until its answer has been sent, a stream's to its end. Who
does not get in is told at once, and told when to try again: 503 where the server is full, 429 where the
caller's own limit is reached.

Knows counts and a clock; must not know what requests ask for, or the engine.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from toptwo.accounts.caller import Caller
from toptwo.errors import ApiError

LONGEST_RETRY_SECONDS = 60
_NUM_GAPS = 64  # of the last places that came free, which tell how fast they do

Clock = Callable[[], float]


@dataclass(frozen=True)
class AdmissionLimits:
    """How many sequences may be open at once; every choice of an answer is one.

    max_running: what the engine runs at once. max_queue: what may wait beyond.
    max_per_key: of one key's; None for no limit but the key's own.
    """

    max_running: int = 64
    max_queue: int = 256
    max_per_key: int | None = None


DEFAULT_LIMITS = AdmissionLimits()


class Places:
    """So many places, taken and freed, and how long it takes until there is one when there is none.

    limit: how many there are. busy_at: from how many taken ones on the pace is that of a busy server.
    """

    def __init__(self, limit: int, busy_at: int, clock: Clock) -> None:
        self.limit = limit
        self.num_taken = 0
        self._busy_at = busy_at
        self._clock = clock
        self._gaps: deque[float] = deque(maxlen=_NUM_GAPS)  # busy seconds from one freed place to the next
        self._since = clock()  # when a place was freed, or busy times began, last
        self._promised = 0.0  # when the places told to those who were refused will be free

    def have_room(self, count: int) -> bool:
        """Whether so many are free."""
        return self.num_taken + count <= self.limit

    def take(self, count: int) -> None:
        """Take so many; the caller has asked whether there is room."""
        if self.num_taken < self._busy_at <= self.num_taken + count:
            self._since = self._clock()
        self.num_taken += count

    def free(self, count: int) -> None:
        """Give so many back."""
        for _ in range(count):
            now = self._clock()
            if self.num_taken >= self._busy_at:
                self._gaps.append(now - self._since)
            self._since = now
            self.num_taken -= 1
        if 2 * self.num_taken < self._busy_at:
            self._promised = 0.0  # whoever was refused is not coming back, or is inside

    def promise(self, count: int) -> int:
        """Whole seconds, of 1 to 60, after which so many should be free for whoever is refused now.

        Each who is refused is told of other places than those refused before. While no place has come free
        yet, it is expected to take as long again as it has taken so far.
        """
        now = self._clock()
        mean_gap = (sum(self._gaps) + now - self._since) / (len(self._gaps) + 1)
        seconds = max(mean_gap, 1 / self.limit)  # who is told the same whole second comes at the same time
        latest = now + LONGEST_RETRY_SECONDS
        self._promised = min(max(self._promised, now) + count * seconds, latest)
        return min(max(1, math.ceil(self._promised - now)), LONGEST_RETRY_SECONDS)


class Admission:
    """Gives out permits. One for each server; all of it runs on the event loop."""

    def __init__(self, limits: AdmissionLimits, clock: Clock = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._all = Places(limits.max_running + limits.max_queue, limits.max_running, clock)
        self._of_owner: dict[str, Places] = {}  # only keys that were accepted come here, so it is bounded

    @property
    def num_open(self) -> int:
        """Sequences that are inside."""
        return self._all.num_taken

    def overloaded(self, count: int = 1) -> ApiError:
        """The answer to who wants so many places of a full server."""
        return _refusal(
            self._all.promise(count),
            "The server has as many requests as it takes.",
            status=503,
            kind="server_error",
            code="overloaded",
        )

    def places(self, caller: Caller) -> tuple[Places, dict[str, Places]]:
        """Those of all callers, and those of the caller's key and account where they have limits."""
        most = [self._limits.max_per_key, caller.key_limits.concurrent_requests]
        limits = {
            "key": (caller.key_id, min((each for each in most if each is not None), default=None)),
            "account": (caller.account_id, caller.account_limits.concurrent_requests),
        }
        own = {
            whose: self._own_places(owner, limit)
            for whose, (owner, limit) in limits.items()
            if owner is not None and limit is not None
        }
        return self._all, own

    def _own_places(self, owner: str, limit: int) -> Places:
        places = self._of_owner.setdefault(owner, Places(limit, limit, self._clock))
        places.limit = limit  # it may have been changed since
        return places


class Permit:
    """The places of one request. It is held until its answer has been sent."""

    def __init__(self, admission: Admission, caller: Caller) -> None:
        self._admission = admission
        self._all, self._own = admission.places(caller)
        self._count = 0

    def take(self, count: int) -> None:
        """Take so many places more. Raises ApiError (429, 503; 400 where there are never so many)."""
        self.require_room(count)
        for places in self._every:
            places.take(count)
        self._count += count

    def require_room(self, count: int) -> None:
        """What `take` raises, without taking any."""
        wanted = self._count + count
        most = min(places.limit for places in self._every)
        if wanted > most:
            message = f"The request asks for {wanted} answers at once; at most {most} can be had."
            raise ApiError(message, code="invalid_value")
        for whose, places in self._own.items():
            if not places.have_room(count):
                raise _refusal(
                    places.promise(wanted),
                    f"Your {whose}'s limit of {places.limit} requests at once is reached.",
                    status=429,
                    kind="rate_limit_error",
                    code="rate_limit_exceeded",
                )
        if not self._all.have_room(count):
            raise self._admission.overloaded(wanted)

    def release(self) -> None:
        """Give all places back."""
        for places in self._every:
            places.free(self._count)
        self._count = 0

    @property
    def _every(self) -> list[Places]:
        return [*self._own.values(), self._all]


def _refusal(seconds: int, message: str, *, status: int, kind: str, code: str) -> ApiError:
    return ApiError(
        f"{message} Try again in {seconds} s.",
        status=status,
        kind=kind,
        code=code,
        headers={"Retry-After": str(seconds), "x-should-retry": "true"},
    )

"""Who gets in: at most so many sequences at once, of all callers together and of each caller.

A permit is held from before a body is validated until its answer has been sent, a stream's to its end. Who
does not get in is told at once, and told when to try again: 503 where the server is full, 429 where the
caller's own limit is reached.

Knows counts and a clock; must not know what requests ask for, or the engine.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from starlette.requests import Request

from toptwo.errors import ApiError

LONGEST_RETRY_SECONDS = 60
_NUM_GAPS = 64  # of the last places that came free, which tell how fast they do

Clock = Callable[[], float]


@dataclass(frozen=True)
class AdmissionLimits:
    """How many sequences may be open at once; every choice of an answer is one.

    max_running: what the engine runs at once. max_queue: what may wait beyond.
    max_per_key: of one key's; None for no limit.
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
        self._of_key: dict[str, Places] = {}  # only keys that were accepted come here, so it is bounded

    @property
    def num_open(self) -> int:
        """Sequences that are inside."""
        return self._all.num_taken

    async def hold(self, request: Request) -> AsyncGenerator[None, None]:
        """A FastAPI dependency that leaves a permit in `request.state.permit` until the answer has been sent.

        It comes behind the authentication. Raises ApiError (429, 503) when there is no room anyway: then
        there is no need to read the body.
        """
        permit = Permit(self, request.state.key_id)
        permit.require_room(1)
        request.state.permit = permit
        try:
            yield
        finally:
            permit.release()

    def overloaded(self, count: int = 1) -> ApiError:
        """The answer to who wants so many places of a full server."""
        return _refusal(
            self._all.promise(count),
            "The server has as many requests as it takes.",
            status=503,
            kind="server_error",
            code="overloaded",
        )

    def places(self, key_id: str) -> tuple[Places, Places | None]:
        """Those of all callers, and those of one key where it has a limit."""
        most = self._limits.max_per_key
        if most is None:
            return self._all, None
        return self._all, self._of_key.setdefault(key_id, Places(most, most, self._clock))


class Permit:
    """The places of one request."""

    def __init__(self, admission: Admission, key_id: str) -> None:
        self._admission = admission
        self._all, self._own = admission.places(key_id)
        self._count = 0

    def take(self, count: int) -> None:
        """Take so many places more. Raises ApiError (429, 503; 400 where there are never so many)."""
        self.require_room(count)
        for places in self._both:
            places.take(count)
        self._count += count

    def require_room(self, count: int) -> None:
        """What `take` raises, without taking any."""
        wanted = self._count + count
        most = min(places.limit for places in self._both)
        if wanted > most:
            message = f"The request asks for {wanted} answers at once; at most {most} can be had."
            raise ApiError(message, code="invalid_value")
        if self._own is not None and not self._own.have_room(count):
            raise _refusal(
                self._own.promise(wanted),
                f"Your key's limit of {self._own.limit} requests at once is reached.",
                status=429,
                kind="rate_limit_error",
                code="rate_limit_exceeded",
            )
        if not self._all.have_room(count):
            raise self._admission.overloaded(wanted)

    def release(self) -> None:
        """Give all places back."""
        for places in self._both:
            places.free(self._count)
        self._count = 0

    @property
    def _both(self) -> list[Places]:
        return [self._all] if self._own is None else [self._own, self._all]


def _refusal(seconds: int, message: str, *, status: int, kind: str, code: str) -> ApiError:
    return ApiError(
        f"{message} Try again in {seconds} s.",
        status=status,
        kind=kind,
        code=code,
        headers={"Retry-After": str(seconds), "x-should-retry": "true"},
    )

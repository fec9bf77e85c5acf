"""What one request takes of its caller's limits and money, from its first look to the end of its answer.

Knows limits, the book of accounts and what became of a request; must not know any endpoint's format. A key
from the settings has no account: it has no limits here and is charged nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from toptwo.accounts.book import AccountBook, Reservation
from toptwo.accounts.caller import Caller
from toptwo.accounts.charging import Outcome
from toptwo.accounts.database import DatabaseUnavailableError
from toptwo.accounts.ledger import InsufficientQuotaError
from toptwo.accounts.limits import Bucket, OwnerBuckets
from toptwo.accounts.money import Tokens
from toptwo.api.job import GenerationJob
from toptwo.api.security import accounts_unavailable
from toptwo.errors import ApiError
from toptwo.telemetry.record import RequestRecord

_KINDS: dict[str, Callable[[OwnerBuckets], Bucket | None]] = {
    "requests": lambda owner: owner.requests,
    "tokens": lambda owner: owner.tokens,
}


class Tab:
    """One request's account of itself. It is opened before its body is read, and closed behind its answer."""

    def __init__(self, book: AccountBook | None, caller: Caller, record: RequestRecord) -> None:
        self._book = book if caller.account_id is not None else None
        self._caller = caller
        self._record = record
        self._owners = [] if self._book is None else self._book.rates.of(caller)
        self._reserved_tokens = 0
        self._reservation: Reservation | None = None
        self.is_stream = False

    def take_request(self) -> None:
        """Count a request. Raises ApiError (429)."""
        self._take("requests", 1)

    async def reserve(self, request_id: str, model: str, jobs: Sequence[GenerationJob]) -> None:
        """Keep the tokens, and the money, that the jobs can take at most. Raises ApiError (429, 503)."""
        if self._book is None:
            return
        most = most_tokens(jobs)
        self._take("tokens", most.total)
        self._reserved_tokens = most.total
        try:
            self._reservation = await self._book.reserve(self._caller, request_id, model, most)
        except InsufficientQuotaError as error:
            raise insufficient_quota(str(error)) from None
        except DatabaseUnavailableError:
            raise accounts_unavailable() from None

    def close(self) -> None:
        """Give back what was not needed, and charge what was delivered."""
        record = self._record
        computed = Tokens(record.begun_prompt_tokens, record.cached_tokens, record.completion_tokens)
        for bucket in self._buckets("tokens"):
            bucket.give_back(max(0, self._reserved_tokens - computed.total))
        if self._book is not None and self._reservation is not None:
            delivered = computed if self.is_stream or record.is_complete else Tokens()
            self._book.settle(self._reservation, delivered, _outcome(record))

    def headers(self) -> dict[str, str]:
        """What is left of the tightest limits."""
        headers = {}
        for kind in _KINDS:
            tightest = min(self._buckets(kind), key=lambda bucket: bucket.remaining, default=None)
            if tightest is not None:
                headers[f"x-ratelimit-limit-{kind}"] = str(tightest.limit)
                headers[f"x-ratelimit-remaining-{kind}"] = str(max(0, tightest.remaining))
                headers[f"x-ratelimit-reset-{kind}"] = f"{tightest.reset_seconds:.3f}s"
        return headers

    def _take(self, kind: str, count: int) -> None:
        for owner in self._owners:
            bucket = _KINDS[kind](owner)
            if bucket is not None and (wait := bucket.wait_for(count)):
                raise _over_limit(owner.whose, kind, bucket, count, wait)
        for bucket in self._buckets(kind):
            bucket.take(count)

    def _buckets(self, kind: str) -> Iterable[Bucket]:
        return [bucket for owner in self._owners if (bucket := _KINDS[kind](owner)) is not None]


def most_tokens(jobs: Sequence[GenerationJob]) -> Tokens:
    """What jobs can use at most. Choices share a prompt."""
    return Tokens(
        prompt=sum(len(job.requests[0].prompt_ids) for job in jobs),
        completion=sum(request.max_tokens for job in jobs for request in job.requests),
    )


def insufficient_quota(message: str) -> ApiError:
    """The answer where there is not enough credit: OpenAI's, which says that trying again is no use."""
    return ApiError(
        message,
        status=429,
        kind="insufficient_quota",
        code="insufficient_quota",
        headers={"x-should-retry": "false"},
    )


def _over_limit(whose: str, kind: str, bucket: Bucket, count: int, wait: float) -> ApiError:
    rule = f"Your {whose}'s limit is {bucket.limit} {kind} a minute"
    if math.isinf(wait):
        message = f"{rule}; the request may take {count}. Ask for fewer."
        headers = {"x-should-retry": "false"}
    else:
        seconds = max(1, math.ceil(bucket.promise(count)))
        message = f"{rule}, and {bucket.remaining} are left now. Try again in {seconds} s."
        headers = {"Retry-After": str(seconds), "x-should-retry": "true"}
    return ApiError(message, status=429, kind="rate_limit_error", code="rate_limit_exceeded", headers=headers)


def _outcome(record: RequestRecord) -> Outcome:
    if record.is_complete:
        return "completed"
    return "failed" if record.has_failed else "cancelled"

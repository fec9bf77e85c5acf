"""Who may call: bearer keys, compared by digest in constant time, from the settings or of accounts.

Knows keys and the Authorization header; must not know routes. It is attached to routers as a
dependency, and it never looks at the path or the host, which a caller can write as they like.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import time
from collections import OrderedDict
from collections.abc import Iterable

from starlette.requests import Request

from toptwo.accounts.book import AccountBook
from toptwo.accounts.caller import Caller, Manager, Scope
from toptwo.accounts.database import DatabaseUnavailableError
from toptwo.accounts.keys import parse_key
from toptwo.accounts.limits import Bucket, Clock
from toptwo.errors import ApiError

_KEY_ID_LENGTH = 16  # hex digits: enough to tell keys apart, useless for guessing one
WRONG_KEYS_PER_MINUTE = 20
ACCOUNTS_RETRY_SECONDS = 5
_MOST_ADDRESSES = 4096


class KeyRing:
    """The accepted keys, as SHA-256 digests only. An empty ring accepts nobody.

    A key is 256 random bits, or its owner's choice; no slow hash is used, because one per request
    would let anybody keep the server busy.
    """

    def __init__(self, digests: Iterable[bytes]) -> None:
        self._digests = tuple(digests)
        if any(len(digest) != hashlib.sha256().digest_size for digest in self._digests):
            raise ValueError("a key digest must be the 32 bytes of a SHA-256")

    @classmethod
    def from_keys(cls, keys: Iterable[str]) -> KeyRing:
        """A ring of plain keys. Raises ValueError for an empty one, which would admit everybody."""
        ring = []
        for key in keys:
            if not key.strip():
                raise ValueError("an empty key is no key")
            ring.append(_digest(key))
        return cls(ring)

    def verify(self, presented: str) -> str | None:
        """The id of the presented key, or None. The id may be logged; the key never is."""
        digest = _digest(presented)
        accepted = False
        for known in self._digests:  # all of them, so that the time taken tells nothing
            accepted |= hmac.compare_digest(known, digest)
        return digest.hex()[:_KEY_ID_LENGTH] if accepted else None


NOBODY = KeyRing(())


class Guesses:
    """What came from each address and was wrong: only so much a minute is looked at. what: what it is."""

    def __init__(self, what: str = "wrong API keys", clock: Clock = time.monotonic) -> None:
        self._what = what
        self._clock = clock
        self._of_address: OrderedDict[str, Bucket] = OrderedDict()

    def require_few(self, address: str) -> None:
        """Raises ApiError (429) where an address has tried too many."""
        bucket = self._of_address.get(address)
        if bucket is not None and bucket.wait_for(1):
            seconds = math.ceil(bucket.wait_for(1))
            raise ApiError(
                f"Too many {self._what} came from your address. Try again in {seconds} s.",
                status=429,
                kind="rate_limit_error",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(seconds), "x-should-retry": "true"},
            )

    def count(self, address: str) -> None:
        """An address has tried one."""
        bucket = self._of_address.pop(address, None) or Bucket(WRONG_KEYS_PER_MINUTE, self._clock)
        bucket.take(1)
        self._of_address[address] = bucket
        if len(self._of_address) > _MOST_ADDRESSES:
            self._of_address.popitem(last=False)


class Credentials:
    """All keys that are accepted. keys, admin_keys: those of the settings. book: those of accounts."""

    def __init__(self, keys: KeyRing, admin_keys: KeyRing = NOBODY, book: AccountBook | None = None) -> None:
        self.book = book
        self._keys = keys
        self._admin_keys = admin_keys
        self._guesses = Guesses()

    async def identify(self, presented: str, address: str) -> Caller | Manager:
        """Who holds a key. Raises ApiError: 401, the same for all that is not accepted; 429, 503."""
        if key_id := self._keys.verify(presented):
            return Caller(key_id)
        if key_id := self._admin_keys.verify(presented):
            return Manager(f"admin key {key_id}")
        holder = None if self.book is None else await self._look_up(self.book, presented, address)
        if holder is None:
            raise invalid_key()
        return holder

    async def _look_up(self, book: AccountBook, presented: str, address: str) -> Caller | Manager | None:
        key = parse_key(presented)
        if key is None:
            return None  # it is none of ours, which the database need not be asked
        if not book.is_known(key):
            self._guesses.require_few(address)
        try:
            holder = await book.verify(key)
        except DatabaseUnavailableError:
            raise accounts_unavailable() from None
        if holder is None:
            self._guesses.count(address)
        return holder


class Authenticator:
    """A FastAPI dependency that admits requests with an accepted inference key.

    It leaves a Caller in `request.state.caller` and its id in `request.state.key_id`.
    scope: what the key must be allowed to do. Raises ApiError (401, 403, 429, 503).
    """

    def __init__(self, credentials: Credentials, scope: Scope = "chat") -> None:
        self._credentials = credentials
        self._scope = scope

    async def __call__(self, request: Request) -> Caller:
        """The caller."""
        holder = await self._credentials.identify(self._presented(request), address_of(request))
        if isinstance(holder, Manager):
            raise forbidden(
                "This is a management key: it can make inference keys, and be none.", "wrong_key_kind"
            )
        if self._scope not in holder.scopes:
            raise forbidden(
                f"The API key is not allowed to do this: it lacks '{self._scope}'.", "insufficient_scope"
            )
        request.state.caller, request.state.key_id = holder, holder.key_id
        return holder

    def _presented(self, request: Request) -> str:
        """The key that a request brings. Raises ApiError (401)."""
        return bearer_of(request)


class OperatorAuthenticator:
    """Admits those who run the server: with a key from the settings, or a management key.

    Raises ApiError (401, 403, 429, 503).
    """

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    async def __call__(self, request: Request) -> None:
        """Nothing, or an error."""
        holder = await self._credentials.identify(bearer_of(request), address_of(request))
        if isinstance(holder, Caller) and holder.account_id is not None:
            raise forbidden(
                "This is for those who run the server: it needs a management key.", "wrong_key_kind"
            )


class ManagerAuthenticator:
    """Admits management keys, and leaves the manager in `request.state.manager`.

    Raises ApiError (401, 403, 429, 503).
    """

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    async def __call__(self, request: Request) -> Manager:
        """The manager."""
        holder = await self._credentials.identify(bearer_of(request), address_of(request))
        if isinstance(holder, Caller):
            raise forbidden(
                "This is an inference key; accounts are managed with a management key.", "wrong_key_kind"
            )
        request.state.manager, request.state.key_id = holder, holder.actor
        return holder


def bearer_of(request: Request) -> str:
    """The key in the Authorization header. Raises ApiError (401)."""
    headers = request.headers.getlist("authorization")
    if not headers:
        raise _unauthorised("No API key was given. Send it as 'Authorization: Bearer KEY'.", code=None)
    scheme, _, key = headers[0].strip().partition(" ")
    if len(headers) > 1 or scheme.lower() != "bearer" or not key.strip():
        raise _unauthorised("The Authorization header must be 'Bearer KEY'.", code=None)
    return key.strip()


def address_of(request: Request) -> str:
    """The client's address, or that of the proxy before it."""
    return request.client.host if request.client else ""


def invalid_key() -> ApiError:
    """The answer to every key that is not accepted, whatever is wrong with it."""
    return _unauthorised("The API key is not valid.", code="invalid_api_key")


def accounts_unavailable() -> ApiError:
    """The answer while the accounts' database cannot be used."""
    return ApiError(
        "Accounts cannot be looked up or charged now. Try again shortly.",
        status=503,
        kind="server_error",
        code="accounts_unavailable",
        headers={"Retry-After": str(ACCOUNTS_RETRY_SECONDS)},
    )


def forbidden(message: str, code: str) -> ApiError:
    """The answer to who is known, and may not do this."""
    return ApiError(message, status=403, kind="permission_error", code=code)


def _digest(key: str) -> bytes:
    # Header bytes arrive decoded as Latin-1, so any text must have a digest, lone surrogates too.
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _unauthorised(message: str, *, code: str | None) -> ApiError:
    return ApiError(message, status=401, code=code, headers={"WWW-Authenticate": "Bearer"})

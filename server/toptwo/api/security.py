"""Who may call: bearer keys, compared by digest in constant time.

Knows keys and the Authorization header; must not know routes. It is attached to routers as a
dependency, and it never looks at the path or the host, which a caller can write as they like.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from starlette.requests import Request

from toptwo.errors import ApiError

_KEY_ID_LENGTH = 16  # hex digits: enough to tell keys apart, useless for guessing one


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


class Authenticator:
    """A FastAPI dependency that admits requests with an accepted bearer key.

    It leaves the key's id in `request.state.key_id`. Raises ApiError (401).
    """

    def __init__(self, keys: KeyRing) -> None:
        self._keys = keys

    async def __call__(self, request: Request) -> str:
        """The id of the caller's key."""
        headers = request.headers.getlist("authorization")
        if not headers:
            raise _unauthorised("No API key was given. Send it as 'Authorization: Bearer KEY'.", code=None)
        scheme, _, key = headers[0].strip().partition(" ")
        if len(headers) > 1 or scheme.lower() != "bearer" or not key.strip():
            raise _unauthorised("The Authorization header must be 'Bearer KEY'.", code=None)
        key_id = self._keys.verify(key.strip())
        if key_id is None:
            raise _unauthorised("The API key is not valid.", code="invalid_api_key")
        request.state.key_id = key_id
        return key_id


def _digest(key: str) -> bytes:
    # Header bytes arrive decoded as Latin-1, so any text must have a digest, lone surrogates too.
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _unauthorised(message: str, *, code: str | None) -> ApiError:
    return ApiError(message, status=401, code=code, headers={"WWW-Authenticate": "Bearer"})

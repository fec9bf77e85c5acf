"""API keys: how they are made, and what can be told of one without looking it up.

    toptwo_sk_k3VbX9aQ_<secret: 43 characters><checksum: 6>       for inference
    toptwo_adm_…                                                  for management, and nothing else

The letters and digits before the second `_` from the end name a key in logs and commands. The secret is 256
random bits; no slow hash is used on it, because one per request would let anybody keep the server busy, and
there is nothing to guess. The checksum lets a mistyped or made-up key be refused without asking the database,
and lets scanners tell a leaked key from a word (after GitHub's format of 2021).

Knows the format; must not know where keys are kept.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import string
import zlib
from dataclasses import dataclass
from typing import Literal

KeyKind = Literal["inference", "management"]

_PREFIXES: dict[KeyKind, str] = {"inference": "toptwo_sk", "management": "toptwo_adm"}
_KINDS = {prefix: kind for kind, prefix in _PREFIXES.items()}
_DIGITS = string.digits + string.ascii_uppercase + string.ascii_lowercase
_SECRET_BYTES, _SECRET_LENGTH, _CHECKSUM_LENGTH = 32, 43, 6
_ID_LENGTH = 8
LONGEST_KEY = 80
_FORM = re.compile(
    rf"({'|'.join(_KINDS)})_([0-9A-Za-z]{{{_ID_LENGTH}}})_[0-9A-Za-z]{{{_SECRET_LENGTH + _CHECKSUM_LENGTH}}}"
)


@dataclass(frozen=True)
class Key:
    """A well-formed key. Its text is a secret: it is not shown by repr."""

    kind: KeyKind
    id: str
    digest: bytes


@dataclass(frozen=True)
class NewKey:
    """A key that has just been made, with its text, which is shown once and never kept."""

    key: Key
    text: str

    def __repr__(self) -> str:
        """Without the secret."""
        return f"NewKey({self.key.id})"


def make_key(kind: KeyKind) -> NewKey:
    """A new key of 256 random bits."""
    secret = _base62(int.from_bytes(secrets.token_bytes(_SECRET_BYTES)), _SECRET_LENGTH)
    key_id = new_id(_ID_LENGTH)
    body = f"{_PREFIXES[kind]}_{key_id}_{secret}"
    text = body + _checksum(body)
    return NewKey(Key(kind, key_id, _digest(text)), text)


def parse_key(text: str) -> Key | None:
    """The key, or None for what cannot be one. It costs the same whatever is wrong; nothing is looked up."""
    if len(text) > LONGEST_KEY:
        return None
    form = _FORM.fullmatch(text)
    if form is None or not hmac.compare_digest(_checksum(text[:-_CHECKSUM_LENGTH]), text[-_CHECKSUM_LENGTH:]):
        return None
    return Key(_KINDS[form[1]], form[2], _digest(text))


def new_id(length: int) -> str:
    """So many random letters and digits."""
    return "".join(secrets.choice(_DIGITS) for _ in range(length))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _checksum(text: str) -> str:
    return _base62(zlib.crc32(text.encode()), _CHECKSUM_LENGTH)


def _base62(number: int, length: int) -> str:
    digits = []
    for _ in range(length):
        number, digit = divmod(number, len(_DIGITS))
        digits.append(_DIGITS[digit])
    return "".join(reversed(digits))

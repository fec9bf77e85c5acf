"""What the owner of an account may do to its keys, and to no others.

Knows rows; must not know HTTP or how an owner signs in. Every function runs inside a transaction.
"""

from __future__ import annotations

from sqlalchemy import Connection, func, select

from toptwo.accounts import key_store
from toptwo.accounts.audit import Actor
from toptwo.accounts.key_store import KeyInfo, KeyRequest
from toptwo.accounts.keys import NewKey
from toptwo.accounts.store import Account, NotFoundError
from toptwo.accounts.tables import keys

MOST_KEYS = 100


class TooManyKeysError(Exception):
    """The account has as many keys as it may. The message is one sentence."""


def create_key(
    connection: Connection, account: Account, wanted: KeyRequest, address: str, at: int
) -> tuple[KeyInfo, NewKey]:
    """A new key. Raises TooManyKeysError."""
    if wanted.account_id != account.id:
        raise ValueError("an owner makes keys of their own account")
    is_active = keys.c.revoked_at.is_(None) & (keys.c.expires_at.is_(None) | (keys.c.expires_at > at))
    query = select(func.count()).select_from(keys).where(keys.c.account_id == account.id, is_active)
    if connection.execute(query).scalar_one() >= MOST_KEYS:
        raise TooManyKeysError(f"An account has at most {MOST_KEYS} keys; revoke some first.")
    return key_store.create_key(connection, owner(account, address), wanted, at)


def revoke_key(connection: Connection, account: Account, key_id: str, address: str, at: int) -> KeyInfo:
    """Refuse it from now on. Raises NotFoundError."""
    _require_own(connection, account, key_id)
    return key_store.revoke_key(connection, owner(account, address), key_id, at)


def rotate_key(
    connection: Connection, account: Account, rotated: tuple[str, int], address: str, at: int
) -> tuple[KeyInfo, NewKey]:
    """A key like another. rotated: which one, and how many seconds it still works. Raises NotFoundError."""
    key_id, overlap = rotated
    _require_own(connection, account, key_id)
    return key_store.rotate_key(connection, owner(account, address), key_id, overlap, at)


def owner(account: Account, address: str) -> Actor:
    """What the audit log calls somebody who acts on an account of their own."""
    return Actor(f"owner {account.id}", address)


def _require_own(connection: Connection, account: Account, key_id: str) -> None:
    """A key that is somebody else's is answered as one that is nobody's."""
    if key_store.get_key(connection, key_id).account_id != account.id:
        raise NotFoundError(f"There is no key '{key_id[:64]}'.")

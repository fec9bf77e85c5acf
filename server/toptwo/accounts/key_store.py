"""Keys: rows, and what may be done with them. A key's text is never among them, only its SHA-256.

Knows rows; must not know HTTP, commands or how a key is presented. Every function runs inside a transaction.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import orjson
from sqlalchemy import Connection, Row, insert, select, update

from toptwo.accounts import audit
from toptwo.accounts.audit import Actor
from toptwo.accounts.caller import NO_LIMITS, SCOPES, Limits
from toptwo.accounts.keys import Key, KeyKind, NewKey, make_key
from toptwo.accounts.store import NotFoundError, get_account, limits_of
from toptwo.accounts.tables import accounts, keys

KeyStatus = Literal["active", "expired", "revoked"]


@dataclass(frozen=True)
class KeyInfo:
    """Everything about a key but the key. models: None for all. Times are seconds since 1970, in UTC."""

    id: str
    kind: KeyKind
    account_id: str | None
    name: str
    last4: str
    scopes: tuple[str, ...]
    models: tuple[str, ...] | None
    limits: Limits
    created_at: int
    created_by: str
    expires_at: int | None
    revoked_at: int | None
    rotated_from: str | None
    last_used_at: int | None

    def status(self, at: int) -> KeyStatus:
        """Whether it can be used."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= at else "active"


@dataclass(frozen=True)
class KeyRequest:
    """What a key is made from. account_id: None for a management key, which belongs to no account."""

    name: str
    account_id: str | None
    scopes: tuple[str, ...] = SCOPES
    models: tuple[str, ...] | None = None
    limits: Limits = NO_LIMITS
    expires_at: int | None = None

    @property
    def kind(self) -> KeyKind:
        """What it may be used for."""
        return "management" if self.account_id is None else "inference"


@dataclass(frozen=True)
class Holder:
    """A key as it is looked up for a request, with what its account adds."""

    key: KeyInfo
    account_active: bool
    account_limits: Limits

    def may_act(self, at: int) -> bool:
        """Whether it is accepted."""
        return self.account_active and self.key.status(at) == "active"


def create_key(
    connection: Connection, actor: Actor, wanted: KeyRequest, at: int, rotated_from: str | None = None
) -> tuple[KeyInfo, NewKey]:
    """A new key, and its text, which nobody can ask for again. Raises NotFoundError without the account."""
    if wanted.account_id is not None:
        get_account(connection, wanted.account_id)
    new = make_key(wanted.kind)
    connection.execute(
        insert(keys).values(
            id=new.key.id,
            kind=wanted.kind,
            hash=new.key.digest,
            account_id=wanted.account_id,
            name=wanted.name,
            last4=new.text[-4:],
            scopes=orjson.dumps(wanted.scopes).decode(),
            models=None if wanted.models is None else orjson.dumps(wanted.models).decode(),
            **asdict(wanted.limits),
            created_at=at,
            created_by=actor.name,
            expires_at=wanted.expires_at,
            rotated_from=rotated_from,
        )
    )
    audit.record(
        connection,
        actor,
        "key.create",
        new.key.id,
        at,
        kind=wanted.kind,
        account=wanted.account_id,
        name=wanted.name,
    )
    return get_key(connection, new.key.id), new


def find(connection: Connection, key: Key) -> Holder | None:
    """Whoever holds the key, if it is one of ours."""
    owner = keys.outerjoin(accounts, keys.c.account_id == accounts.c.id)
    account_columns = [accounts.c.status.label("account_status"), *_labelled_limits()]
    row = connection.execute(
        select(keys, *account_columns).select_from(owner).where(keys.c.id == key.id, keys.c.kind == key.kind)
    ).one_or_none()
    if row is None or not hmac.compare_digest(row.hash, key.digest):
        return None
    limits = Limits(**{name: getattr(row, f"account_{name}") for name in asdict(NO_LIMITS)})
    return Holder(_key(row), row.account_status in (None, "active"), limits)


def get_key(connection: Connection, key_id: str) -> KeyInfo:
    """Raises NotFoundError."""
    row = connection.execute(select(keys).where(keys.c.id == key_id)).one_or_none()
    if row is None:
        raise NotFoundError(f"There is no key '{key_id[:64]}'.")
    return _key(row)


def list_keys(
    connection: Connection, *, account_id: str | None = None, after: str = "", limit: int = 100
) -> list[KeyInfo]:
    """In the order of their ids; those of one account, or all. after: the last id of the page before."""
    query = select(keys).where(keys.c.id > after).order_by(keys.c.id).limit(limit)
    if account_id is not None:
        query = query.where(keys.c.account_id == account_id)
    return [_key(row) for row in connection.execute(query)]


def change_key(
    connection: Connection, actor: Actor, key_id: str, changes: Mapping[str, Any], at: int
) -> KeyInfo:
    """Change columns: name, scopes, models, limits, expires_at. Raises NotFoundError."""
    get_key(connection, key_id)
    columns = {
        name: orjson.dumps(value).decode() if name in ("scopes", "models") and value is not None else value
        for name, value in changes.items()
    }
    if columns:
        connection.execute(update(keys).where(keys.c.id == key_id).values(**columns))
        audit.record(connection, actor, "key.change", key_id, at, **changes)
    return get_key(connection, key_id)


def revoke_key(connection: Connection, actor: Actor, key_id: str, at: int) -> KeyInfo:
    """Refuse it from now on. A key that was revoked before stays so. Raises NotFoundError."""
    info = get_key(connection, key_id)
    if info.revoked_at is not None:
        return info
    connection.execute(update(keys).where(keys.c.id == key_id).values(revoked_at=at))
    audit.record(connection, actor, "key.revoke", key_id, at)
    return replace(info, revoked_at=at)


def rotate_key(
    connection: Connection, actor: Actor, key_id: str, overlap: int, at: int
) -> tuple[KeyInfo, NewKey]:
    """A key like this one, which ends in `overlap` seconds. Raises NotFoundError, also if it has ended."""
    old = get_key(connection, key_id)
    if old.status(at) != "active":
        raise NotFoundError(f"The key '{key_id[:64]}' is {old.status(at)}; create a new one instead.")
    wanted = KeyRequest(old.name, old.account_id, old.scopes, old.models, old.limits, old.expires_at)
    info, new = create_key(connection, actor, wanted, at, rotated_from=old.id)
    ends = at + overlap if old.expires_at is None else min(old.expires_at, at + overlap)
    connection.execute(update(keys).where(keys.c.id == key_id).values(expires_at=ends))
    audit.record(connection, actor, "key.rotate", key_id, at, successor=info.id, ends=ends)
    return info, new


def note_use(connection: Connection, times: Mapping[str, int]) -> None:
    """When keys were used last."""
    for key_id, at in times.items():
        connection.execute(update(keys).where(keys.c.id == key_id).values(last_used_at=at))


def _labelled_limits() -> list[Any]:
    return [accounts.c[name].label(f"account_{name}") for name in asdict(NO_LIMITS)]


def _key(row: Row[Any]) -> KeyInfo:
    return KeyInfo(
        id=row.id,
        kind=row.kind,
        account_id=row.account_id,
        name=row.name,
        last4=row.last4,
        scopes=tuple(orjson.loads(row.scopes)),
        models=None if row.models is None else tuple(orjson.loads(row.models)),
        limits=limits_of(row),
        created_at=row.created_at,
        created_by=row.created_by,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        rotated_from=row.rotated_from,
        last_used_at=row.last_used_at,
    )

"""The audit log: who changed what, each entry sealed with a hash over it and the one before.

Whoever alters or removes an entry breaks the chain from there on. Knows rows; must not know secrets, which
are never a part of them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import orjson
from sqlalchemy import Connection, insert, select

from toptwo.accounts.tables import audit

_BEGINNING = bytes(32)


@dataclass(frozen=True)
class Actor:
    """Who acts: a management key, an account's owner, or somebody on the machine. address: of the client."""

    name: str
    address: str | None = None


@dataclass(frozen=True)
class AuditEntry:
    """One change."""

    id: int
    at: int
    actor: str
    action: str
    target: str
    detail: dict[str, Any]
    address: str | None


def record(connection: Connection, actor: Actor, action: str, target: str, at: int, **detail: object) -> None:
    """Add an entry, in the transaction of what it tells of."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("LOCK TABLE audit IN EXCLUSIVE MODE")  # two ends would fork the chain
    last = connection.execute(select(audit.c.hash).order_by(audit.c.id.desc()).limit(1)).scalar()
    entry = {
        "at": at,
        "actor": actor.name,
        "action": action,
        "target": target,
        "detail": orjson.dumps(detail, option=orjson.OPT_SORT_KEYS).decode(),
        "address": actor.address,
    }
    previous = last or _BEGINNING
    connection.execute(insert(audit).values(**entry, previous=previous, hash=_seal(previous, entry)))


def entries(connection: Connection, *, before: int | None = None, limit: int = 100) -> list[AuditEntry]:
    """The newest entries first. before: an entry's id."""
    query = select(audit).order_by(audit.c.id.desc()).limit(limit)
    if before is not None:
        query = query.where(audit.c.id < before)
    return [
        AuditEntry(row.id, row.at, row.actor, row.action, row.target, orjson.loads(row.detail), row.address)
        for row in connection.execute(query)
    ]


def first_broken(connection: Connection) -> int | None:
    """The id of the first entry that is not what was written, or does not follow the one before it.

    That the last entries are missing cannot be seen from the chain alone.
    """
    previous = _BEGINNING
    for row in connection.execute(select(audit).order_by(audit.c.id)):
        names = ("at", "actor", "action", "target", "detail", "address")
        if row.previous != previous or row.hash != _seal(
            previous, {name: getattr(row, name) for name in names}
        ):
            return int(row.id)
        previous = row.hash
    return None


def _seal(previous: bytes, entry: dict[str, Any]) -> bytes:
    return hashlib.sha256(previous + orjson.dumps(entry, option=orjson.OPT_SORT_KEYS)).digest()

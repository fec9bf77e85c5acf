"""Which server processes are there, so that what dead ones left open is closed by the others.

Knows rows; must not know processes. Every function runs inside a transaction.
"""

from __future__ import annotations

from sqlalchemy import Connection, delete, insert, select, update

from toptwo.accounts import charging
from toptwo.accounts.charging import Settlement
from toptwo.accounts.money import Tokens
from toptwo.accounts.tables import leases, usage


def renew(connection: Connection, lease: str, at: int) -> None:
    """Say that a process is still there."""
    if not connection.execute(update(leases).where(leases.c.id == lease).values(seen_at=at)).rowcount:
        connection.execute(insert(leases).values(id=lease, seen_at=at))


def end(connection: Connection, lease: str) -> None:
    """Say that a process has closed all of its requests."""
    connection.execute(delete(leases).where(leases.c.id == lease))


def close_abandoned(connection: Connection, dead_since: int, at: int) -> int:
    """Give back what the requests of processes reserved that have not been seen since; how many there were.

    What they delivered before they died is known to nobody, so it is free.
    """
    alive = select(leases.c.id).where(leases.c.seen_at >= dead_since)
    query = select(usage.c.request_id).where(usage.c.outcome.is_(None), usage.c.lease.not_in(alive))
    abandoned = connection.execute(query).scalars().all()
    charging.settle(connection, [Settlement(each, 0, Tokens(), "lost", at) for each in abandoned])
    connection.execute(delete(leases).where(leases.c.seen_at < dead_since))
    return len(abandoned)

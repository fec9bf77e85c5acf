"""200 times kill -9 amid changes: all that was acknowledged is there, and nothing is half there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from sqlalchemy import Connection, Engine, func, select

from toptwo.accounts import audit, key_store, store
from toptwo.accounts.tables import accounts, ledger, spending, usage

ROUNDS = 200


def test_what_was_acknowledged_survives_kill_9(engine: Engine, url: str) -> None:
    program = Path(__file__).with_name("crashing.py")
    done = subprocess.run(
        [sys.executable, str(program), url, str(ROUNDS)],
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = [line.split() for line in done.stdout.splitlines()]
    with engine.connect() as connection:
        for words in said:
            assert is_true(connection, *words), words
        check_books(connection)
    kinds = {kind: sum(words[0] == kind for words in said) for kind in {words[0] for words in said}}
    print(f"{ROUNDS} x kill -9 on {engine.dialect.name}: {kinds}, none lost")
    assert len(kinds) == 6
    assert min(kinds.values()) >= 20


def is_true(connection: Connection, kind: str, one: str, other: str = "") -> bool:
    """Whether what a process was told is so."""
    match kind:
        case "account":
            return store.get_account(connection, one).id == one
        case "key":
            return key_store.get_key(connection, one).id == one
        case "rotated":
            return key_store.get_key(connection, other).rotated_from == one
        case "revoked":
            return key_store.get_key(connection, one).revoked_at is not None
        case "reserved":
            return connection.execute(select(usage).where(usage.c.request_id == one)).one().reserved == 400
        case "settled":
            return connection.execute(select(usage).where(usage.c.request_id == one)).one().cost == 150
    return False


def check_books(connection: Connection) -> None:
    """Every balance is the sum of its ledger, what is spent that of its requests, and the log is whole."""
    sums = (
        select(ledger.c.account_id, func.sum(ledger.c.amount).label("amount")).group_by(ledger.c.account_id)
    ).subquery()
    wrong = select(accounts.c.id).join(sums, sums.c.account_id == accounts.c.id)
    assert connection.execute(wrong.where(sums.c.amount != accounts.c.balance)).all() == []
    num_accounts = connection.execute(select(func.count()).select_from(accounts)).scalar_one()
    assert connection.execute(select(func.count()).select_from(sums)).scalar_one() == num_accounts
    still_open = select(func.coalesce(func.sum(usage.c.reserved), 0)).where(usage.c.outcome.is_(None))
    cost = connection.execute(select(func.coalesce(func.sum(usage.c.cost), 0))).scalar_one()
    spent = connection.execute(select(func.coalesce(func.sum(spending.c.amount), 0))).scalar_one()
    assert spent == 2 * (cost + connection.execute(still_open).scalar_one())  # of the key, and of the account
    assert audit.first_broken(connection) is None

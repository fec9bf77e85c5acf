"""A process that changes accounts as fast as it can, says what has been acknowledged, and waits to be killed.

Run: python tests/accounts/crashing.py DATABASE_URL ROUNDS. It forks ROUNDS children, one after another, and
kills each with SIGKILL at a random moment after some acknowledgements. What the children were told is
written to standard output, a line each.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from sqlalchemy import Connection

from toptwo.accounts import charging, key_store, store
from toptwo.accounts.audit import Actor
from toptwo.accounts.caller import NO_LIMITS
from toptwo.accounts.charging import Charge, Settlement
from toptwo.accounts.database import Database, ForMany, open_engine
from toptwo.accounts.key_store import KeyRequest
from toptwo.accounts.money import Tokens
from toptwo.accounts.store import NewAccount

ME = Actor("a test")
NOW = 1_800_000_000
MOST_HEARD = 8  # acknowledgements of one child: two more than there are kinds
LONGEST_WAIT = 0.02  # seconds after the last of them, amid the next changes


def work(database: Database, child: int) -> Iterator[str]:
    """What has been acknowledged, in words that can be checked afterwards."""

    def write(change: Callable[[Connection], Any]) -> Any:
        return database.write(change).result()

    for number in range(1_000_000):
        account = write(lambda c: store.create_account(c, ME, NewAccount("n", grant=1000), NOW))
        yield f"account {account.id}"
        key, _ = write(lambda c, a=account.id: key_store.create_key(c, ME, KeyRequest("k", a), NOW))
        yield f"key {key.id}"
        request_id = f"{child}-{number}"
        charge = Charge(request_id, account.id, key.id, "m", 400, NOW, "lease", NO_LIMITS, NO_LIMITS)
        write(ForMany(charging.reserve, charge))
        yield f"reserved {request_id} {account.id}"
        write(
            lambda c, r=request_id: charging.settle(
                c, [Settlement(r, 150, Tokens(1, 0, 1), "completed", NOW)]
            )
        )
        yield f"settled {request_id} {account.id}"
        new, _ = write(lambda c, k=key.id: key_store.rotate_key(c, ME, k, 60, NOW))
        yield f"rotated {key.id} {new.id}"
        write(lambda c, k=new.id: key_store.revoke_key(c, ME, k, NOW))
        yield f"revoked {new.id}"


def live(url: str, child: int, begun: int) -> None:
    """A child's life, which somebody else ends. begun: a pipe's end that is told of each success."""
    for said in work(Database(open_engine(url)), child):
        os.write(1, f"{said}\n".encode())
        os.write(begun, b".")


def main() -> None:
    """Fork and kill."""
    url, rounds = sys.argv[1], int(sys.argv[2])
    for child in range(rounds):
        heard, begun = os.pipe()
        pid = os.fork()
        if pid == 0:
            live(url, child, begun)
            os._exit(1)
        # Counted, not timed: a slow disk must not keep children from the later kinds.
        for _ in range(random.randint(1, MOST_HEARD)):
            os.read(heard, 1)
        time.sleep(random.random() * LONGEST_WAIT)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(heard)
        os.close(begun)


if __name__ == "__main__":
    main()

"""Money as a state machine: never negative, never twice, and every sum the same wherever it is taken."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Connection, delete, func, select, update
from sqlalchemy.exc import DBAPIError

from accounts.conftest import ME, NOW
from toptwo.accounts import charging, leases, ledger, store
from toptwo.accounts.caller import NO_LIMITS, Limits
from toptwo.accounts.charging import Charge, Settlement
from toptwo.accounts.database import Database, ForMany
from toptwo.accounts.ledger import InsufficientQuotaError
from toptwo.accounts.money import Tokens
from toptwo.accounts.store import Account, NewAccount
from toptwo.accounts.tables import ledger as ledger_table
from toptwo.accounts.tables import spending, usage
from toptwo.accounts.usage import UsageQuery, summarise

DAY = 86400
USED = Tokens(1, 0, 1)


def settle(
    connection: Connection, request_id: str, cost: int, tokens: Tokens = USED, at: int = NOW
) -> int | None:
    return charging.settle(connection, [Settlement(request_id, cost, tokens, "completed", at)])[0]


def together(database: Database, do: Any, items: Sequence[Any]) -> list[Future[Any]]:
    """Write all of it in one go: the writer is kept until everything waits."""
    all_wait = threading.Event()
    database.write(lambda _: all_wait.wait(10))
    writing = [database.write(ForMany(do, item)) for item in items]
    all_wait.set()
    wait(writing, 20)
    return writing


def charge_of(account: Account, number: int, amount: int, **fields: Any) -> Charge:
    values: dict[str, Any] = {
        "request_id": f"{account.id}-{number}",
        "account_id": account.id,
        "key_id": "a-key",
        "model": "org/tiny-moe",
        "amount": amount,
        "at": NOW,
        "lease": "a-lease",
        "key_limits": NO_LIMITS,
        "account_limits": NO_LIMITS,
    }
    return Charge(**values | fields)


@dataclass
class Model:
    """What the ledger should say."""

    balance: int
    budget: int
    open: dict[int, int] = field(default_factory=dict)
    closed: dict[int, int] = field(default_factory=dict)
    granted: int = 0


def machine(database: Database) -> type[RuleBasedStateMachine]:
    """A state machine on an account of its own."""

    def run(work: Callable[[Connection], Any]) -> Any:
        return database.write(work).result(10)

    class Ledger(RuleBasedStateMachine):
        @initialize(grant=st.integers(0, 2000), budget=st.integers(0, 4000))
        def begin(self, grant: int, budget: int) -> None:
            self.model = Model(balance=grant, budget=budget, granted=grant)
            new = NewAccount("machine", grant=grant, limits=Limits(daily_budget=budget))
            self.account = run(lambda connection: store.create_account(connection, ME, new, NOW))
            self.number = 0

        @rule(amount=st.integers(0, 700))
        def reserve(self, amount: int) -> None:
            self.number += 1
            charge = charge_of(self.account, self.number, amount, account_limits=self.account.limits)
            spent = sum(self.model.open.values()) + sum(self.model.closed.values())
            affordable = amount <= self.model.balance and spent + amount <= self.model.budget
            if amount and not affordable:
                with pytest.raises(InsufficientQuotaError):
                    run(lambda connection: charging.reserve(connection, [charge]))
                return
            run(lambda connection: charging.reserve(connection, [charge]))
            self.model.balance -= amount
            self.model.open[self.number] = amount

        @precondition(lambda self: self.model.open)
        @rule(data=st.data(), cost=st.integers(0, 1000))
        def settle(self, data: st.DataObject, cost: int) -> None:
            number = data.draw(st.sampled_from(sorted(self.model.open)))
            charged = self.close(number, cost)
            reserved = self.model.open.pop(number)
            assert charged == min(cost, reserved)
            self.model.closed[number] = charged
            self.model.balance += reserved - charged

        @precondition(lambda self: self.model.closed)
        @rule(data=st.data(), cost=st.integers(0, 1000))
        def settle_again(self, data: st.DataObject, cost: int) -> None:
            assert self.close(data.draw(st.sampled_from(sorted(self.model.closed))), cost) is None

        @precondition(lambda self: self.model.open or self.model.closed)
        @rule(data=st.data())
        def reserve_again(self, data: st.DataObject) -> None:
            number = data.draw(st.sampled_from(sorted([*self.model.open, *self.model.closed])))
            charge = charge_of(self.account, number, 0)
            with pytest.raises(DBAPIError):
                run(lambda connection: charging.reserve(connection, [charge]))

        @rule(amount=st.integers(-500, 500))
        def credit(self, amount: int) -> None:
            if self.model.balance + amount < 0:
                with pytest.raises(InsufficientQuotaError):
                    run(lambda connection: ledger.grant(connection, self.account.id, amount, NOW, ""))
                return
            run(lambda connection: ledger.grant(connection, self.account.id, amount, NOW, ""))
            self.model.balance += amount
            self.model.granted += amount

        @invariant()
        def sums_agree(self) -> None:
            if not hasattr(self, "account"):
                return
            balance, rows, cost, spent = database.read(self.sums).result(10)
            assert balance == self.model.balance >= 0
            assert balance == rows
            assert cost == sum(self.model.closed.values())
            assert spent == sum(self.model.open.values()) + cost
            assert self.model.granted == balance + spent

        def sums(self, connection: Connection) -> tuple[int, int, int, int]:
            mine = ledger_table.c.account_id == self.account.id
            rows = connection.execute(select(func.sum(ledger_table.c.amount)).where(mine)).scalar() or 0
            used = summarise(connection, UsageQuery(by=(), account_id=self.account.id))
            day = spending.c.owner == self.account.id
            spent = connection.execute(select(func.sum(spending.c.amount)).where(day)).scalar() or 0
            balance = store.get_account(connection, self.account.id).balance
            return balance, int(rows), used[0].cost_microcredits, int(spent)

        def close(self, number: int, cost: int) -> int | None:
            request_id = f"{self.account.id}-{number}"
            done: int | None = run(lambda connection: settle(connection, request_id, cost))
            return done

    return Ledger


def test_the_ledger_is_what_it_should_be(database: Database) -> None:
    checks = settings(
        max_examples=25,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
    run_state_machine_as_test(machine(database), settings=checks)


def test_many_at_once_are_as_many_one_by_one(database: Database, account: Account) -> None:
    """They are written together; what there is not enough for is refused, and nothing is closed twice."""
    poor = database.write(lambda c: store.create_account(c, ME, NewAccount("poor", grant=2500), NOW)).result()
    limits = Limits(daily_budget=4000)
    charges = [
        charge_of(owner, number, 1000, account_limits=NO_LIMITS if owner is poor else limits)
        for number in range(20)
        for owner in (account, poor)
    ]
    free = [charge_of(account, 100 + number, 0) for number in range(20)]
    done = together(database, charging.reserve, [*charges, *free])
    assert {type(one.exception()) for one in done} == {type(None), InsufficientQuotaError}
    reserved = {
        charge.request_id
        for charge, one in zip([*charges, *free], done, strict=True)
        if one.exception() is None and charge.amount
    }
    assert reserved == {f"{account.id}-{n}" for n in range(4)} | {f"{poor.id}-{n}" for n in range(2)}
    assert all(one.exception() is None for one in done[-20:])
    ends = [
        Settlement(charge.request_id, cost, Tokens(1, 0, 1), "completed", NOW)
        for cost in (300, 700)
        for charge in charges
    ]
    costs = [one.result() for one in together(database, charging.settle, ends)]
    assert costs.count(300) == 6  # the first word holds
    assert set(costs) == {300, None}
    for owner, count, grant in ((account, 4, 500_000), (poor, 2, 2500)):
        found = database.read(lambda c, owner=owner: store.get_account(c, owner.id)).result()
        assert found.balance == grant - 300 * count
        spent = database.read(lambda c, owner=owner: ledger.spent(c, owner.id, ledger.day_of(NOW))).result()
        assert spent == (300 * count, 300 * count)


@pytest.mark.parametrize("whose", ["key", "account"])
@pytest.mark.parametrize("period", ["daily", "monthly"])
def test_a_budget_holds_and_comes_back(database: Database, account: Account, whose: str, period: str) -> None:
    limits = {f"{whose}_limits": Limits(**{f"{period}_budget": 1000})}

    def reserve(number: int, at: int) -> None:
        charge = charge_of(account, number, 600, at=at, **limits)
        database.write(lambda connection: charging.reserve(connection, [charge])).result()

    reserve(1, NOW)
    with pytest.raises(InsufficientQuotaError, match=rf"{whose}'s {period} budget of 0.001 0.0004"):
        reserve(2, NOW)
    if period == "monthly":
        with pytest.raises(InsufficientQuotaError):
            reserve(3, NOW + DAY)
    reserve(4, NOW + (DAY if period == "daily" else 40 * DAY))


def test_a_suspended_account_reserves_nothing(database: Database, account: Account) -> None:
    database.write(
        lambda connection: store.change_account(connection, ME, account.id, {"status": "suspended"}, NOW)
    ).result()
    with pytest.raises(InsufficientQuotaError):
        database.write(lambda connection: charging.reserve(connection, [charge_of(account, 1, 10)])).result()


def test_what_a_dead_server_left_open_is_given_back(database: Database, account: Account) -> None:
    def prepare(connection: Connection) -> None:
        for number, lease in enumerate(("dead", "alive", "dead")):
            charging.reserve(connection, [charge_of(account, number, 1000, lease=lease)])
        leases.renew(connection, "dead", NOW - 100)
        leases.renew(connection, "alive", NOW - 5)

    database.write(prepare).result()
    close = lambda connection: leases.close_abandoned(connection, NOW - 60, NOW)  # noqa: E731
    assert database.write(close).result() == 2
    assert database.write(close).result() == 0
    found = database.read(lambda connection: store.get_account(connection, account.id)).result()
    assert found.balance == 500_000 - 1000


@pytest.mark.parametrize(
    "change", [update(ledger_table).values(amount=5), delete(ledger_table)], ids=["update", "delete"]
)
def test_the_ledger_is_only_added_to(database: Database, account: Account, change: Any) -> None:
    with pytest.raises(Exception, match="append-only"):
        database.write(lambda connection: connection.execute(change)).result()


def test_usage_is_summed_by_what_is_asked_for(database: Database, account: Account) -> None:
    def use(connection: Connection) -> None:
        for number, (model, at) in enumerate([("a", NOW), ("b", NOW), ("a", NOW + DAY)]):
            charge = charge_of(account, number, 100, model=model, at=at)
            charging.reserve(connection, [charge])
            settle(connection, charge.request_id, 10 * number, Tokens(7, 2, 3), at)
        charging.reserve(connection, [charge_of(account, 99, 100)])  # still open: not counted

    database.write(use).result()

    def rows(**fields: Any) -> list[tuple[Any, ...]]:
        found = database.read(lambda connection: summarise(connection, UsageQuery(**fields))).result()
        return [(one.day, one.model, one.requests, one.prompt_tokens, one.cost_microcredits) for one in found]

    assert rows(by=("model",)) == [(None, "a", 2, 14, 20), (None, "b", 1, 7, 10)]
    assert [row[2:] for row in rows(by=("day",))] == [(2, 14, 10), (1, 7, 20)]
    assert rows(by=(), model="b") == [(None, None, 1, 7, 10)]
    assert rows(by=("key",), key_id="another") == []
    assert rows(by=("day",), last_day="2000-01-01") == []
    columns = database.read(lambda connection: connection.execute(select(usage.c.outcome)).scalars().all())
    assert sorted(str(outcome) for outcome in columns.result()) == ["None", *["completed"] * 3]

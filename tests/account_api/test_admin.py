"""The management API: every route, every refusal, and what bearers may know of themselves."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from account_api.test_accounts import ADMIN_KEY, MODEL, Shop, error_of
from fakes import KEY
from toptwo.accounts.caller import Limits
from toptwo.api.account_shapes import KeyDescription, UsageList
from toptwo.api.admin import PREFIX
from toptwo.api.api_operations import OPERATIONS


@pytest.fixture
async def shop(tmp_path: Path) -> AsyncIterator[Shop]:
    made = Shop(tmp_path / "accounts.db")
    yield made
    made.book.close()


@pytest.fixture
async def admin(shop: Shop) -> AsyncIterator[httpx2.AsyncClient]:
    async with shop.client(ADMIN_KEY) as client:
        client.base_url = f"http://test{PREFIX}"
        yield client


async def make_account(admin: httpx2.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await admin.post("/accounts", json={"name": "team", **fields})
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


async def make_key(admin: httpx2.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await admin.post("/keys", json={"name": "k", **fields})
    assert answer.status_code == 201, answer.text
    assert answer.headers["cache-control"] == "no-store"
    made: dict[str, Any] = answer.json()
    return made


async def test_an_account_from_first_to_last(admin: httpx2.AsyncClient) -> None:
    account = await make_account(admin, email="a@b.c", limits={"requests_per_minute": 5})
    path = f"/accounts/{account['id']}"
    assert account["balance_microcredits"] == 500_000
    assert account["limits"]["requests_per_minute"] == 5
    assert (await admin.get(path)).json() == account
    change = {
        "name": "n",
        "status": "suspended",
        "limits": {"requests_per_minute": None, "daily_budget_microcredits": 9},
    }
    changed = (await admin.patch(path, json=change)).json()
    assert (changed["name"], changed["status"], changed["email"]) == ("n", "suspended", "a@b.c")
    assert changed["limits"]["requests_per_minute"] is None
    assert changed["limits"]["daily_budget_microcredits"] == 9
    credited = await admin.post(f"{path}/credit", json={"amount_microcredits": 7, "note": "x"})
    assert credited.json()["balance_microcredits"] == 500_007
    too_much = await admin.post(f"{path}/credit", json={"amount_microcredits": -600_000})
    assert error_of(too_much) == (409, "insufficient_credit")
    rows = (await admin.get(f"{path}/ledger")).json()["data"]
    assert [(row["kind"], row["amount_microcredits"]) for row in rows] == [("credit", 7), ("grant", 500_000)]
    audit = (await admin.get("/audit")).json()
    assert audit["first_broken"] is None
    assert [entry["action"] for entry in audit["data"]] == [
        "account.credit",
        "account.change",
        "account.create",
    ]
    assert {entry["actor"].split()[0] for entry in audit["data"]} == {"admin"}
    assert {entry["address"] for entry in audit["data"]} == {"127.0.0.1"}


async def test_a_key_from_first_to_last(shop: Shop, admin: httpx2.AsyncClient) -> None:
    account = await make_account(admin)
    key = await make_key(admin, account_id=account["id"], scopes=["chat"], models=[MODEL])
    path = f"/keys/{key['id']}"
    shown = (await admin.get(path)).json()
    assert shown == {name: value for name, value in key.items() if name != "key"}
    assert (await shop.ask(key["key"])).status_code == 200
    changed = (await admin.patch(path, json={"models": ["another"], "name": "n"})).json()
    assert changed["models"] == ["another"]
    assert error_of(await shop.ask(key["key"])) == (403, "model_access_denied")
    assert (await admin.patch(path, json={"models": None})).json()["models"] is None
    successor = (await admin.post(f"{path}/rotate", json={"overlap_seconds": 60})).json()
    assert successor["rotated_from"] == key["id"]
    assert [(await shop.ask(one["key"])).status_code for one in (key, successor)] == [200, 200]
    shop.clock += 60
    assert [(await shop.ask(one["key"])).status_code for one in (key, successor)] == [401, 200]
    assert (await admin.delete(f"/keys/{successor['id']}")).json()["status"] == "revoked"
    assert (await shop.ask(successor["key"])).status_code == 401
    listed = (await admin.get("/keys", params={"account_id": account["id"]})).json()["data"]
    assert {one["status"] for one in listed} == {"expired", "revoked"}


async def test_usage_is_shown_by_what_is_asked_for(shop: Shop, admin: httpx2.AsyncClient) -> None:
    account = await make_account(admin)
    key = await make_key(admin, account_id=account["id"])
    price = {"model": MODEL, "completion_microcredits": 1_000_000}
    assert (await admin.put("/prices", json=price)).status_code == 200
    assert (await admin.get("/prices")).json()["data"][0]["completion_microcredits"] == 1_000_000
    for _ in range(3):
        await shop.ask(key["key"])
    await shop.balance(await shop.account())
    rows = (await admin.get("/usage", params={"by": "key,model"})).json()["data"]
    assert rows[0] | {"prompt_tokens": 0} == {
        "day": None,
        "account": None,
        "key": key["id"],
        "model": MODEL,
        "requests": 3,
        "prompt_tokens": 0,
        "cached_tokens": 0,
        "completion_tokens": 9,
        "cost_microcredits": 9,
    }
    text = (await admin.get("/usage", params={"format": "csv", "by": "day"})).text
    assert text.splitlines()[0].startswith("day,account,key,model,requests")
    assert len(text.splitlines()) == 2
    async with shop.client(key["key"]) as bearer:
        mine = (await bearer.get("/v1/usage")).json()["data"]
        shown = (await bearer.get("/v1/key")).json()
    assert [(row["requests"], row["cost_microcredits"]) for row in mine] == [(3, 9)]
    assert shown["spent_today_microcredits"] == 9
    assert shown["account"]["balance_microcredits"] == 500_000 - 9


async def test_a_bearer_sees_nothing_of_others(shop: Shop, admin: httpx2.AsyncClient) -> None:
    one, two = [await make_key(admin, account_id=(await make_account(admin))["id"]) for _ in range(2)]
    await shop.ask(one["key"])
    await shop.balance(await shop.account())
    async with shop.client(two["key"]) as bearer:
        assert (await bearer.get("/v1/usage")).json()["data"] == []
        for name in ("account_id", "key_id"):
            refused = await bearer.get("/v1/usage", params={name: "x"})
            assert error_of(refused) == (400, "invalid_value")


async def test_keys_of_the_settings_have_no_account(shop: Shop) -> None:
    from fakes import KEY

    async with shop.client(KEY) as client:
        for path in ("/v1/key", "/v1/usage"):
            assert error_of(await client.get(path)) == (404, "no_account")


@pytest.mark.parametrize(
    ("method", "path", "body", "param"),
    [
        ("POST", "/accounts", {}, "name"),
        ("POST", "/accounts", {"name": " "}, "name"),
        ("POST", "/accounts", {"name": "x" * 201}, "name"),
        ("POST", "/accounts", {"name": "x", "rpm": 5}, "rpm"),
        ("POST", "/accounts", {"name": "x", "limits": {"rpm": 5}}, "limits.rpm"),
        ("POST", "/accounts", {"name": "x", "limits": {"tokens_per_minute": 0}}, "limits.tokens_per_minute"),
        ("POST", "/accounts", {"name": "x", "limits": {"tokens_per_minute": []}}, "limits.tokens_per_minute"),
        ("POST", "/accounts", {"name": "x", "grant_microcredits": -1}, "grant_microcredits"),
        ("POST", "/accounts", {"name": "x", "grant_microcredits": 1e99}, "grant_microcredits"),
        ("POST", "/accounts", {"name": "x", "email": "no"}, "email"),
        ("POST", "/keys", {"name": "x", "scopes": ["chat"]}, "account_id"),
        ("POST", "/keys", {"name": "x", "account_id": "a", "scopes": ["all"]}, "scopes[0]"),
        ("POST", "/keys", {"name": "x", "account_id": "a", "models": []}, "models"),
        ("POST", "/keys", {"name": "x", "key": "mine"}, "key"),
        ("PUT", "/prices", {"model": "m", "prompt_microcredits": -1}, "prompt_microcredits"),
        ("PUT", "/prices", {"model": "m\n"}, "model"),
        ("GET", "/accounts?limit=0", None, "limit"),
        ("GET", "/accounts?limit=1001", None, "limit"),
        ("GET", "/accounts?offset=3", None, "offset"),
        ("GET", "/accounts?after=a&after=b", None, "after"),
        ("GET", "/usage?by=hour", None, "by"),
        ("GET", "/usage?from=yesterday", None, "from"),
        ("GET", "/usage?format=xml", None, "format"),
        ("GET", "/audit?before=-1", None, "before"),
    ],
)  # fmt: skip
async def test_bad_input_is_named(
    admin: httpx2.AsyncClient, method: str, path: str, body: dict[str, Any] | None, param: str
) -> None:
    answer = await admin.request(method, path, json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/accounts/none"),
        ("PATCH", "/accounts/none"),
        ("POST", "/accounts/none/credit"),
        ("GET", "/accounts/none/ledger"),
        ("GET", "/keys/none"),
        ("PATCH", "/keys/none"),
        ("DELETE", "/keys/none"),
        ("POST", "/keys/none/rotate"),
    ],
)
async def test_what_is_not_there(admin: httpx2.AsyncClient, method: str, path: str) -> None:
    body = {"amount_microcredits": 1} if path.endswith("credit") else {}
    assert error_of(await admin.request(method, path, json=body)) == (404, "not_found")


async def test_a_key_for_an_account_that_is_not_there(admin: httpx2.AsyncClient) -> None:
    answer = await admin.post("/keys", json={"name": "k", "account_id": "none"})
    assert error_of(answer) == (404, "not_found")


async def test_pages(admin: httpx2.AsyncClient) -> None:
    for number in range(5):
        await make_account(admin, name=f"n{number}")
    page = (await admin.get("/accounts", params={"limit": 3})).json()
    assert page["has_more"]
    rest = (await admin.get("/accounts", params={"limit": 3, "after": page["data"][-1]["id"]})).json()
    assert not rest["has_more"]
    assert len({one["id"] for one in page["data"] + rest["data"]}) == 5


async def test_what_bearers_are_told_is_as_described(shop: Shop) -> None:
    account = await shop.account()
    key = await shop.key(account, limits=Limits(requests_per_minute=5, daily_budget=10), models=(MODEL,))
    await shop.ask(key)
    await shop.balance(account)
    async with shop.client(key) as client:
        KeyDescription.model_validate_json((await client.get("/v1/key")).text)
        usage = UsageList.model_validate_json((await client.get("/v1/usage", params={"by": "day,key"})).text)
        assert [row.requests for row in usage.data] == [1]
    operation = next(each for each in OPERATIONS if each.name == "usage")
    async with shop.client(KEY) as client:
        for path in ("/v1/key", "/v1/usage"):
            answer = await client.get(path)
            assert error_of(answer) == (404, "no_account")
            assert answer.status_code in operation.errors

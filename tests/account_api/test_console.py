"""The console over HTTP: its page's headers, who may sign in, and that owners touch nothing but their own."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from account_api.test_accounts import ADMIN_KEY, ME, Shop, error_of
from toptwo.accounts import audit, store
from toptwo.accounts.ownership import MOST_KEYS
from toptwo.api.owner import SESSION_COOKIE
from toptwo.api.pages import DIRECTORY, read_pages
from toptwo.api.security import WRONG_KEYS_PER_MINUTE
from toptwo.api.sign_in import ATTEMPT_COOKIE
from toptwo.identity.opening import SignIn
from toptwo.identity.provider import Attempt, GuestList, Identity, SignInError

ORIGIN = "https://console.test"
OWN = {"origin": ORIGIN}


JANE = Identity("https://id.example", "17", "Jane\n", "jane@example.org")
MARKUP = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function")


@dataclass
class FakeProvider:
    """Says that everybody is `person`."""

    name: str = "fake"
    label: str = "Fake"
    person: Identity = JANE

    async def begin(self, attempt: Attempt, redirect_uri: str) -> str:
        return f"https://id.example/authorize?state={attempt.state}&redirect_uri={redirect_uri}"

    async def finish(self, attempt: Attempt, redirect_uri: str, code: str) -> Identity:
        assert redirect_uri == f"{ORIGIN}/console/signed-in/fake"
        if code != "good":
            raise SignInError("provider_failed", "it does not know the code")
        return self.person


@pytest.fixture
def provider() -> FakeProvider:
    return FakeProvider()


@pytest.fixture
async def shop(tmp_path: Path, provider: FakeProvider) -> AsyncIterator[Shop]:
    how = SignIn((provider,), GuestList(["@example.org"]), ORIGIN)
    made = Shop(tmp_path / "accounts.db", sign_in=how)
    yield made
    made.book.close()


@pytest.fixture
async def browser(shop: Shop) -> AsyncIterator[httpx2.AsyncClient]:
    async with open_browser(shop) as client:
        yield client


def open_browser(shop: Shop) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app=shop.app), base_url=ORIGIN)


async def sign_in(browser: httpx2.AsyncClient, code: str = "good", **changes: str) -> httpx2.Response:
    begun = await browser.get("/console/sign-in/fake")
    assert begun.status_code == 303
    state = httpx2.URL(begun.headers["location"]).params["state"]
    return await browser.get("/console/signed-in/fake", params={"state": state, "code": code, **changes})


def reason_of(answer: httpx2.Response) -> str:
    assert answer.status_code == 303
    found = re.fullmatch(r"/console#sign-in=(\w+)", answer.headers["location"])
    assert found, answer.headers["location"]
    assert SESSION_COOKIE not in answer.headers.get("set-cookie", "")
    return found[1]


async def make_key(browser: httpx2.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await browser.post("/console/account/keys", json={"name": "k", **fields}, headers=OWN)
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


async def test_the_pages_keep_to_themselves(browser: httpx2.AsyncClient) -> None:
    for path, page in read_pages().items():
        answer = await browser.get(path)
        assert (answer.status_code, answer.content) == (200, page.content)
        assert answer.headers["content-type"] == f"{page.kind}; charset=utf-8"
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        again = await browser.get(path, headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["content-security-policy"] == policy
    for path in ("/console/", "/console/..%2fapp.py", "/console/../settings.py", "/console/nothing.js"):
        assert (await browser.get(path)).status_code == 401


def test_no_page_makes_markup_of_text_or_speaks_to_others() -> None:
    for path in DIRECTORY.iterdir():
        text = path.read_text()
        for bad in MARKUP:
            assert bad not in text, path.name
        assert "style=" not in text
        assert set(re.findall(r"https?://[^\"'\s>]+", text)) <= {"http://www.w3.org/2000/svg"}


async def test_whoever_is_admitted_gets_an_account(shop: Shop, browser: httpx2.AsyncClient) -> None:
    assert (await browser.get("/console/providers")).json() == {
        "providers": [{"name": "fake", "label": "Fake"}]
    }
    assert error_of(await browser.get("/console/account")) == (401, "not_signed_in")
    answer = await sign_in(browser)
    assert answer.headers["location"] == "/console"
    session = next(each for each in answer.headers.get_list("set-cookie") if SESSION_COOKIE in each)
    for attribute in ("HttpOnly", "Secure", "SameSite=strict", "Path=/console"):
        assert attribute in session
    account = (await browser.get("/console/account")).json()
    assert (account["name"], account["email"]) == ("Jane", "jane@example.org")
    assert account["balance_microcredits"] == 500_000
    key = await make_key(browser)
    assert (await shop.ask(key["key"])).status_code == 200
    rotated = await browser.post(
        f"/console/account/keys/{key['id']}/rotate", json={"overlap_seconds": 0}, headers=OWN
    )
    assert rotated.status_code == 201
    assert (await shop.ask(key["key"])).status_code == 401
    assert (await shop.ask(rotated.json()["key"])).status_code == 200
    revoked = await browser.delete(f"/console/account/keys/{rotated.json()['id']}", headers=OWN)
    assert revoked.json()["status"] == "revoked"
    await shop.balance(await shop.account())
    usage = (await browser.get("/console/account/usage", params={"by": "model"})).json()["data"]
    assert [row["requests"] for row in usage] == [2]
    entries = await shop.book.read(lambda c: audit.entries(c, before=None, limit=1000))
    assert {entry.actor for entry in entries if entry.action.startswith("key.")} == {f"owner {account['id']}"}

    assert (await browser.post("/console/sign-out", headers=OWN)).status_code == 204
    assert error_of(await browser.get("/console/account")) == (401, "not_signed_in")


async def test_signing_out_ends_the_session_and_not_only_the_cookie(browser: httpx2.AsyncClient) -> None:
    await sign_in(browser)
    kept = browser.cookies[SESSION_COOKIE]
    await browser.post("/console/sign-out", headers=OWN)
    browser.cookies.set(SESSION_COOKIE, kept)
    assert error_of(await browser.get("/console/account")) == (401, "not_signed_in")


async def test_who_may_not_come_in(shop: Shop, browser: httpx2.AsyncClient, provider: FakeProvider) -> None:
    for person in (
        Identity("https://id.example", "1", "Eve", "eve@elsewhere.org"),
        Identity("https://id.example", "1", "Eve", None),
        Identity("https://id.example", "17 18", "Eve", "eve@example.org"),
        Identity("https://id.example", "1" * 500, "Eve", "eve@example.org"),
    ):
        provider.person = person
        assert reason_of(await sign_in(browser)) == "not_admitted"
    assert await shop.book.read(store.list_accounts) == []


async def test_what_is_no_answer_to_an_attempt_signs_nobody_in(browser: httpx2.AsyncClient) -> None:
    assert reason_of(await sign_in(browser, state="another")) == "expired"
    assert reason_of(await sign_in(browser, state="é")) == "expired"
    assert reason_of(await sign_in(browser, "bad")) == "provider_failed"
    assert reason_of(await sign_in(browser, "")) == "provider_failed"
    assert reason_of(await sign_in(browser, "x" * 5000)) == "provider_failed"
    assert reason_of(await sign_in(browser, error="access_denied")) == "declined"
    # An answer is good once, and only in the browser that asked.
    begun = await browser.get("/console/sign-in/fake")
    state = httpx2.URL(begun.headers["location"]).params["state"]
    browser.cookies.clear()
    answer = await browser.get("/console/signed-in/fake", params={"state": state, "code": "good"})
    assert reason_of(answer) == "expired"
    browser.cookies.set(ATTEMPT_COOKIE, "fake...")
    answer = await browser.get("/console/signed-in/fake", params={"state": "", "code": "good"})
    assert reason_of(answer) == "expired"
    for path in ("sign-in/other", "signed-in/other"):
        assert error_of(await browser.get(f"/console/{path}")) == (404, "not_found")


async def test_an_address_may_fail_so_often(shop: Shop, browser: httpx2.AsyncClient) -> None:
    for _ in range(WRONG_KEYS_PER_MINUTE):
        assert reason_of(await sign_in(browser, "bad")) == "provider_failed"
    assert error_of(await sign_in(browser)) == (429, "rate_limit_exceeded")


@pytest.mark.parametrize(
    "origin", [None, "null", "https://evil.test", f"{ORIGIN}.evil", "http://console.test"]
)
async def test_other_pages_change_nothing(browser: httpx2.AsyncClient, origin: str | None) -> None:
    await sign_in(browser)
    key = await make_key(browser)
    headers = {"origin": origin} if origin else {}
    for method, path in (
        ("POST", "/console/account/keys"),
        ("DELETE", f"/console/account/keys/{key['id']}"),
        ("POST", f"/console/account/keys/{key['id']}/rotate"),
        ("POST", "/console/sign-out"),
    ):
        answer = await browser.request(method, path, headers=headers, json={"name": "x"})
        assert error_of(answer) == (403, "wrong_origin")
    keys = (await browser.get("/console/account/keys")).json()["data"]
    assert [each["status"] for each in keys] == ["active"]


async def test_owners_see_and_touch_only_their_own(shop: Shop, provider: FakeProvider) -> None:
    async with open_browser(shop) as jane, open_browser(shop) as joe:
        await sign_in(jane)
        provider.person = Identity("https://id.example", "18", "Joe", "joe@example.org")
        await sign_in(joe)
        key = await make_key(jane)
        await shop.ask(key["key"])
        await shop.balance(await shop.account())
        for method, path in (("DELETE", ""), ("POST", "/rotate")):
            answer = await joe.request(
                method, f"/console/account/keys/{key['id']}{path}", headers=OWN, json={}
            )
            assert error_of(answer) == (404, "not_found")
        assert (await joe.get("/console/account/keys")).json()["data"] == []
        assert (await joe.get("/console/account/usage")).json()["data"] == []
        asked = await joe.get("/console/account/usage", params={"key_id": key["id"]})
        assert asked.json()["data"] == []
        account = (await jane.get("/console/account")).json()
        for name in ("account_id", "account"):
            answer = await joe.get("/console/account/usage", params={name: account["id"]})
            assert error_of(answer) == (400, "invalid_value")
        body = {"name": "k", "account_id": account["id"]}
        answer = await joe.post("/console/account/keys", json=body, headers=OWN)
        assert error_of(answer) == (400, "unknown_parameter")
        assert (await shop.ask(key["key"])).status_code == 200
        # A session opens the console and nothing else.
        assert (await joe.get("/v3/admin/accounts")).status_code == 401
        assert (await joe.get("/v1/models")).status_code == 401


async def test_an_account_has_so_many_keys(browser: httpx2.AsyncClient) -> None:
    await sign_in(browser)
    keys = [await make_key(browser) for _ in range(MOST_KEYS)]
    answer = await browser.post("/console/account/keys", json={"name": "k"}, headers=OWN)
    assert error_of(answer) == (409, "too_many_keys")
    await browser.delete(f"/console/account/keys/{keys[0]['id']}", headers=OWN)
    await make_key(browser)
    page = (await browser.get("/console/account/keys", params={"limit": 60})).json()
    assert page["has_more"]
    rest = await browser.get("/console/account/keys", params={"limit": 60, "after": page["data"][-1]["id"]})
    assert len(rest.json()["data"]) == 41


async def test_a_suspended_owner_is_nobody(shop: Shop, browser: httpx2.AsyncClient) -> None:
    await sign_in(browser)
    account = (await browser.get("/console/account")).json()
    await shop.book.write(lambda c: store.change_account(c, ME, account["id"], {"status": "suspended"}, 0))
    assert error_of(await browser.get("/console/account")) == (401, "not_signed_in")


async def test_without_providers_only_managers_sign_in(tmp_path: Path) -> None:
    shop = Shop(tmp_path / "accounts.db")
    async with shop.client(ADMIN_KEY) as client:
        assert (await client.get("/console/providers")).json() == {"providers": []}
        assert (await client.get("/console/sign-in/github")).status_code == 404
        assert (await client.get("/console/account")).status_code == 404
    shop.book.close()

"""The console in a browser, on a real server: what managers and owners do there, and what a page must not."""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Callable, Iterator

import httpx2
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from identity_provider import CLIENT_ID, CLIENT_SECRET, ProviderProcess, run_identity_provider
from server_process import ServerProcess

Start = Callable[..., ServerProcess]
ADMIN_KEY = "the-admin-key-of-a-test"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("Chromium is not installed")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def complaints() -> list[str]:
    """What pages complain of in their consoles."""
    return []


@pytest.fixture
def context(browser: Browser, complaints: list[str]) -> Iterator[BrowserContext]:
    """A browser without a past. What is left of the complaints at the end fails the test."""
    made = browser.new_context(permissions=["clipboard-read", "clipboard-write"], locale="en")
    made.set_default_timeout(15_000)
    made.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    made.on("weberror", lambda error: complaints.append(str(error.error)))
    yield made
    made.close()
    # A browser reports every answer that is an error, those that the page expects and shows too.
    assert [each for each in complaints if "the server responded with a status of" not in each] == []


@pytest.fixture
def identities() -> Iterator[ProviderProcess]:
    with run_identity_provider() as running:
        yield running


def start_console(start: Start, *arguments: str, **environment: str) -> ServerProcess:
    settings = {"TOPTWO_ADMIN_KEY": ADMIN_KEY, "TOPTWO_LOG_LEVEL": "debug", **environment}
    return start(*arguments, **settings).wait_until_ready()


def start_with_sign_in(start: Start, identities: ProviderProcess) -> ServerProcess:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return start_console(
        start,
        *("--port", str(port)),
        TOPTWO_PUBLIC_URL=f"http://127.0.0.1:{port}",
        TOPTWO_OIDC_ISSUER=identities.url,
        TOPTWO_OIDC_CLIENT_ID=CLIENT_ID,
        TOPTWO_OIDC_CLIENT_SECRET=CLIENT_SECRET,
        TOPTWO_OIDC_LABEL="Our login",
        TOPTWO_SIGN_IN_ALLOW="@example.org",
    )


def sign_in_as_manager(page: Page, server: ServerProcess, key: str = ADMIN_KEY) -> None:
    page.goto(f"{server.root}/console")
    page.get_by_label("Management key").fill(key)
    page.get_by_role("button", name="Sign in").click()


def create_key(page: Page, name: str) -> str:
    """Create a key, copy it with the button, and close the dialog."""
    page.get_by_label("Name of a new key").fill(name)
    page.get_by_role("button", name="Create key").click()
    return take_secret(page)


def take_secret(page: Page) -> str:
    dialog = page.get_by_role("dialog")
    shown = dialog.get_by_label("The key").input_value()
    dialog.get_by_role("button", name="Copy").click()
    expect(dialog.get_by_role("button", name="Copied")).to_be_visible()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == shown
    dialog.get_by_role("button", name="I have kept it").click()
    expect(dialog).to_be_hidden()
    assert shown not in page.content()
    assert page.locator("#secret-text").input_value() == ""
    return shown


def ask(server: ServerProcess, key: str) -> int:
    body = {"model": "tiny-moe", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
    headers = {"Authorization": f"Bearer {key}"}
    return httpx2.post(f"{server.url}/chat/completions", json=body, headers=headers, timeout=60).status_code


def row_of(page: Page, name: str) -> str:
    return page.get_by_role("row").filter(has_text=name).inner_text()


def test_a_manager_makes_an_account_and_its_keys(start: Start, context: BrowserContext) -> None:
    server = start_console(start)
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    sign_in_as_manager(page, server, "not-the-key")
    expect(page.get_by_role("status")).to_have_text("The API key is not valid.")
    sign_in_as_manager(page, server)
    page.get_by_label("Name of a new account").fill("<img src=x onerror=alert(1)> & team")
    page.get_by_label("E-mail").fill("team@example.org")
    page.get_by_role("button", name="Create account").click()
    expect(page.locator("#account-name")).to_have_text("<img src=x onerror=alert(1)> & team")
    expect(page.locator("#view")).to_contain_text("0.5 credits")

    key = create_key(page, "notebook")
    assert re.fullmatch(r"toptwo_sk_\w+", key)
    assert ask(server, key) == 200
    page.get_by_role("button", name="Rotate").click()
    second = take_secret(page)
    assert ask(server, second) == 200

    page.reload()  # the tab stays signed in, and the page shows what is new
    page.get_by_role("button", name="& team").click()
    expect(page.get_by_role("img", name="Tokens per day")).to_be_visible()
    expect(page.locator(".bar")).to_have_count(30)
    heights = [float(bar.get_attribute("height") or 0) for bar in page.locator(".bar").all()]
    assert [height > 0 for height in heights] == [False] * 29 + [True]
    page.get_by_label("What to show").select_option("requests")
    expect(page.locator(".bar title").last).to_contain_text("2 requests")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download as CSV").click()
    table = download.value.path().read_text().splitlines()
    assert table[0].startswith("day,")
    assert len(table) == 3

    page.on("dialog", lambda dialog: dialog.accept())
    newest = page.get_by_role("row").filter(has_text=f"…{second[-4:]}")
    newest.get_by_role("button", name="Revoke").click()
    expect(newest).to_contain_text("revoked")
    assert ask(server, second) == 401
    page.get_by_label("Credits to add, or to take").fill("1.25")
    page.get_by_role("button", name="Book").click()
    expect(page.locator("#view")).to_contain_text("1.75 credits")
    page.get_by_role("button", name="Suspend the account").click()
    expect(page.locator("#view")).to_contain_text("suspended")
    assert ask(server, key) == 401

    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("Management key")).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0
    assert {url.split("/console")[0].split("/v3")[0] for url in asked} == {server.root}
    said = server.out + server.err
    for secret in (key, second, ADMIN_KEY):
        assert secret not in said


def test_an_owner_signs_in_with_openid_connect(
    start: Start, context: BrowserContext, identities: ProviderProcess
) -> None:
    server = start_with_sign_in(start, identities)
    page = context.new_page()
    page.goto(f"{server.root}/console")
    page.get_by_role("link", name="Sign in with Our login").click()
    expect(page.locator("#account-name")).to_have_text("Jane Doe")
    expect(page.locator("#who")).to_have_text("jane@example.org")
    assert page.url == f"{server.root}/console"
    expect(page.get_by_role("button", name="Suspend the account")).to_have_count(0)
    key = create_key(page, "mine")
    assert ask(server, key) == 200
    assert page.evaluate("document.cookie") == ""  # no script can read the session
    (session,) = (cookie for cookie in context.cookies() if cookie["name"] == "toptwo_session")
    assert (session["httpOnly"], session["sameSite"], session["path"]) == (True, "Strict", "/console")

    page.reload()
    assert "active" in row_of(page, "mine")
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Revoke").click()
    expect(page.get_by_role("row").filter(has_text="mine")).to_contain_text("revoked")
    assert ask(server, key) == 401

    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("link", name="Sign in with Our login")).to_be_visible()
    page.reload()
    expect(page.get_by_label("Management key")).to_be_visible()
    said = server.out + server.err
    for secret in (CLIENT_SECRET, key, session["value"]):
        assert secret not in said

    identities.become(sub="2", email="eve@elsewhere.org")
    page.get_by_role("link", name="Sign in with Our login").click()
    expect(page.get_by_role("status")).to_contain_text("You may not sign in here")
    identities.refuse()
    page.get_by_role("link", name="Sign in with Our login").click()
    expect(page.get_by_role("status")).to_contain_text("the provider was told not to")
    identities.become()
    identities.lie("nonce")
    page.get_by_role("link", name="Sign in with Our login").click()
    expect(page.get_by_role("status")).to_contain_text("could not say who you are")


def test_another_site_cannot_act_for_who_is_signed_in(
    start: Start, context: BrowserContext, complaints: list[str], identities: ProviderProcess
) -> None:
    server = start_with_sign_in(start, identities)
    page = context.new_page()
    page.goto(f"{server.root}/console")
    page.get_by_role("link", name="Sign in with Our login").click()
    expect(page.locator("#account-name")).to_be_visible()
    elsewhere = context.new_page()
    elsewhere.goto(f"{identities.url.replace('127.0.0.1', 'localhost')}/jwks")  # a page of another site
    status = elsewhere.evaluate(
        """async (url) => (await fetch(url, {method: "POST", mode: "no-cors", credentials: "include",
            headers: {"content-type": "text/plain"}, body: '{"name": "stolen"}'})).type""",
        f"{server.root}/console/account/keys",
    )
    assert status == "opaque"  # it was sent, and its answer kept from the page
    with elsewhere.expect_console_message(lambda message: "frame-ancestors 'none'" in message.text):
        elsewhere.set_content(f'<iframe src="{server.root}/console"></iframe>')
    complaints[:] = [each for each in complaints if "frame-ancestors" not in each]
    page.reload()
    expect(page.locator("#account-name")).to_be_visible()
    assert "stolen" not in page.content()

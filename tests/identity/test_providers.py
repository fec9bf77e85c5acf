"""Providers, each spoken with over HTTP: who comes back is who they say, and no lie is believed."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import pytest

from identity_provider import (
    CLIENT_ID,
    CLIENT_SECRET,
    LIES,
    PERSON,
    ProviderProcess,
    run_identity_provider,
)
from toptwo.identity.github import GitHub
from toptwo.identity.openid import OpenIDProvider
from toptwo.identity.provider import Attempt, Client, GuestList, Identity, Provider, SignInError

CLIENT = Client(CLIENT_ID, CLIENT_SECRET)
BACK = "http://127.0.0.1/console/signed-in/x"
ATTEMPT = Attempt("a-state", "a-nonce", "a-verifier-of-at-least-forty-three-characters")
SUBJECT = str(PERSON["sub"])


@pytest.fixture(scope="module")
def process() -> Iterator[ProviderProcess]:
    with run_identity_provider() as running:
        yield running


@pytest.fixture
def server(process: ProviderProcess) -> ProviderProcess:
    process.become()
    process.lie("")
    return process


def openid(server: ProviderProcess) -> OpenIDProvider:
    return OpenIDProvider("oidc", "Ours", server.url, CLIENT)


async def sign_in(provider: Provider, attempt: Attempt = ATTEMPT) -> Identity:
    url = await provider.begin(ATTEMPT, BACK)
    async with httpx2.AsyncClient() as browser:
        back = (await browser.get(url)).headers["location"]
    given = httpx2.URL(back).params
    assert given["state"] == ATTEMPT.state
    return await provider.finish(attempt, BACK, given["code"])


async def test_openid_connect_says_who_somebody_is(server: ProviderProcess) -> None:
    found = await sign_in(openid(server))
    assert found == Identity(server.url, SUBJECT, "Jane Doe", "jane@example.org")


async def test_github_says_who_somebody_is(server: ProviderProcess) -> None:
    found = await sign_in(GitHub(CLIENT, server.url, server.url))
    assert found == Identity(server.url, SUBJECT, "Jane Doe", "jane@example.org")


@pytest.mark.parametrize("verified", [False, "true", None])
async def test_an_address_that_was_not_checked_is_none(server: ProviderProcess, verified: object) -> None:
    server.become(email_verified=verified)
    assert (await sign_in(openid(server))).email is None
    if verified is False:
        assert (await sign_in(GitHub(CLIENT, server.url, server.url))).email is None


@pytest.mark.parametrize("lie", LIES)
async def test_no_lie_is_believed(server: ProviderProcess, lie: str) -> None:
    server.lie(lie)
    with pytest.raises(SignInError) as caught:
        await sign_in(openid(server))
    assert caught.value.code == "provider_failed"
    assert CLIENT_SECRET not in str(caught.value)
    server.lie("")
    assert (await sign_in(openid(server))).subject == SUBJECT


async def test_a_code_is_for_who_began(server: ProviderProcess) -> None:
    thief = Attempt(ATTEMPT.state, ATTEMPT.nonce, "another-verifier-of-forty-three-characters-xx")
    for provider in (openid(server), GitHub(CLIENT, server.url, server.url)):
        with pytest.raises(SignInError):
            await sign_in(provider, thief)
    stale = Attempt(ATTEMPT.state, "another-nonce", ATTEMPT.verifier)
    with pytest.raises(SignInError):
        await sign_in(openid(server), stale)


async def test_a_provider_that_is_not_there() -> None:
    nobody = OpenIDProvider("oidc", "Ours", "http://127.0.0.1:9", CLIENT)
    with pytest.raises(SignInError) as caught:
        await nobody.begin(ATTEMPT, BACK)
    assert caught.value.code == "provider_failed"


@pytest.mark.parametrize(
    ("entries", "email", "admitted"),
    [
        (["*"], None, True),
        (["jane@example.org"], "Jane@Example.org", True),
        (["@example.org"], "jane@example.org", True),
        (["@example.org"], "jane@evil-example.org", False),
        (["@example.org"], "jane@sub.example.org", False),
        (["@example.org"], "@example.org.evil", False),
        (["@example.org"], None, False),
        ([], "jane@example.org", False),
    ],
)
def test_who_is_admitted(entries: list[str], email: str | None, admitted: bool) -> None:
    assert GuestList(entries).admits(email) is admitted


def test_a_secret_is_not_shown() -> None:
    assert CLIENT_SECRET not in repr(CLIENT)

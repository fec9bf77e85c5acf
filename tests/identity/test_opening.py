"""Which providers there are, from the settings, and what is refused before a server starts."""

from __future__ import annotations

import pytest

from toptwo.accounts.opening import are_on
from toptwo.errors import StartupError
from toptwo.identity.opening import open_sign_in
from toptwo.settings import load_settings

GITHUB = {"github_client_id": "an-id", "github_client_secret": "a-secret"}
GOOGLE = {"google_client_id": "an-id", "google_client_secret": "a-secret"}
OIDC = {
    "oidc_issuer": "https://login.example.org",
    "oidc_client_id": "an-id",
    "oidc_client_secret": "a-secret",
    "oidc_label": "Ours",
}
WHERE = {"public_url": "https://llm.example.org", "sign_in_allow": "@example.org,me@elsewhere.org"}


def test_all_providers_at_once() -> None:
    settings, _ = load_settings({**GITHUB, **GOOGLE, **OIDC, **WHERE})
    how = open_sign_in(settings)
    assert how is not None
    assert [(one.name, one.label) for one in how.providers] == [
        ("github", "GitHub"),
        ("google", "Google"),
        ("oidc", "Ours"),
    ]
    assert how.public_url == "https://llm.example.org"
    assert how.guests.admits("me@elsewhere.org")
    assert are_on(settings)


def test_none_unless_configured() -> None:
    assert open_sign_in(load_settings({})[0]) is None
    assert open_sign_in(load_settings(WHERE)[0]) is None


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"github_client_id": "x", **WHERE}, "--github-client-secret"),
        ({"google_client_secret": "x", **WHERE}, "--google-client-id"),
        ({"oidc_issuer": "https://x.example", **WHERE}, "--oidc-client-id"),
        ({"oidc_client_id": "x", "oidc_client_secret": "x", **WHERE}, "--oidc-issuer"),
        ({**GITHUB, "sign_in_allow": "*"}, "--public-url"),
        ({**GITHUB, "public_url": "https://llm.example.org"}, "--sign-in-allow"),
        ({**GITHUB, **WHERE, "public_url": "http://llm.example.org"}, "--public-url"),
        ({**GITHUB, **WHERE, "public_url": "https://llm.example.org/path"}, "--public-url"),
        ({**GITHUB, **WHERE, "public_url": "llm.example.org"}, "--public-url"),
        ({**GITHUB, **WHERE, "sign_in_allow": "example.org"}, "--sign-in-allow"),
        ({**GITHUB, **WHERE, "sign_in_allow": ""}, "--sign-in-allow"),
        ({**OIDC, **WHERE, "oidc_issuer": "http://login.example.org"}, "--oidc-issuer"),
        ({**OIDC, **WHERE, "oidc_client_secret": ""}, "--oidc-client-secret"),
    ],
)
def test_what_is_configured_by_half_stops_the_start(flags: dict[str, object], named: str) -> None:
    with pytest.raises(StartupError) as caught:
        open_sign_in(load_settings(flags)[0])
    assert named in str(caught.value)
    assert "a-secret" not in str(caught.value)


def test_signing_in_needs_accounts() -> None:
    with pytest.raises(StartupError, match="--accounts off"):
        are_on(load_settings({**GITHUB, **WHERE, "accounts": "off"})[0])

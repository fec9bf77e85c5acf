"""How people may sign in, from the settings.

Knows settings; the packages that speak with providers are imported only where there is one.
"""

from __future__ import annotations

from dataclasses import dataclass

from toptwo.errors import StartupError
from toptwo.identity.provider import Client, GuestList, Provider
from toptwo.settings import Settings, flag_of

GOOGLE_ISSUER = "https://accounts.google.com"


@dataclass(frozen=True)
class SignIn:
    """Whom to ask who somebody is, and whom to admit. public_url: where browsers reach the server."""

    providers: tuple[Provider, ...]
    guests: GuestList
    public_url: str


def open_sign_in(settings: Settings) -> SignIn | None:
    """None where nothing of it is configured. Raises StartupError for what is configured by half."""
    clients = {name: _client(settings, name) for name in ("github", "google", "oidc")}
    if (clients["oidc"] is None) != (settings.oidc_issuer is None):
        raise StartupError("--oidc-issuer, --oidc-client-id and --oidc-client-secret belong together")
    if not any(clients.values()):
        return None
    if settings.public_url is None:
        raise StartupError("--public-url: to sign people in, the server must know where browsers reach it")
    if not settings.sign_in_allow:
        raise StartupError("--sign-in-allow: say who may sign in: addresses, @domains, or * for everybody")
    return SignIn(_providers(settings, clients), GuestList(settings.sign_in_allow), settings.public_url)


def _providers(settings: Settings, clients: dict[str, Client | None]) -> tuple[Provider, ...]:
    try:
        from toptwo.identity.github import GitHub
        from toptwo.identity.openid import OpenIDProvider
    except ModuleNotFoundError:
        raise StartupError("signing in needs Authlib: pip install 'toptwo[sign-in]'") from None
    providers: list[Provider] = []
    if github := clients["github"]:
        providers.append(GitHub(github))
    if google := clients["google"]:
        providers.append(OpenIDProvider("google", "Google", GOOGLE_ISSUER, google))
    if (oidc := clients["oidc"]) and settings.oidc_issuer:
        providers.append(OpenIDProvider("oidc", settings.oidc_label, settings.oidc_issuer, oidc))
    return tuple(providers)


def _client(settings: Settings, name: str) -> Client | None:
    fields = (f"{name}_client_id", f"{name}_client_secret")
    client_id, secret = (getattr(settings, field) for field in fields)
    if client_id and secret:
        return Client(client_id, secret)
    if client_id or secret:
        raise StartupError(f"{flag_of(fields[0])} and {flag_of(fields[1])} belong together")
    return None

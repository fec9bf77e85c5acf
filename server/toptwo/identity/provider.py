"""What a provider of identities is asked, and what it answers.

Plain data and a protocol; must not know HTTP, accounts or any provider in particular.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


class SignInError(Exception):
    """Nobody is signed in by this. code: one of few words for the page; the message is for the log."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Client:
    """How this server is known at a provider. secret: shown to nobody."""

    id: str
    secret: str

    def __repr__(self) -> str:
        """Without the secret."""
        return f"Client({self.id})"


@dataclass(frozen=True)
class Attempt:
    """One attempt to sign in, which the browser keeps while it is away.

    state: the provider sends it back, so that nobody is signed in by a link of somebody else's. nonce: it is
    in the token, so that one is good once. verifier: proves that who began is who ends it (PKCE, RFC 7636).
    """

    state: str
    nonce: str
    verifier: str


@dataclass(frozen=True)
class Identity:
    """Who somebody is. subject: what the provider calls them for ever. email: one that it has checked."""

    issuer: str
    subject: str
    name: str
    email: str | None


class Provider(Protocol):
    """Somebody who knows who people are. name: in addresses. label: what people call it."""

    name: str
    label: str

    async def begin(self, attempt: Attempt, redirect_uri: str) -> str:
        """The address to send the browser to. Raises SignInError."""

    async def finish(self, attempt: Attempt, redirect_uri: str, code: str) -> Identity:
        """Who came back with `code`. Raises SignInError."""


class GuestList:
    """Who may sign in: addresses, `@domain` for all of a domain, `*` for everybody."""

    def __init__(self, entries: Iterable[str]) -> None:
        self._entries = frozenset(entry.lower() for entry in entries)

    def admits(self, email: str | None) -> bool:
        """Whether somebody with this checked address may come in."""
        if "*" in self._entries:
            return True
        email = (email or "").lower()
        return "@" in email and not self._entries.isdisjoint({email, "@" + email.rpartition("@")[2]})

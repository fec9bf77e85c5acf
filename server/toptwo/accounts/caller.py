"""Who makes a request, and what they may do: what the rest of the server knows of a key.

Plain data; must not know where it comes from.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

Scope = Literal["chat", "models:read", "usage:read"]
SCOPES: tuple[Scope, ...] = get_args(Scope)


@dataclass(frozen=True)
class Limits:
    """Of a key or of an account; None for none. Budgets are micro-credits per day and month, in UTC."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None
    daily_budget: int | None = None
    monthly_budget: int | None = None


NO_LIMITS = Limits()
LIMIT_NAMES = tuple(field.name for field in fields(Limits))


@dataclass(frozen=True)
class Caller:
    """The holder of an accepted key.

    key_id: names the key, in logs too. account_id: None for a key from the settings, which belongs to nobody.
    models: those that it may use; None for all.
    """

    key_id: str
    account_id: str | None = None
    scopes: frozenset[str] = frozenset(SCOPES)
    models: frozenset[str] | None = None
    key_limits: Limits = NO_LIMITS
    account_limits: Limits = NO_LIMITS


@dataclass(frozen=True)
class Manager:
    """The holder of an accepted management key. actor: what the audit log calls it."""

    actor: str

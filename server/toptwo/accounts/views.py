"""Accounts, keys and the rest as people and programs are shown them: one form for commands and for HTTP.

Knows dataclasses and JSON's types; must not know who reads them. Amounts are whole micro-credits, times are
in ISO 8601 with their zone.
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from toptwo.accounts.audit import AuditEntry
from toptwo.accounts.caller import Limits
from toptwo.accounts.key_store import KeyInfo
from toptwo.accounts.ledger import LedgerEntry
from toptwo.accounts.money import Price
from toptwo.accounts.store import Account

Json = dict[str, Any]

BUDGETS = {"daily_budget": "daily_budget_microcredits", "monthly_budget": "monthly_budget_microcredits"}
"""Limits that are amounts, and what they are called where they are shown."""


def show_account(account: Account) -> Json:
    """An account."""
    return {
        "id": account.id,
        "name": account.name,
        "email": account.email,
        "status": account.status,
        "balance_microcredits": account.balance,
        "limits": show_limits(account.limits),
        "created_at": show_time(account.created_at),
    }


def show_key(key: KeyInfo, now: int) -> Json:
    """A key, without the key. now: whether it has expired depends on it."""
    return {
        "id": key.id,
        "kind": key.kind,
        "account_id": key.account_id,
        "name": key.name,
        "last4": key.last4,
        "status": key.status(now),
        "scopes": list(key.scopes) if key.kind == "inference" else [],
        "models": None if key.models is None else list(key.models),
        "limits": show_limits(key.limits),
        "created_at": show_time(key.created_at),
        "created_by": key.created_by,
        "expires_at": show_time(key.expires_at),
        "revoked_at": show_time(key.revoked_at),
        "rotated_from": key.rotated_from,
        "last_used_at": show_time(key.last_used_at),
    }


def show_limits(limits: Limits) -> Json:
    """Limits; null for none."""
    return {BUDGETS.get(name, name): value for name, value in asdict(limits).items()}


def show_price(model: str, price: Price) -> Json:
    """What a million tokens cost."""
    return {
        "model": model,
        "prompt_microcredits": price.prompt,
        "cached_prompt_microcredits": price.cached,
        "completion_microcredits": price.completion,
    }


def show_entry(entry: LedgerEntry) -> Json:
    """A row of the ledger."""
    return {
        "id": entry.id,
        "kind": entry.kind,
        "amount_microcredits": entry.amount,
        "at": show_time(entry.at),
        "key_id": entry.key_id,
        "request_id": entry.request_id,
        "note": entry.note,
    }


def show_audit(entry: AuditEntry) -> Json:
    """An entry of the audit log."""
    return asdict(entry) | {"at": show_time(entry.at)}


def show_time(at: int | None) -> str | None:
    """Seconds since 1970 as 2026-11-27T09:30:00Z."""
    return None if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

"""What bearers are told of their keys and their usage, for the description of the API.

Knows the shape of answers; must not know how they come about.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from toptwo.api.response_schemas import MOST, Answer
from toptwo.api.sampling_schema import INT64_MAX

Amount = Annotated[int, Field(ge=0, le=INT64_MAX)]


class KeyLimits(Answer):
    """Limits; null for none."""

    requests_per_minute: Amount | None
    tokens_per_minute: Amount | None
    concurrent_requests: Amount | None
    daily_budget_microcredits: Amount | None
    monthly_budget_microcredits: Amount | None


class KeyAccount(Answer):
    """The account of a key."""

    id: str
    name: str
    balance_microcredits: Amount
    limits: KeyLimits


class KeyDescription(Answer):
    """Everything about a key but the key."""

    id: str
    kind: Literal["inference"]
    account_id: str
    name: str
    last4: str
    status: Literal["active"]
    scopes: Annotated[list[str], MOST]
    models: Annotated[list[str], MOST] | None
    limits: KeyLimits
    created_at: str
    created_by: str
    expires_at: str | None
    revoked_at: None
    rotated_from: str | None
    last_used_at: str | None
    spent_today_microcredits: Amount
    spent_this_month_microcredits: Amount
    account: KeyAccount


class UsageSums(Answer):
    """What was used; of that by which it is not divided, null."""

    day: str | None
    account: str | None
    key: str | None
    model: str | None
    requests: Amount
    prompt_tokens: Amount
    cached_tokens: Amount
    completion_tokens: Amount
    cost_microcredits: Amount


class UsageList(Answer):
    """Usage, by what was asked for."""

    object: Literal["list"]
    data: Annotated[list[UsageSums], MOST]
    has_more: bool

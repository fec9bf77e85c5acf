"""Bodies of the management API: strict, and unknown fields are refused, for a field that is accepted and
ignored would be a limit that somebody believes in.

Knows fields and their bounds; must not know rows or routes.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, StringConstraints, field_validator

from toptwo.accounts.caller import SCOPES, Limits, Scope
from toptwo.accounts.key_store import KeyRequest
from toptwo.accounts.money import MICRO, MOST_CREDITS
from toptwo.accounts.views import BUDGETS
from toptwo.api.strict import StrictModel

MOST_MICRO = MOST_CREDITS * MICRO

Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)]
ModelName = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Email = Annotated[str, StringConstraints(max_length=320, pattern=r"^[^@\s]+@[^@\s]+$")]
Limit = Annotated[int, Field(ge=1, le=1 << 53)]
Amount = Annotated[int, Field(ge=0, le=MOST_MICRO)]
Note = Annotated[str, StringConstraints(max_length=500)]
Seconds = Annotated[int, Field(ge=0, le=10 * 366 * 86400)]
Unix = Annotated[int, Field(ge=0, le=1 << 40)]


class LimitsBody(StrictModel):
    """Limits; null, or nothing, for none."""

    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    concurrent_requests: Limit | None = None
    daily_budget_microcredits: Amount | None = None
    monthly_budget_microcredits: Amount | None = None

    def limits(self) -> Limits:
        """As the accounts know them."""
        return Limits(**self.columns(set(type(self).model_fields)))

    def columns(self, names: set[str] | None = None) -> dict[str, Any]:
        """The columns of the limits that were given."""
        names = self.model_fields_set if names is None else names
        own = {shown: name for name, shown in BUDGETS.items()}
        return {own.get(name, name): getattr(self, name) for name in names}


class CreateAccount(StrictModel):
    """grant_microcredits: what it begins with; by default what the server is set to."""

    name: Name
    email: Email | None = None
    grant_microcredits: Amount | None = None
    limits: LimitsBody = LimitsBody()


class ChangeAccount(StrictModel):
    """What is given is changed; a limit of null is lifted."""

    name: Name | None = None
    email: Email | None = None
    status: Annotated[str, StringConstraints(pattern="^(active|suspended)$")] | None = None
    limits: LimitsBody | None = None

    def columns(self) -> dict[str, Any]:
        """The columns to change."""
        return _columns(self, nullable={"email"})


class CreditAccount(StrictModel):
    """What is added to a balance, or taken from it."""

    amount_microcredits: Annotated[int, Field(ge=-MOST_MICRO, le=MOST_MICRO)]
    note: Note = ""


class CreateOwnKey(StrictModel):
    """A key of the account that asks. expires_at: seconds since 1970."""

    name: Name
    scopes: list[Scope] | None = Field(None, min_length=1)
    models: list[ModelName] | None = Field(None, min_length=1, max_length=100)
    limits: LimitsBody = LimitsBody()
    expires_at: Unix | None = None

    def wanted(self, account_id: str | None) -> KeyRequest:
        """As the accounts know it."""
        return KeyRequest(
            name=self.name,
            account_id=account_id,
            scopes=tuple(self.scopes or SCOPES),
            models=None if self.models is None else tuple(self.models),
            limits=self.limits.limits(),
            expires_at=self.expires_at,
        )


class CreateKey(CreateOwnKey):
    """account_id: whose it is; without one, it is a management key."""

    account_id: str | None = None


class ChangeKey(StrictModel):
    """What is given is changed; null lifts a limit, the end, or the restriction to models."""

    name: Name | None = None
    scopes: list[Scope] | None = Field(None, min_length=1)
    models: list[ModelName] | None = Field(None, min_length=1, max_length=100)
    limits: LimitsBody | None = None
    expires_at: Unix | None = None

    def columns(self) -> dict[str, Any]:
        """The columns to change."""
        return _columns(self, nullable={"models", "expires_at"})


class RotateKey(StrictModel):
    """overlap_seconds: how long the old key still works."""

    overlap_seconds: Seconds = 86400


class SetPrice(StrictModel):
    """Micro-credits per million tokens. cached_prompt_microcredits: as for others, by default."""

    model: ModelName
    prompt_microcredits: Amount = 0
    cached_prompt_microcredits: Amount | None = None
    completion_microcredits: Amount = 0

    @field_validator("model")
    @classmethod
    def _refuse_control_characters(cls, name: str) -> str:
        if not name.isprintable():
            raise ValueError("It must be printable")
        return name


def _columns(body: Any, nullable: set[str]) -> dict[str, Any]:
    given = {
        name: getattr(body, name)
        for name in body.model_fields_set - {"limits"}
        if getattr(body, name) is not None or name in nullable
    }
    return given | (body.limits.columns() if body.limits is not None else {})

"""Query strings of the management API: known names, each once, each within its bounds.

Knows names and values; must not know routes.
"""

from __future__ import annotations

from datetime import date

from starlette.requests import Request

from toptwo.accounts.usage import GROUPINGS, Grouping, UsageQuery
from toptwo.errors import ApiError

MOST_PER_PAGE = 1000
_LONGEST = 256


class Query:
    """The query string of a request. Raises ApiError (400) for names that are not among those allowed."""

    def __init__(self, request: Request, *allowed: str) -> None:
        given = request.query_params.multi_items()
        self._values = dict(given)
        for name, value in given:
            if name not in allowed:
                raise _bad(name, f"There is no such parameter; there are {', '.join(allowed)}.")
            if len(value) > _LONGEST:
                raise _bad(name, "It is too long.")
        if len(self._values) < len(given):
            raise _bad(given[-1][0], "A parameter may be given once.")

    def text(self, name: str) -> str | None:
        """A value as it is."""
        return self._values.get(name)

    def number(self, name: str) -> int | None:
        """A value as a positive number."""
        value = self._values.get(name)
        if value is None:
            return None
        if not (value.isascii() and value.isdecimal() and 0 < int(value) < 1 << 62):
            raise _bad(name, "It must be a positive number.")
        return int(value)

    @property
    def limit(self) -> int:
        """How many rows a page has."""
        limit = self.number("limit") or 100
        if limit > MOST_PER_PAGE:
            raise _bad("limit", f"It is at most {MOST_PER_PAGE}.")
        return limit

    @property
    def format(self) -> str:
        """json or csv."""
        form = self.text("format") or "json"
        if form not in ("json", "csv"):
            raise _bad("format", "Supported values: json, csv.")
        return form

    def usage(self, **fixed: str | None) -> UsageQuery:
        """What to sum. fixed: what the caller may not choose."""
        chosen = {"account_id": self.text("account_id"), "key_id": self.text("key_id"), **fixed}
        return UsageQuery(
            by=self._groupings(),
            model=self.text("model"),
            first_day=self._day("from"),
            last_day=self._day("to"),
            **chosen,
        )

    def _groupings(self) -> tuple[Grouping, ...]:
        names = (self.text("by") or "day").split(",")
        for name in names:
            if name not in GROUPINGS:
                raise _bad("by", f"Supported values: {', '.join(GROUPINGS)}, separated by commas.")
        return tuple(name for name in GROUPINGS if name in names)

    def _day(self, name: str) -> str | None:
        value = self.text(name)
        try:
            return None if value is None else date.fromisoformat(value).isoformat()
        except ValueError:
            raise _bad(name, "It must be a date like 2026-11-27.") from None


def _bad(name: str, rule: str) -> ApiError:
    shown = name[:64]
    return ApiError(f"Invalid value for '{shown}': {rule}", param=shown, code="invalid_value")

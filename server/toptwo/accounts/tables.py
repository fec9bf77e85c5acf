"""The tables, as SQLAlchemy Core sees them; `migrations` makes them, and a test compares the two.

Times are whole seconds since 1970 in UTC, amounts are micro-credits. `ledger` and `audit` are only ever added
to: triggers of the database see to it.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite numbers rows by itself in a column of exactly this type alone.
_RowNumber = BigInteger().with_variant(Integer, "sqlite")


def _limit_columns() -> list[Column[int]]:
    """Those of `caller.Limits`."""
    return [
        Column("requests_per_minute", BigInteger),
        Column("tokens_per_minute", BigInteger),
        Column("concurrent_requests", BigInteger),
        Column("daily_budget", BigInteger),
        Column("monthly_budget", BigInteger),
    ]


accounts = Table(
    "accounts",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("email", String(320)),
    Column("status", String(16), nullable=False),
    Column("balance", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    *_limit_columns(),
    # Whoever signed in through OpenID Connect: "issuer subject".
    Column("identity", String(500), unique=True),
    CheckConstraint("balance >= 0", name="balance"),
    CheckConstraint("status IN ('active', 'suspended')", name="status"),
)

keys = Table(
    "keys",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("hash", LargeBinary(32), nullable=False, unique=True),
    Column("account_id", String(32), ForeignKey("accounts.id"), index=True),
    Column("name", String(200), nullable=False),
    Column("last4", String(4), nullable=False),
    Column("scopes", Text, nullable=False),  # JSON
    Column("models", Text),  # JSON; null for all
    *_limit_columns(),
    Column("created_at", BigInteger, nullable=False),
    Column("created_by", String(200), nullable=False),
    Column("expires_at", BigInteger),
    Column("revoked_at", BigInteger),
    Column("rotated_from", String(32)),
    Column("last_used_at", BigInteger),
    CheckConstraint("(kind = 'management') = (account_id IS NULL)", name="owner"),
)

prices = Table(
    "prices",
    metadata,
    Column("model", String(256), primary_key=True),
    Column("prompt", BigInteger, nullable=False),
    Column("cached", BigInteger, nullable=False),
    Column("completion", BigInteger, nullable=False),
    CheckConstraint("prompt >= 0 AND cached >= 0 AND completion >= 0", name="price"),
)

ledger = Table(
    "ledger",
    metadata,
    Column("id", _RowNumber, primary_key=True),
    Column("account_id", String(32), ForeignKey("accounts.id"), nullable=False, index=True),
    Column("kind", String(16), nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("key_id", String(32)),
    Column("request_id", String(128)),
    Column("closes", Integer),  # 0: the row opens the request's charge, 1: it closes it; each at most once
    Column("note", String(500)),
    UniqueConstraint("request_id", "closes"),
    CheckConstraint("kind IN ('grant', 'credit', 'reserve', 'settle', 'refund')", name="kind"),
)

usage = Table(
    "usage",
    metadata,
    Column("request_id", String(128), primary_key=True),
    Column("account_id", String(32), ForeignKey("accounts.id"), nullable=False),
    Column("key_id", String(32), nullable=False),
    Column("model", String(256), nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("day", String(10), nullable=False),
    Column("lease", String(32), nullable=False),
    Column("reserved", BigInteger, nullable=False),
    Column("outcome", String(16)),  # null while it runs
    Column("cost", BigInteger, nullable=False, server_default="0"),
    Column("prompt_tokens", BigInteger, nullable=False, server_default="0"),
    Column("cached_tokens", BigInteger, nullable=False, server_default="0"),
    Column("completion_tokens", BigInteger, nullable=False, server_default="0"),
    Index("ix_usage_account_id_day", "account_id", "day"),
    Index("ix_usage_key_id_day", "key_id", "day"),
    Index(
        "ix_usage_open",
        "lease",
        sqlite_where=text("outcome IS NULL"),
        postgresql_where=text("outcome IS NULL"),
    ),
)

spending = Table(
    "spending",
    metadata,
    Column("owner", String(32), primary_key=True),  # an account's or a key's id
    Column("day", String(10), primary_key=True),
    Column("amount", BigInteger, nullable=False),
    CheckConstraint("amount >= 0", name="amount"),
)

leases = Table(
    "leases",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("seen_at", BigInteger, nullable=False),
)

sessions = Table(
    "sessions",
    metadata,
    Column("hash", LargeBinary(32), primary_key=True),
    Column("account_id", String(32), ForeignKey("accounts.id"), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False, index=True),
)

audit = Table(
    "audit",
    metadata,
    Column("id", _RowNumber, primary_key=True),
    Column("at", BigInteger, nullable=False),
    Column("actor", String(200), nullable=False),
    Column("action", String(64), nullable=False),
    Column("target", String(256), nullable=False),
    Column("detail", Text, nullable=False),  # JSON
    Column("address", String(64)),
    Column("previous", LargeBinary(32), nullable=False),
    Column("hash", LargeBinary(32), nullable=False),
)

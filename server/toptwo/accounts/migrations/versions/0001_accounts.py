"""Accounts, keys, prices, ledger, usage and the audit log."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_ROW_NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Make all tables."""
    _make_accounts_and_keys()
    _make_ledger()
    _make_usage()
    _make_audit()
    for table in ("ledger", "audit"):
        _forbid_changes(table)


def _limit_columns() -> list[sa.Column[int]]:
    names = (
        "requests_per_minute",
        "tokens_per_minute",
        "concurrent_requests",
        "daily_budget",
        "monthly_budget",
    )
    return [sa.Column(name, sa.BigInteger) for name in names]


def _make_accounts_and_keys() -> None:
    op.create_table(
        "accounts",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("email", sa.String(320)),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("balance", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        *_limit_columns(),
        sa.Column("identity", sa.String(500)),
        sa.PrimaryKeyConstraint("id", name="pk_accounts"),
        sa.UniqueConstraint("identity", name="uq_accounts_identity"),
        sa.CheckConstraint("balance >= 0", name="ck_accounts_balance"),
        sa.CheckConstraint("status IN ('active', 'suspended')", name="ck_accounts_status"),
    )
    op.create_table(
        "keys",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("hash", sa.LargeBinary(32), nullable=False),
        sa.Column("account_id", sa.String(32)),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("last4", sa.String(4), nullable=False),
        sa.Column("scopes", sa.Text, nullable=False),
        sa.Column("models", sa.Text),
        *_limit_columns(),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("created_by", sa.String(200), nullable=False),
        sa.Column("expires_at", sa.BigInteger),
        sa.Column("revoked_at", sa.BigInteger),
        sa.Column("rotated_from", sa.String(32)),
        sa.Column("last_used_at", sa.BigInteger),
        sa.PrimaryKeyConstraint("id", name="pk_keys"),
        sa.UniqueConstraint("hash", name="uq_keys_hash"),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name="fk_keys_account_id"),
        sa.CheckConstraint("(kind = 'management') = (account_id IS NULL)", name="ck_keys_owner"),
    )
    op.create_index("ix_keys_account_id", "keys", ["account_id"])
    op.create_table(
        "prices",
        sa.Column("model", sa.String(256), nullable=False),
        sa.Column("prompt", sa.BigInteger, nullable=False),
        sa.Column("cached", sa.BigInteger, nullable=False),
        sa.Column("completion", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("model", name="pk_prices"),
        sa.CheckConstraint("prompt >= 0 AND cached >= 0 AND completion >= 0", name="ck_prices_price"),
    )


def _make_ledger() -> None:
    op.create_table(
        "ledger",
        sa.Column("id", _ROW_NUMBER, nullable=False),
        sa.Column("account_id", sa.String(32), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("amount", sa.BigInteger, nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("key_id", sa.String(32)),
        sa.Column("request_id", sa.String(128)),
        sa.Column("closes", sa.Integer),
        sa.Column("note", sa.String(500)),
        sa.PrimaryKeyConstraint("id", name="pk_ledger"),
        sa.UniqueConstraint("request_id", "closes", name="uq_ledger_request_id_closes"),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name="fk_ledger_account_id"),
        sa.CheckConstraint(
            "kind IN ('grant', 'credit', 'reserve', 'settle', 'refund')", name="ck_ledger_kind"
        ),
    )
    op.create_index("ix_ledger_account_id", "ledger", ["account_id"])


def _make_usage() -> None:
    op.create_table(
        "usage",
        sa.Column("request_id", sa.String(128), nullable=False),
        sa.Column("account_id", sa.String(32), nullable=False),
        sa.Column("key_id", sa.String(32), nullable=False),
        sa.Column("model", sa.String(256), nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("day", sa.String(10), nullable=False),
        sa.Column("lease", sa.String(32), nullable=False),
        sa.Column("reserved", sa.BigInteger, nullable=False),
        sa.Column("outcome", sa.String(16)),
        *(
            sa.Column(name, sa.BigInteger, nullable=False, server_default="0")
            for name in ("cost", "prompt_tokens", "cached_tokens", "completion_tokens")
        ),
        sa.PrimaryKeyConstraint("request_id", name="pk_usage"),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name="fk_usage_account_id"),
    )
    op.create_index("ix_usage_account_id_day", "usage", ["account_id", "day"])
    op.create_index("ix_usage_key_id_day", "usage", ["key_id", "day"])
    is_open = sa.text("outcome IS NULL")
    op.create_index("ix_usage_open", "usage", ["lease"], sqlite_where=is_open, postgresql_where=is_open)
    op.create_table(
        "spending",
        sa.Column("owner", sa.String(32), nullable=False),
        sa.Column("day", sa.String(10), nullable=False),
        sa.Column("amount", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("owner", "day", name="pk_spending"),
        sa.CheckConstraint("amount >= 0", name="ck_spending_amount"),
    )
    op.create_table(
        "leases",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("seen_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_leases"),
    )


def _make_audit() -> None:
    op.create_table(
        "audit",
        sa.Column("id", _ROW_NUMBER, nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("actor", sa.String(200), nullable=False),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("target", sa.String(256), nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
        sa.Column("address", sa.String(64)),
        sa.Column("previous", sa.LargeBinary(32), nullable=False),
        sa.Column("hash", sa.LargeBinary(32), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
    )


def _forbid_changes(table: str) -> None:
    """What has been written there stays."""
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
            )
        return
    op.execute(
        f"CREATE FUNCTION {table}_is_append_only() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{table} is append-only'; END $$"
    )
    op.execute(
        f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
        f"FOR EACH STATEMENT EXECUTE FUNCTION {table}_is_append_only()"
    )

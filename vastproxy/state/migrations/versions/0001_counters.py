"""
The first tables: counters, money, operations and items.

What is here is history: it stays as it is, whatever becomes of ``vastproxy/state/tables.py``.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
FOR_EVER = str(2**53 - 1)


def _number(name: str, default: str = "0") -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, nullable=False, server_default=default)


def upgrade() -> None:
    """Create the tables."""
    _create_counters()
    _create_money()
    _create_operations()
    _create_items()


def _create_counters() -> None:
    op.create_table(
        "frequency_caps",
        sa.Column("id", ID, primary_key=True),
        sa.Column("account", sa.Text, nullable=False, server_default=""),
        sa.Column("key", sa.Text, nullable=False),
        _number("count"),
        _number("expires_at", FOR_EVER),
        _number("began"),
        sa.Column("pieces", sa.Text, nullable=False, server_default="{}"),
        _number("held"),
        sa.UniqueConstraint("account", "key", name="uq_frequency_caps_account_key"),
        sa.CheckConstraint("held >= 0", name="ck_frequency_caps_held"),
    )
    op.create_index("ix_frequency_caps_expires_at", "frequency_caps", ["expires_at"])


def _create_money() -> None:
    op.create_table(
        "budget_tracking",
        sa.Column("id", ID, primary_key=True),
        sa.Column("campaign_id", sa.Text, nullable=False),
        _number("spent"),
        _number("reserved"),
        _number("late"),
        _number("timestamp"),
        sa.UniqueConstraint("campaign_id", name="uq_budget_tracking_campaign_id"),
        sa.CheckConstraint("reserved >= 0", name="ck_budget_tracking_reserved"),
        sa.CheckConstraint("late >= 0", name="ck_budget_tracking_late"),
    )


def _create_operations() -> None:
    op.create_table(
        "operations",
        sa.Column("account", sa.Text, primary_key=True),
        sa.Column("operation", sa.String(100), primary_key=True),
        sa.Column("status", sa.String(7), nullable=False),
        sa.Column("amounts", sa.Text, nullable=False, server_default="{}"),
        _number("held_until"),
        _number("kept_until"),
        _number("booked"),
        _number("booked_at"),
        sa.CheckConstraint("status IN ('held', 'counted', 'void')", name="ck_operations_status"),
        sa.CheckConstraint("booked >= 0", name="ck_operations_booked"),
        sa.CheckConstraint("booked = 0 OR status = 'counted'", name="ck_operations_booked_counted"),
    )
    _create_index("ix_operations_held", ["account", "held_until"], "status = 'held'")
    _create_index("ix_operations_held_until", ["held_until"], "status = 'held'")
    _create_index("ix_operations_kept_until", ["kept_until"], "status != 'held'")


def _create_index(name: str, columns: list[str], where: str) -> None:
    condition = sa.text(where)
    op.create_index(name, "operations", columns, postgresql_where=condition, sqlite_where=condition)


def _create_items() -> None:
    op.create_table(
        "viewer_items",
        sa.Column("account", sa.Text, primary_key=True),
        sa.Column("items", sa.Text, nullable=False, server_default="{}"),
        _number("expires_at"),
    )
    op.create_index("ix_viewer_items_expires_at", "viewer_items", ["expires_at"])


def downgrade() -> None:
    """Drop the tables, and all that was counted."""
    for table in ("viewer_items", "operations", "budget_tracking", "frequency_caps"):
        op.drop_table(table)

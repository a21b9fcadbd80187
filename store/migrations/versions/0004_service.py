"""What a service needs: queued jobs, claims, events, tables to solve again, exports, tokens."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

NEW = ("tokens", "exports", "solver_tables", "events", "claims")


def upgrade() -> None:
    """Jobs may wait for their plan; five tables are new."""
    with op.batch_alter_table("jobs") as jobs:
        jobs.alter_column("weights_hash", existing_type=sa.String(64), nullable=True)
        jobs.add_column(sa.Column("launch", sa.JSON))
        jobs.add_column(sa.Column("attempts", sa.Integer, nullable=False, server_default="0"))
        jobs.add_column(sa.Column("submitted_by", sa.Text))
        jobs.add_column(sa.Column("once", sa.String(64)))
        jobs.add_column(sa.Column("progress", sa.JSON))
        jobs.create_index("ix_jobs_state", ["state"])
        jobs.create_index("ix_jobs_once", ["once"], unique=True)
    op.create_table(
        "claims",
        sa.Column("key", sa.String(100), primary_key=True),
        sa.Column("owner", sa.Text, nullable=False, index=True),
        sa.Column("expires_at", sa.Float, nullable=False),
    )
    op.create_table(
        "events",
        sa.Column("id", sa.Integer, primary_key=True),
        _job(index=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("data", sa.JSON, nullable=False),
        _time("at"),
    )
    op.create_table(
        "solver_tables",
        sa.Column("job_id", sa.Integer, sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("tables", sa.JSON, nullable=False),
    )
    op.create_table(
        "exports",
        sa.Column("id", sa.Integer, primary_key=True),
        _job(index=True),
        sa.Column("point", sa.Integer, nullable=False),
        sa.Column("targets", sa.JSON, nullable=False),
        sa.Column("state", sa.String(16), nullable=False, index=True),
        sa.Column("error", sa.Text),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("files", sa.JSON, nullable=False),
        sa.Column("result", sa.JSON, nullable=False),
        sa.Column("submitted_by", sa.Text),
        _time("created_at"),
    )
    op.create_table(
        "tokens",
        sa.Column("name", sa.String(80), primary_key=True),
        sa.Column("hash", sa.String(64), nullable=False, unique=True),
        sa.Column("role", sa.String(16), nullable=False),
        _time("created_at"),
        sa.Column("revoked_at", sa.DateTime(timezone=True)),
    )


def downgrade() -> None:
    """Drop them, and the jobs that nobody has planned, which the older schema can't hold."""
    for table in NEW:
        op.drop_table(table)
    op.execute(sa.text("DELETE FROM jobs WHERE weights_hash IS NULL"))
    with op.batch_alter_table("jobs") as jobs:
        for name in ("ix_jobs_once", "ix_jobs_state"):
            jobs.drop_index(name)
        for name in ("progress", "once", "submitted_by", "attempts", "launch"):
            jobs.drop_column(name)
        jobs.alter_column("weights_hash", existing_type=sa.String(64), nullable=False)


def _job(*, index: bool) -> "sa.Column[int]":
    return sa.Column("job_id", sa.Integer, sa.ForeignKey("jobs.id"), nullable=False, index=index)


def _time(name: str) -> "sa.Column[object]":
    return sa.Column(name, sa.DateTime(timezone=True), nullable=False)

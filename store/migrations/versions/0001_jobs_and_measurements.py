"""Jobs, models, candidates, measurements and sensitivity shares."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the first tables."""
    op.create_table(
        "models",
        sa.Column("weights_hash", sa.String(64), primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("revision", sa.String(64)),
        sa.Column("layout", sa.JSON, nullable=False),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("key", sa.String(64), nullable=False, unique=True),
        sa.Column(
            "weights_hash", sa.String(64), sa.ForeignKey("models.weights_hash"), nullable=False
        ),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("error", sa.Text),
        sa.Column("config", sa.JSON, nullable=False),
        sa.Column("facts", sa.JSON, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_table(
        "candidates",
        sa.Column("job_id", sa.Integer, sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("point", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("map_hash", sa.String(64), nullable=False, index=True),
        sa.Column("origin", sa.Text, nullable=False),
        sa.Column("control", sa.String(16)),
        sa.Column("schemes", sa.JSON, nullable=False),
        sa.Column("weight_bytes", sa.BigInteger, nullable=False),
        sa.Column("average_bits", sa.Float, nullable=False),
        sa.Column("predicted_kl", sa.Float),
        sa.Column("certificate", sa.JSON),
        sa.Column("finalist", sa.Boolean, nullable=False),
        sa.Column("failure", sa.Text),
    )
    op.create_table(
        "measurements",
        sa.Column("key", sa.String(64), primary_key=True),
        sa.Column("weights_hash", sa.String(64), nullable=False, index=True),
        sa.Column("map_hash", sa.String(64), nullable=False, index=True),
        sa.Column("chunk_hash", sa.String(64), nullable=False),
        sa.Column("quantizer", sa.Text, nullable=False),
        sa.Column("dtype", sa.String(16), nullable=False),
        sa.Column("kl_sum", sa.Float, nullable=False),
        sa.Column("nll_sum", sa.Float, nullable=False),
        sa.Column("tokens", sa.Integer, nullable=False),
        sa.Column("seconds", sa.Float, nullable=False),
        sa.Column("measured_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_table(
        "sensitivity_shares",
        sa.Column("key", sa.String(64), primary_key=True),
        sa.Column("estimator", sa.String(64), nullable=False),
        sa.Column("provenance", sa.JSON, nullable=False),
        sa.Column("sums", sa.JSON, nullable=False),
        sa.Column("tokens", sa.JSON, nullable=False),
        sa.Column("seconds", sa.Float, nullable=False),
    )


def downgrade() -> None:
    """Drop them."""
    for table in ("sensitivity_shares", "measurements", "candidates", "jobs", "models"):
        op.drop_table(table)

"""Times of products and of whole maps on devices."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

WHERE = (
    ("device", sa.Text, False),
    ("engine", sa.String(32), False),
    ("kernels", sa.Text, False),
    ("threads", sa.Integer, False),
)


def upgrade() -> None:
    """Create both tables."""
    op.create_table(
        "cell_times",
        sa.Column("key", sa.String(64), primary_key=True),
        *(sa.Column(name, kind, nullable=null) for name, kind, null in WHERE),
        sa.Column("rows", sa.Integer, nullable=False),
        sa.Column("columns", sa.Integer, nullable=False),
        sa.Column("kernel", sa.String(64), nullable=False),
        sa.Column("batch", sa.Integer, nullable=False),
        sa.Column("median_s", sa.Float),
        sa.Column("spread_s", sa.Float),
        sa.Column("failure", sa.Text),
        sa.Column("measured_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_table(
        "map_times",
        sa.Column("key", sa.String(64), primary_key=True),
        *(sa.Column(name, kind, nullable=null) for name, kind, null in WHERE),
        sa.Column("map", sa.String(64), nullable=False, index=True),
        sa.Column("workload", sa.JSON, nullable=False),
        sa.Column("prefill_s", sa.JSON, nullable=False),
        sa.Column("decode_s", sa.JSON, nullable=False),
        sa.Column("prefill_j", sa.Float),
        sa.Column("decode_j", sa.Float),
        sa.Column("reference", sa.String(64), nullable=False),
        sa.Column("reference_prefill_s", sa.JSON, nullable=False),
        sa.Column("reference_decode_s", sa.JSON, nullable=False),
        sa.Column("measured_at", sa.DateTime(timezone=True), nullable=False),
    )


def downgrade() -> None:
    """Drop both."""
    for table in ("map_times", "cell_times"):
        op.drop_table(table)

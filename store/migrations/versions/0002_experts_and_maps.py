"""Shares of sensitivity tables know their experts and the maps that they were corrected by."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Null in older shares, which have neither."""
    for name in ("experts", "maps"):
        op.add_column("sensitivity_shares", sa.Column(name, sa.JSON))


def downgrade() -> None:
    """Drop both."""
    with op.batch_alter_table("sensitivity_shares") as batch:
        batch.drop_column("experts")
        batch.drop_column("maps")

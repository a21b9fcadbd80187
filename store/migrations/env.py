"""Alembic's environment: our tables only, in our own version table."""

from alembic import context

from store.tables import Base

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=Base.metadata,
    version_table=context.config.get_main_option("version_table"),
    include_name=lambda name, kind, _: kind != "table" or name in Base.metadata.tables,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()

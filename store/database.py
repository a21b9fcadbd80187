"""Opening a store: where it is, its migrations, and errors that say what to do.

Opening an up-to-date store costs one SELECT; Alembic is imported only when there is something
to migrate, so that queries answer at once.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs
from sqlalchemy import Engine, String, column, create_engine, event, make_url, select, table
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.orm import Session, sessionmaker

from store.errors import StoreError

if TYPE_CHECKING:
    from alembic.config import Config

HEAD = "0003"
"""The newest revision in `migrations/versions`; a test compares it with Alembic's own answer."""
VERSION_TABLE = "bitfront_alembic_version"
LOCK_PATIENCE_S = 30.0


def default_url() -> str:
    """`$BITFRONT_STORE`, or an SQLite file in the user's data folder."""
    path = Path(platformdirs.user_data_dir("bitfront")) / "bitfront.sqlite"
    return os.environ.get("BITFRONT_STORE") or f"sqlite:///{path}"


class Store:
    """A database of jobs and measurements. Threads may share it; processes each open their own.

    Args:
        url: an SQLAlchemy URL.
        lock_patience_s: how long SQLite waits for another writer before it gives up.
    """

    def __init__(self, url: str, lock_patience_s: float = LOCK_PATIENCE_S) -> None:
        self.url = url
        with self._explained():
            self.engine = _engine(url, lock_patience_s)
        self._sessions = sessionmaker(self.engine, expire_on_commit=False)

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A transaction: committed at the end, rolled back on an error."""
        with self._explained(), self._sessions.begin() as session:
            yield session

    def version(self) -> str | None:
        """The store's schema revision; None for an empty database."""
        try:
            with self.engine.connect() as connection:
                found = connection.execute(
                    select(column("version_num", String)).select_from(table(VERSION_TABLE))
                )
                return found.scalar_one_or_none()
        except DBAPIError as error:
            if "no such table" in str(error.orig) or "does not exist" in str(error.orig):
                return None
            raise self._explain(error) from error

    def open(self) -> "Store":
        """Make sure that the schema is the newest one; creates an empty store's.

        Raises:
            StoreError: the store is read-only, locked, unreachable or newer than this program.
        """
        found = self.version()
        if found == HEAD:
            return self
        if found is not None and found > HEAD:
            raise StoreError(
                f"the store {self._shown()} has schema {found}, newer than this program's {HEAD}; "
                "upgrade bitfront"
            )
        self.upgrade()
        return self

    def upgrade(self) -> None:
        """Run all migrations that are missing."""
        from alembic import command

        with self._explained(), self.engine.begin() as connection:
            if connection.dialect.name == "sqlite":  # whose driver commits each DDL by itself
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            config = alembic_config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (DBAPIError, ArgumentError, NoSuchModuleError, ImportError, OSError) as error:
            raise self._explain(error) from error

    def _explain(self, error: Exception) -> StoreError:
        """One line for the ways in which a database refuses."""
        said = str(getattr(error, "orig", None) or error).splitlines()[0]
        advice = "check the URL given by --store or BITFRONT_STORE"
        if isinstance(error, ImportError):
            advice = "install the database's driver: pip install 'psycopg[binary]' for PostgreSQL"
        if "readonly" in said or "read-only" in said or isinstance(error, PermissionError):
            advice = "it is read-only: make it writable, or name another with --store"
        elif "locked" in said:
            advice = "another program holds it: wait for it or stop it, then run this again"
        elif "disk is full" in said or "disk I/O" in said or "No space" in said:
            advice = "the disk is full: free some space, then run this again; nothing is lost"
        elif "unable to open" in said:
            advice = "its folder is missing or may not be written; name another with --store"
        return StoreError(f"can't use the store {self._shown()} ({said}); {advice}")

    def _shown(self) -> str:
        """The URL without its password."""
        try:
            return make_url(self.url).render_as_string(hide_password=True)
        except ArgumentError:
            return f"'{self.url}'"


def alembic_config() -> "Config":
    """Where the migrations are; Optuna owns the table `alembic_version`, so ours has a name."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("version_table", VERSION_TABLE)
    return config


def _engine(url: str, lock_patience_s: float) -> Engine:
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return create_engine(parsed, pool_pre_ping=True)
    if parsed.database and not parsed.database.startswith((":memory:", "file:")):
        path = Path(parsed.database).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        parsed = parsed.set(database=str(path))
    engine = create_engine(parsed, connect_args={"timeout": lock_patience_s})

    @event.listens_for(engine, "connect")
    def _prepare(connection: Any, _: Any) -> None:
        cursor = connection.cursor()
        try:
            # readers never wait for the writer, and a commit survives a kill of the process
            cursor.execute("PRAGMA journal_mode=WAL")
        except Exception as error:
            if "readonly" not in str(error):  # reading a store that we can't write is fine
                raise
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    return engine

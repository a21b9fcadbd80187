"""Opening a store: where it is, its migrations, and errors that say what to do.

Opening an up-to-date store costs one SELECT; Alembic is imported only when there is something
to migrate, so that queries answer at once.
"""

import math
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import platformdirs
from sqlalchemy import (
    Connection,
    Engine,
    String,
    column,
    create_engine,
    event,
    make_url,
    select,
    table,
)
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    DisconnectionError,
    IntegrityError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
)
from sqlalchemy.orm import Session, sessionmaker

from store.errors import StoreAwayError, StoreError, StoreLockedError

if TYPE_CHECKING:
    from alembic.config import Config

HEAD = "0004"
"""The newest revision in `migrations/versions`; a test compares it with Alembic's own answer."""
VERSION_TABLE = "bitfront_alembic_version"
LOCK_PATIENCE_S = 30.0
BETWEEN_TRIES_S = (0.05, 5.0)
"""The first pause before a database that is away is tried again, and the longest."""
MOST_COLLISIONS = 3
BEGIN = "bitfront_begin"
"""The execution option that says how a transaction of SQLite begins."""
POOL = (20, 40)
"""Connections that are kept, and the most: a server has as many threads."""
IDLE_S = 1.0
RETURNED = "bitfront_returned"
MIGRATING = 0x62697466
"""The advisory lock of PostgreSQL that migrations hold."""

Given = ParamSpec("Given")
Found = TypeVar("Found")


def default_url() -> str:
    """`$BITFRONT_STORE`, or an SQLite file in the user's data folder."""
    path = Path(platformdirs.user_data_dir("bitfront")) / "bitfront.sqlite"
    return os.environ.get("BITFRONT_STORE") or f"sqlite:///{path}"


def absolute(url: str) -> str:
    """The same database for programs that work in other folders: SQLite's file by its whole path."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        return url  # opening it says what is wrong
    file = parsed.database or ""
    if parsed.get_backend_name() != "sqlite" or not file or file.startswith((":memory:", "file:")):
        return url
    path = Path(file).expanduser().resolve()
    return parsed.set(database=str(path)).render_as_string(hide_password=False)


class Store:
    """A database of jobs and measurements. Threads may share it; processes each open their own.

    Args:
        url: an SQLAlchemy URL.
        lock_patience_s: how long SQLite waits for another writer before it gives up.
        away_patience_s: how long queries try again when a database server is away (restarts,
            can't be reached); a driver outlasts that, a server answers at once.
    """

    def __init__(
        self,
        url: str,
        lock_patience_s: float = LOCK_PATIENCE_S,
        away_patience_s: float = 0.0,
    ) -> None:
        self.url = url
        self.lock_patience_s, self.away_patience_s = lock_patience_s, away_patience_s
        with self._explained():
            self.engine = _engine(url, lock_patience_s)
        writing = self.engine.execution_options(**{BEGIN: "BEGIN IMMEDIATE"})
        self._writers = sessionmaker(writing, expire_on_commit=False)
        readers = self.engine
        if self.engine.dialect.name != "sqlite":
            # each query sees what is committed then, in a transaction or not: spare the round trips
            readers = readers.execution_options(isolation_level="AUTOCOMMIT")
        self._readers = sessionmaker(readers, expire_on_commit=False)

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A transaction: committed at the end, rolled back on an error."""
        with self._explained(), self._writers.begin() as session:
            yield session

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A transaction that only reads: SQLite keeps no writer waiting for it."""
        with self._explained(), self._readers.begin() as session:
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
        self._migrate("upgrade", "head")

    def downgrade(self, revision: str) -> None:
        """Run migrations backwards to a revision, for an older program.

        What that has no place for is lost.

        Raises:
            StoreError: no such revision.
        """
        from alembic.script import ScriptDirectory

        known = [r.revision for r in ScriptDirectory.from_config(alembic_config()).walk_revisions()]
        if revision not in known:
            raise StoreError(f"no revision '{revision}'; there are {', '.join(sorted(known))}")
        self._migrate("downgrade", revision)

    def _migrate(self, direction: str, revision: str) -> None:
        from alembic import command

        with self._explained(), self.engine.connect() as connection:
            if connection.dialect.name == "sqlite":
                # a table that others refer to is made anew to change a column
                driver: Any = connection.connection.driver_connection
                driver.execute("PRAGMA foreign_keys=OFF")
                connection.execution_options(**{BEGIN: "BEGIN IMMEDIATE"})
            else:
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({MIGRATING})")
            config = alembic_config()
            config.attributes["connection"] = connection
            getattr(command, direction)(config, revision)
            connection.commit()
            connection.invalidate()  # with its pragma

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
            return StoreLockedError(
                f"can't use the store {self._shown()} ({said}); another program holds it: wait for it "
                "or stop it, then run this again"
            )
        elif "disk is full" in said or "disk I/O" in said or "No space" in said:
            advice = "the disk is full: free some space, then run this again; nothing is lost"
        elif "unable to open" in said:
            advice = "its folder is missing or may not be written; name another with --store"
        elif self._is_away(error):
            return StoreAwayError(
                f"the store {self._shown()} is away ({said}); it is asked again, or {advice}"
            )
        return StoreError(f"can't use the store {self._shown()} ({said}); {advice}")

    def _is_away(self, error: Exception) -> bool:
        """Whether a database server went away or isn't there: what a restart looks like."""
        return (
            isinstance(error, DBAPIError)
            and make_url(self.url).get_backend_name() != "sqlite"
            and (
                error.connection_invalidated or isinstance(error, OperationalError | InterfaceError)
            )
        )

    def _shown(self) -> str:
        """The URL without its password."""
        try:
            return make_url(self.url).render_as_string(hide_password=True)
        except ArgumentError:
            return f"'{self.url}'"


def lasting(
    query: Callable[Concatenate[Store, Given], Found],
) -> Callable[Concatenate[Store, Given], Found]:
    """A query that is asked again while the database is away, as long as its store has patience.

    What is asked must be one transaction that may be repeated: one whose commit was cut off may
    have happened; or one that does little harm when it is (a line told twice). So is one that came to the same new row at the same time as another.
    """

    @wraps(query)
    def asked(store: Store, /, *args: Given.args, **kwargs: Given.kwargs) -> Found:
        start, pause, collisions = time.monotonic(), BETWEEN_TRIES_S[0], 0
        while True:
            try:
                return query(store, *args, **kwargs)
            except StoreAwayError:
                if time.monotonic() + pause > start + store.away_patience_s:
                    raise
            except StoreLockedError:
                if time.monotonic() + pause > start + store.lock_patience_s:
                    raise
            except StoreError as error:
                collisions += 1
                if not isinstance(error.__cause__, IntegrityError) or collisions > MOST_COLLISIONS:
                    raise
            time.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311  # so that two don't meet again
            pause = min(2 * pause, BETWEEN_TRIES_S[1])

    return asked


def alembic_config() -> "Config":
    """Where the migrations are; Optuna owns the table `alembic_version`, so ours has a name."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("version_table", VERSION_TABLE)
    return config


def _ping_idle(engine: Engine) -> None:
    """Replace connections that broke in the pool, and ask only those that were idle for a while.

    SQLAlchemy's own `pool_pre_ping` asks before every query, which doubles what most of them take.
    """

    @event.listens_for(engine, "checkin")
    def _returned(_: Any, record: Any) -> None:
        record.info[RETURNED] = time.monotonic()

    @event.listens_for(engine, "checkout")
    def _taken(connection: Any, record: Any, _: Any) -> None:
        if time.monotonic() - record.info.get(RETURNED, -math.inf) < IDLE_S:
            return
        try:
            engine.dialect.do_ping(connection)
        except engine.dialect.loaded_dbapi.Error as error:
            raise DisconnectionError from error


def _engine(url: str, lock_patience_s: float) -> Engine:
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        engine = create_engine(
            parsed, pool_size=POOL[0], max_overflow=POOL[1] - POOL[0], pool_use_lifo=True
        )
        _ping_idle(engine)
        return engine
    if parsed.database and not parsed.database.startswith((":memory:", "file:")):
        path = Path(parsed.database).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        parsed = parsed.set(database=str(path))
    engine = create_engine(parsed, connect_args={"timeout": lock_patience_s})

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # a writer takes its turn before it reads: what it read would be old when it writes
        connection.exec_driver_sql(connection.get_execution_options().get(BEGIN, "BEGIN"))

    @event.listens_for(engine, "connect")
    def _prepare(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # or the driver begins when it likes
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

"""The store: migrations, refusals in one line, measurements that are never repeated."""

import sqlite3
import threading

import optuna
import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from store import database
from store.database import HEAD, VERSION_TABLE, Store, alembic_config
from store.errors import NotFoundError, StoreAwayError, StoreError
from store.queries import (
    QualityKey,
    find_job,
    list_jobs,
    measurements,
    open_job,
    save_measurement,
    save_model,
    update_job,
)
from store.tables import Base, Measurement, Model

MODEL = "f" * 64


def sqlite_url(tmp_path):
    return f"sqlite:///{tmp_path}/sub/store.sqlite"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    """The same contract holds for both."""
    return (
        sqlite_url(tmp_path)
        if request.param == "sqlite"
        else request.getfixturevalue("postgres_url")
    )


only_sqlite = pytest.mark.parametrize("url", ["sqlite"], indirect=True)


@pytest.fixture
def store(url):
    opened = Store(url).open()
    save_model(opened, Model(weights_hash=MODEL, name="m", layout={}))
    return opened


def measurement(**more):
    values = {"key": "k", "weights_hash": MODEL, "map_hash": "m", "chunk_hash": "c",
              "quantizer": "rtn", "dtype": "float32", "kl_sum": 1.0, "nll_sum": 2.0,
              "tokens": 3, "seconds": 0.1}  # fmt: skip
    return Measurement(**{**values, **more})


def test_head_is_what_alembic_says():
    assert ScriptDirectory.from_config(alembic_config()).get_current_head() == HEAD


def test_migrations_give_the_schema_of_the_tables(store):
    with store.engine.connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts={"version_table": VERSION_TABLE,
                  "include_name": lambda n, t, _: t != "table" or n in Base.metadata.tables},
        )  # fmt: skip
        assert compare_metadata(context, Base.metadata) == []


@only_sqlite
def test_another_alembic_may_live_in_the_same_database(url, tmp_path):
    """Optuna keeps a table `alembic_version`; ours must not read or touch it."""
    (tmp_path / "sub").mkdir()
    with sqlite3.connect(tmp_path / "sub/store.sqlite") as raw:
        raw.execute("CREATE TABLE alembic_version (version_num VARCHAR)")
        raw.execute("INSERT INTO alembic_version VALUES ('v3.2.0.a')")
    assert Store(url).open().version() == HEAD
    with sqlite3.connect(tmp_path / "sub/store.sqlite") as raw:
        assert raw.execute("SELECT version_num FROM alembic_version").fetchone() == ("v3.2.0.a",)


def test_opening_twice_changes_nothing(store, url):
    assert Store(url).open().version() == HEAD


@only_sqlite
def test_the_journal_is_write_ahead(store):
    with store.engine.connect() as connection:
        assert connection.execute(sqlalchemy.text("PRAGMA journal_mode")).scalar() == "wal"


def test_a_store_of_a_newer_program_is_refused(store, url):
    with store.engine.begin() as connection:
        connection.execute(sqlalchemy.text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'"))
    with pytest.raises(StoreError, match="newer than this program's .* upgrade bitfront"):
        Store(url).open()


def test_the_first_measurement_of_a_key_stays(store):
    save_measurement(store, measurement())
    save_measurement(store, measurement(kl_sum=9.0))
    assert measurements(store, ["k", "absent"])["k"].kl_sum == 1.0


def test_many_keys_are_looked_up_at_once(store):
    assert measurements(store, [str(i) for i in range(2500)]) == {}


def test_quality_keys_depend_on_every_part():
    keys = {
        QualityKey(*parts).of(*rest)
        for parts, rest in [
            (("w", "rtn", "bf16"), ("m", "c")),
            (("x", "rtn", "bf16"), ("m", "c")),
            (("w", "gptq", "bf16"), ("m", "c")),
            (("w", "rtn", "fp32"), ("m", "c")),
            (("w", "rtn", "bf16"), ("n", "c")),
            (("w", "rtn", "bf16"), ("m", "d")),
        ]
    }
    assert len(keys) == 6


def test_the_same_question_is_the_same_job(store):
    first = open_job(store, "key", MODEL, {"a": 1})
    assert open_job(store, "key", MODEL, {"a": 1}).id == first.id
    assert open_job(store, "other", MODEL, {"a": 2}).id != first.id


def test_a_failed_job_is_taken_up_again(store):
    job = open_job(store, "key", MODEL, {})
    update_job(store, job.id, facts={"x": 1}, state="failed", error="disk")
    again = open_job(store, "key", MODEL, {})
    assert (again.state, again.error, again.facts) == ("running", None, {"x": 1})


def test_the_latest_job_is_the_default(store):
    with pytest.raises(NotFoundError, match="no jobs in the store"):
        find_job(store, None)
    first, second = (open_job(store, key, MODEL, {}) for key in ("a", "b"))
    assert find_job(store, None).id == second.id
    update_job(store, first.id, facts={"touched": True})
    assert find_job(store, None).id == first.id
    assert [job.id for job, _ in list_jobs(store)] == [first.id, second.id]
    with pytest.raises(NotFoundError, match=r"no job 99 .* there are 2, 1"):
        find_job(store, 99)


@only_sqlite
def test_a_read_only_store_says_so_and_still_answers(store, url, tmp_path):
    open_job(store, "key", MODEL, {})
    store.engine.dispose()
    path = f"file:{tmp_path}/sub/store.sqlite?mode=ro&uri=true"
    reader = Store(f"sqlite:///{path}").open()
    assert find_job(reader, None).key == "key"
    with pytest.raises(StoreError, match="it is read-only: make it writable"):
        open_job(reader, "new", MODEL, {})


@only_sqlite
def test_a_locked_store_says_so(store, url, tmp_path):
    impatient = Store(url, lock_patience_s=0.1).open()
    blocker = sqlite3.connect(tmp_path / "sub/store.sqlite", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="another program holds it"):
        save_measurement(impatient, measurement())
    blocker.rollback()
    save_measurement(impatient, measurement())
    assert "k" in measurements(impatient, ["k"])


@pytest.mark.parametrize(
    ("bad", "advice"),
    [
        ("nonsense", "check the URL"),
        ("oracle9://x", "check the URL"),
        ("sqlite:////proc/none/store.sqlite", "can't use the store"),
    ],
)
def test_a_bad_url_is_one_line(bad, advice):
    with pytest.raises(StoreError, match=advice) as caught:
        Store(bad).open()
    assert "\n" not in str(caught.value)


def test_passwords_are_not_shown():
    with pytest.raises(StoreError) as caught:
        Store("oracle9://me:secret@host/db").open()
    assert "secret" not in str(caught.value)


@only_sqlite
def test_writers_at_the_same_time_wait_for_each_other(store, url):
    """Each reads before it writes, which SQLite refuses at once when another wrote between."""
    job = open_job(store, "key", MODEL, {})

    def write(number):
        own = Store(url).open()
        for step in range(15):
            update_job(own, job.id, facts={f"{number}-{step}": True})

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(find_job(store, job.id).facts) == 6 * 15


def test_migrations_run_down_and_up_again(store):
    """Down to every older revision and back: what both schemas have a place for is kept."""
    job = open_job(store, "key", MODEL, {"a": 1})
    save_measurement(store, measurement())
    for revision in ("0003", "0002", "0001"):
        store.downgrade(revision)
        assert store.version() == revision
        store.upgrade()
        assert store.version() == HEAD
        assert find_job(store, job.id).config == {"a": 1}
        assert measurements(store, ["k"])["k"].kl_sum == 1.0
    with pytest.raises(StoreError, match="no revision 'x'; there are 0001, 0002"):
        store.downgrade("x")


def test_studies_of_optuna_live_in_the_same_database(store, url):
    study = optuna.create_study(storage=url, study_name="job 1", directions=["minimize"] * 2)
    study.optimize(lambda trial: (trial.suggest_float("x", 0, 1), 1.0), n_trials=2)
    store.downgrade("0003")
    store.upgrade()
    assert len(optuna.load_study(study_name="job 1", storage=url).trials) == 2


def test_connections_that_broke_while_they_were_idle_are_replaced(postgres_url, monkeypatch):
    opened = Store(postgres_url).open()
    assert list_jobs(opened) == []
    _break_all(postgres_url)
    monkeypatch.setattr(database, "IDLE_S", 0.0)
    assert list_jobs(opened) == []


def test_one_that_broke_in_use_is_told_of_once(postgres_url):
    opened = Store(postgres_url).open()
    assert list_jobs(opened) == []
    _break_all(postgres_url)
    with pytest.raises(StoreAwayError, match="is away"):
        list_jobs(opened)
    assert list_jobs(opened) == []


def _break_all(url):
    """As a restart of the server does."""
    other = sqlalchemy.create_engine(url)
    with other.connect() as connection:
        connection.execute(sqlalchemy.text(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        ))  # fmt: skip
    other.dispose()

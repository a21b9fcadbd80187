"""The database's tables.

A measurement is one candidate on one text chunk; means, intervals, perplexities and fronts are
derived from such rows and never stored, so they can't disagree with them. Measurements belong to
the model and the map, not to a job: a second job that asks for the same ones finds them here.
"""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, DateTime, Float, ForeignKey, Integer, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from store.errors import NotFoundError


def now() -> datetime:
    """The present, with its time zone."""
    return datetime.now(UTC)


class Base(DeclarativeBase):
    """Declarative base of all tables."""


class Model(Base):
    """A model by its weights, with its layout, so that no query loads it."""

    __tablename__ = "models"

    weights_hash: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(Text)
    revision: Mapped[str | None] = mapped_column(String(64))
    layout: Mapped[dict[str, Any]] = mapped_column(JSON)


class Job(Base):
    """A search job. `key` identifies what it computes: the same question resumes the same job.

    `state` is `queued`, `running`, `done`, `failed` or `cancelled`; a job whose driver was killed
    stays `running` and goes on when the question is asked again, or when a server finds it.
    `facts` collects what the run found out: menu and cost table, chunk hashes by role, arithmetic
    type, noise floor, calibrations; none before a driver has planned the job.

    Args:
        weights_hash: of the model; null until the job is planned.
        launch: what a server starts its driver with (workers, resources); null for jobs that are
            run from a shell, which no server touches.
        attempts: drivers that a server has started since the last one that got anywhere.
        submitted_by: name of the token.
        once: tells a submission that is repeated from a second one.
        progress: the stage that it is in and how far, as the latest driver said.
    """

    __tablename__ = "jobs"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    key: Mapped[str] = mapped_column(String(64), unique=True)
    weights_hash: Mapped[str | None] = mapped_column(ForeignKey("models.weights_hash"))
    state: Mapped[str] = mapped_column(String(16), index=True)
    error: Mapped[str | None] = mapped_column(Text)
    config: Mapped[dict[str, Any]] = mapped_column(JSON)
    facts: Mapped[dict[str, Any]] = mapped_column(JSON)
    launch: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    submitted_by: Mapped[str | None] = mapped_column(Text)
    once: Mapped[str | None] = mapped_column(String(64), index=True, unique=True)
    progress: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), default=now)
    updated_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), default=now, onupdate=now)

    @property
    def model_hash(self) -> str:
        """The hash of the model's weights; raises `NotFoundError` before the job is planned."""
        if self.weights_hash is None:
            raise NotFoundError(
                f"job {self.id} is {self.state} and has not read its model yet; wait for its driver"
            )
        return self.weights_hash


class Candidate(Base):
    """A map that a job proposed. `point` numbers a job's candidates from 1.

    Args:
        origin: what proposed it: `uniform int4-g32`, `random`, `fisher <= 4.25 bits`.
        control: null, `uniform` or `random`.
        schemes: scheme names, one a unit of the model's layout.
        predicted_kl: nats per token; null until the job's calibration is fitted.
        certificate: bound and gap of the solver that proposed it, null for controls.
        finalist: whether it is measured on the held-out text.
        failure: why it could not be measured, if it could not.
    """

    __tablename__ = "candidates"

    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    point: Mapped[int] = mapped_column(Integer, primary_key=True)
    map_hash: Mapped[str] = mapped_column(String(64), index=True)
    origin: Mapped[str] = mapped_column(Text)
    control: Mapped[str | None] = mapped_column(String(16))
    schemes: Mapped[list[str]] = mapped_column(JSON)
    weight_bytes: Mapped[int] = mapped_column(BigInteger)
    average_bits: Mapped[float] = mapped_column(Float)
    predicted_kl: Mapped[float | None] = mapped_column(Float)
    certificate: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    finalist: Mapped[bool] = mapped_column(default=False)
    failure: Mapped[str | None] = mapped_column(Text)


class Measurement(Base):
    """One map of one model on one text chunk: sums in nats over `tokens` predictions."""

    __tablename__ = "measurements"

    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    weights_hash: Mapped[str] = mapped_column(String(64), index=True)
    map_hash: Mapped[str] = mapped_column(String(64), index=True)
    chunk_hash: Mapped[str] = mapped_column(String(64))
    quantizer: Mapped[str] = mapped_column(Text)
    dtype: Mapped[str] = mapped_column(String(16))
    kl_sum: Mapped[float] = mapped_column(Float)
    nll_sum: Mapped[float] = mapped_column(Float)
    tokens: Mapped[int] = mapped_column(Integer)
    seconds: Mapped[float] = mapped_column(Float)
    measured_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), default=now)


class SensitivityShare(Base):
    """One task's part of a raw sensitivity table; `provenance` says what it was made from.

    `experts` holds, by unit, sums and token counts of single experts, which `sums` leaves out;
    `maps` whole maps that the estimator has measured, by which the table is corrected.
    """

    __tablename__ = "sensitivity_shares"

    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    estimator: Mapped[str] = mapped_column(String(64))
    provenance: Mapped[dict[str, Any]] = mapped_column(JSON)
    sums: Mapped[list[list[float | None]]] = mapped_column(JSON)
    tokens: Mapped[list[float]] = mapped_column(JSON)
    experts: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    maps: Mapped[list[dict[str, Any]] | None] = mapped_column(JSON)
    seconds: Mapped[float] = mapped_column(Float)


class CellTime(Base):
    """A product's time with one kernel on one device; `failure` where it can't be run there.

    `kernels` is the version of the engine's kernels; `spread_s` half an interquartile range.
    """

    __tablename__ = "cell_times"

    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    device: Mapped[str] = mapped_column(Text)
    engine: Mapped[str] = mapped_column(String(32))
    kernels: Mapped[str] = mapped_column(Text)
    threads: Mapped[int] = mapped_column(Integer)
    rows: Mapped[int] = mapped_column(Integer)
    columns: Mapped[int] = mapped_column(Integer)
    kernel: Mapped[str] = mapped_column(String(64))
    batch: Mapped[int] = mapped_column(Integer)
    median_s: Mapped[float | None] = mapped_column(Float)
    spread_s: Mapped[float | None] = mapped_column(Float)
    failure: Mapped[str | None] = mapped_column(Text)
    measured_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), default=now)


class MapTime(Base):
    """A whole map that an engine has run on a device: seconds of each prompt and generated token.

    `map` identifies the model's shapes and the kernel of each parameter, not the weights: times
    don't depend on those. Joules, of one prompt and one token, are null where nothing counts them.
    `reference` is the map that was timed in turns with it.
    """

    __tablename__ = "map_times"

    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    device: Mapped[str] = mapped_column(Text)
    engine: Mapped[str] = mapped_column(String(32))
    kernels: Mapped[str] = mapped_column(Text)
    threads: Mapped[int] = mapped_column(Integer)
    map: Mapped[str] = mapped_column(String(64), index=True)
    workload: Mapped[dict[str, Any]] = mapped_column(JSON)
    prefill_s: Mapped[list[float]] = mapped_column(JSON)
    decode_s: Mapped[list[float]] = mapped_column(JSON)
    prefill_j: Mapped[float | None] = mapped_column(Float)
    decode_j: Mapped[float | None] = mapped_column(Float)
    reference: Mapped[str] = mapped_column(String(64))
    reference_prefill_s: Mapped[list[float]] = mapped_column(JSON)
    reference_decode_s: Mapped[list[float]] = mapped_column(JSON)
    measured_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), default=now)


class Claim(Base):
    """Who is at a task, until when: seconds of the database's clock since 1970.

    Keys are those of measurements, shares and times, `job:3` for the driver of a job, and
    `launch:3` for the server that is about to start one.
    """

    __tablename__ = "claims"

    key: Mapped[str] = mapped_column(String(100), primary_key=True)
    owner: Mapped[str] = mapped_column(Text, index=True)
    expires_at: Mapped[float] = mapped_column(Float)


class Event(Base):
    """What happened in a job, for those who watch it and for its log.

    `kind` is `state`, `stage`, `log` or `point`.
    """

    __tablename__ = "events"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id"), index=True)
    kind: Mapped[str] = mapped_column(String(16))
    data: Mapped[dict[str, Any]] = mapped_column(JSON)
    at: Mapped[datetime] = mapped_column(DateTime(timezone=True), default=now)


class SolverTables(Base):
    """What a job's problem was solved with, so that another budget needs no model.

    `tables` holds the loss table of the estimator that predicts best, and seconds where known.
    """

    __tablename__ = "solver_tables"

    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    tables: Mapped[dict[str, Any]] = mapped_column(JSON)


class ExportOrder(Base):
    """An export that somebody ordered of a server: the folder is below the server's own."""

    __tablename__ = "exports"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id"), index=True)
    point: Mapped[int] = mapped_column(Integer)
    targets: Mapped[list[str]] = mapped_column(JSON)
    state: Mapped[str] = mapped_column(String(16), index=True)
    error: Mapped[str | None] = mapped_column(Text)
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    files: Mapped[list[dict[str, Any]]] = mapped_column(JSON, default=list)
    result: Mapped[list[dict[str, Any]]] = mapped_column(JSON, default=list)
    submitted_by: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), default=now)


class Token(Base):
    """A bearer token's SHA-256; the token itself is shown once and kept nowhere."""

    __tablename__ = "tokens"

    name: Mapped[str] = mapped_column(String(80), primary_key=True)
    hash: Mapped[str] = mapped_column(String(64), unique=True)
    role: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), default=now)
    revoked_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))

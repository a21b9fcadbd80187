"""Measuring in a job: workers shared with other drivers, what the store lacks, and nothing twice."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from bitfront.run import Run
from evaluation.texts import Text
from quantization.errors import MeasurementError
from store.claims import new_owner
from store.database import Store
from store.events import log
from store.queries import measurements, save_measurement, update_job
from store.tables import Candidate, Measurement
from workers.pool import Pool, Task
from workers.session import SessionSpec
from workers.sharing import SharingPool, renewed

OpenPool = Callable[[SessionSpec], Pool]

REFERENCE = "the unquantized model"


@contextmanager
def sharing(
    open_pool: OpenPool, spec: SessionSpec, store: Store, job_id: int
) -> Iterator[SharingPool]:
    """Workers whose tasks no other driver does at the same time, for as long as they are needed."""
    owner = new_owner()

    def late(keys: set[str]) -> None:
        log(store, job_id, f"{len(keys)} results came after others had taken their tasks over")

    with (
        renewed(store, owner),
        SharingPool(open_pool(spec), store, owner, late) as pool,
    ):
        yield pool


def values(run: Run, tasks: Iterable[Task]) -> Iterator[tuple[Task, Any]]:
    """Run tasks whose errors end the job; None is the value of what another driver has done."""
    for outcome in run.pool.run(tasks):
        if outcome.error:
            raise outcome.error
        yield outcome.task, outcome.value


def measure(
    run: Run,
    candidates: Sequence[Candidate],
    text: Text,
    label: str,
    failed: Callable[[Candidate], None] = lambda _: None,
) -> None:
    """Measure candidates on all chunks of a text, but for what the store has.

    One that can't be measured gets its `failure`, and `failed` is told.
    """
    tasks: dict[str, Task] = {}  # by key: a text may have the same chunk twice
    known = measurements(
        run.store,
        [run.quality.of(c.map_hash, chunk) for c in candidates for chunk in text.hashes],
    )
    # chunk by chunk: what a kill leaves behind can then be compared on the same chunks
    for index, chunk in enumerate(text.hashes):
        for candidate in candidates:
            key = run.quality.of(candidate.map_hash, chunk)
            if key not in known and candidate.failure is None:
                arguments = {"schemes": tuple(candidate.schemes), "ids": text.ids[index]}
                label_of = candidate, chunk
                tasks[key] = Task("measure", arguments, label_of, key=key, table=Measurement)
    with run.progress.stage(label, len(tasks)) as advance:
        for outcome in run.pool.run(tasks.values()):
            candidate, chunk = outcome.task.label
            if isinstance(outcome.error, MeasurementError):
                candidate.failure = str(outcome.error)
                failed(candidate)
            elif outcome.error:
                raise outcome.error
            elif not outcome.known:
                _save(run, candidate.map_hash, chunk, outcome.value)
            advance(1)


def measure_reference(run: Run) -> None:
    """The unquantized model's own likelihood on held-out text, and the arithmetic's noise."""
    text = run.plan.texts["heldout"]
    keys = {chunk: run.quality.of(run.reference_hash, chunk) for chunk in text.hashes}
    known = measurements(run.store, list(keys.values()))
    tasks = [
        Task(
            "measure", {"schemes": None, "ids": text.ids[i]}, chunk,
            key=keys[chunk], table=Measurement,
        )
        for i, chunk in enumerate(text.hashes)
        if keys[chunk] not in known
    ]  # fmt: skip
    if "noise_floor" not in run.job.facts:
        tasks.append(Task("noise_floor", {"ids": run.plan.texts["search"].ids[0]}))
    with run.progress.stage(REFERENCE, len(tasks)) as advance:
        for task, value in values(run, tasks):
            if task.method == "noise_floor":
                run.job = update_job(run.store, run.job.id, facts={"noise_floor": value})
            elif value is not None:  # nobody else has measured it meanwhile
                _save(run, run.reference_hash, task.label, value)
            advance(1)


def _save(run: Run, map_hash: str, chunk: str, value: object) -> None:
    save_measurement(
        run.store,
        Measurement(
            key=run.quality.of(map_hash, chunk),
            map_hash=map_hash,
            chunk_hash=chunk,
            **vars(run.quality),
            **vars(value),
        ),
    )

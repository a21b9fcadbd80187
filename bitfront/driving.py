"""Drivers: what a server starts, on its machine or as a Ray job, to run what was submitted.

A driver holds the claim on its job. It ends when the job does, when somebody cancels it, or when it
finds that another has taken it over; whatever kills it, the server starts another one, which goes on
from the store.
"""

import os
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bitfront.config import JobConfig
from bitfront.fronts import load_front
from bitfront.pipeline import HELDOUT, run_search
from bitfront.progress import Advance
from bitfront.timing import FINALISTS
from quantization.errors import BitfrontError
from search.errors import SearchError
from store.claims import EXPORT, JOB, claim, held, let_go, new_owner
from store.database import Store
from store.errors import StoreError
from store.events import add_event, log, save_progress
from store.queries import end_job, find_job
from store.submissions import (
    CANCELLED,
    DONE,
    FAILED,
    QUEUED,
    RUNNING,
    count_points,
    find_export,
    look_at_job,
    start_job,
    update_export,
)
from workers.sharing import renewed

WATCH_S = 2.0
"""How often a driver looks whether it is still wanted."""
BETWEEN_REPORTS_S = 1.0
FRONT_CHANGES = (HELDOUT, FINALISTS)
"""Stages after which a front is another one."""


class _StoppedError(BaseException):
    """Somebody has cancelled the job, taken it over, or asks this process to end."""


def drive_job(store: Store, number: int, address: str, cache: str | None) -> None:
    """Run a submitted job to its end, as its only driver.

    Args:
        store: patient with a database that is away.
        number: of the job.
        address: of the Ray cluster, or `local`, or `none`.
        cache: `$BITFRONT_CACHE`.
    """
    key = f"{JOB}{number}"

    def wanted() -> bool:  # one that is done has its log to finish
        return look_at_job(store, number)[0].state not in {CANCELLED, QUEUED}

    with _alone(store, key, wanted) as mine:
        job = start_job(store, number) if mine else None
        if job is None:
            return
        add_event(store, number, "state", state=RUNNING, error=None)
        log(store, number, f"driver {os.getpid()} on {os.uname().nodename} begins")
        try:
            _search(store, number, address, cache)
        except (BitfrontError, SearchError) as error:
            end_job(store, number, FAILED, str(error))
            log(store, number, str(error), "error")
        except StoreError:
            raise  # the database: nothing to tell it, and the server starts another driver
        except Exception as error:  # a bug: say so where the user looks, keep the trace in the log
            log(store, number, traceback.format_exc(), "error")
            said = (str(error).splitlines() or [""])[0]
            end_job(store, number, FAILED, f"{type(error).__name__}: {said}; its log says where")
        ended = find_job(store, number)
        log(store, number, f"ended: {ended.state}")
        add_event(store, number, "state", state=ended.state, error=ended.error)


def _search(store: Store, number: int, address: str, cache: str | None) -> None:
    from bitfront.plan import make_plan
    from bitfront.scoring import worker_bytes
    from workers.ray_pool import Needs

    job = find_job(store, number)
    launch = job.launch or {}
    needs = Needs(**{k: v for k, v in launch.items() if k in Needs.__dataclass_fields__})
    if address == "local" and needs.workers:  # a machine is no larger than it is
        needs = replace(needs, workers=min(needs.workers, os.cpu_count() or 1))
    log(store, number, "reading the model and the texts")
    plan = make_plan(JobConfig.model_validate(job.config))
    log(store, number, f"{plan.name}: {int(plan.open_units.sum())} units to decide, {plan.dtype}")
    needs = replace(needs, forecast_bytes=worker_bytes(plan))
    share, notice = partial(_share, store), partial(log, store, number)
    run_search(
        plan,
        store,
        partial(_open, address=address, needs=needs, share=share, notice=notice),
        StoreProgress(store, number),
        cache,
        submitted=number,
    )
    for finding in load_front(store, find_job(store, number)).findings:
        log(store, number, finding)


def _open(
    spec: Any, address: str, needs: Any, share: Callable[[], float], notice: Callable[[str], None]
) -> Any:
    from workers.pool import InProcessPool
    from workers.ray_pool import RayPool

    if address == "none":
        return InProcessPool(replace(spec, threads=os.cpu_count() or 1))
    return RayPool(spec, address, needs, share, notice=notice)


def _share(store: Store) -> float:
    """A job's part of the workers: all jobs that run have the same."""
    return 1 / max(len(held(store, JOB)), 1)


def drive_export(store: Store, number: int, root: Path) -> None:
    """Make an export that was ordered, in its folder below the root.

    Args:
        store: patient with a database that is away.
        number: of the export.
        root: folder of all exports.
    """
    from bitfront.exporting import export_point

    with _alone(store, f"{EXPORT}{number}", lambda: True) as mine:
        order = find_export(store, number)
        if not mine or order.state in {DONE, FAILED}:
            return
        update_export(store, number, state=RUNNING)
        folder = root / str(number)
        shutil.rmtree(folder, ignore_errors=True)  # what a driver that was killed left behind
        for left in root.glob(f".{number}-*"):
            shutil.rmtree(left, ignore_errors=True)
        try:
            front = load_front(store, find_job(store, order.job_id))
            written = export_point(store, front, order.point, order.targets, folder, force=True)
        except (BitfrontError, SearchError) as error:
            update_export(store, number, state=FAILED, error=str(error))
            return
        except StoreError:
            raise
        except Exception as error:  # a bug: the process's log has the trace
            said = (str(error).splitlines() or [""])[0]
            update_export(store, number, state=FAILED, error=f"{type(error).__name__}: {said}")
            raise
        files = [
            {"name": file.relative_to(folder).as_posix(), "bytes": file.stat().st_size}
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        ]
        for entry in written:
            entry.pop("folder")
        update_export(store, number, state=DONE, files=files, result=written)


@contextmanager
def _alone(store: Store, key: str, wanted: Callable[[], bool]) -> Iterator[bool]:
    """While this process holds a driver's claim, if it gets it; what isn't wanted any more stops."""
    owner = new_owner()
    if not claim(store, owner, [key]):
        yield False
        return

    def check() -> None:
        # a claim that ran out while the database was away, and that nobody took, is taken again
        if key not in claim(store, owner, [key]) or not wanted():
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, _stop)
    try:
        with renewed(store, owner, check, WATCH_S):
            yield True
    except _StoppedError:
        pass
    except SystemError as error:  # ray's C code wraps what the handler raises in the middle of it
        if not isinstance(error.__cause__, _StoppedError):
            raise
    finally:
        signal.signal(signal.SIGTERM, before)
        with suppress(StoreError):
            let_go(store, owner)


def _stop(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: the way out must not be cut off
    raise _StoppedError


class StoreProgress:
    """Tells the store how far a job is, at most once a second, and of each stage that passes."""

    def __init__(self, store: Store, job_id: int) -> None:
        self._store, self._job_id = store, job_id
        self._expected: dict[str, float] = {}
        self._done, self._start, self._told_at = 0.0, time.monotonic(), 0.0

    def expect(self, work: Mapping[str, float]) -> None:
        """See `Progress.expect`."""
        self._expected |= work

    @contextmanager
    def stage(self, label: str, steps: int, weight: float = 1) -> Iterator[Advance]:
        """See `Progress.stage`."""
        self._expected[label] = steps * weight
        begun, done = time.monotonic(), 0
        self._tell(label, 0, steps)
        if steps:
            add_event(self._store, self._job_id, "stage", label=label, steps=steps, seconds=None)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self._done += count * weight
            if time.monotonic() - self._told_at >= BETWEEN_REPORTS_S:
                self._tell(label, done, steps)

        yield advance
        self._tell(label, done, steps)
        if steps and label in FRONT_CHANGES:
            points = count_points(self._store, [self._job_id]).get(self._job_id, 0)
            add_event(self._store, self._job_id, "point", points=points)
        if steps:
            took = time.monotonic() - begun
            add_event(self._store, self._job_id, "stage", label=label, steps=steps, seconds=took)

    def _tell(self, label: str, done: int, steps: int) -> None:
        self._told_at = time.monotonic()
        share = min(self._done / max(sum(self._expected.values()), 1), 1.0)
        elapsed = self._told_at - self._start
        progress = {
            "stage": label, "done": done, "steps": steps, "share": share, "elapsed_s": elapsed,
            "left_s": elapsed * (1 - share) / share if 0.02 < share < 1 else None,
        }  # fmt: skip
        save_progress(self._store, self._job_id, progress)

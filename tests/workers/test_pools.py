"""Pools: one interface, the same results, and a worker's death costs one task's time."""

import os
import signal
from dataclasses import replace

import numpy as np
import pytest

from quantization.errors import BitfrontError, MeasurementError, WorkerError
from quantization.schemes import Scheme
from sensitivity import ESTIMATORS, merge
from tests.conftest import choices_of
from workers.pool import InProcessPool, Task
from workers.ray_pool import Needs, RayPool
from workers.session import Session, SessionSpec

IDS = np.random.default_rng(0).integers(2, 300, (6, 32))
MENU = [Scheme("int3-g32"), Scheme("int4-g64-asym"), Scheme("nf4-g64"), Scheme("bf16")]


@pytest.fixture(scope="module")
def spec(make_bank):
    bank = make_bank("llama")
    return SessionSpec(
        checkpoint=bank.checkpoint,
        layout=bank.layout,
        quantizer="rtn",
        choices=tuple(tuple(s.name for s in row) for row in choices_of(bank.layout, MENU)),
        dtype="float32",
        threads=1,
        cache=os.environ["BITFRONT_CACHE"],
        calibration=IDS,
        statistics="test",
    )


@pytest.fixture(scope="module")
def ray_pool(spec):
    with RayPool(spec, needs=Needs(2)) as pool:
        yield pool


@pytest.fixture(params=["in-process", "ray"])
def pool(request, spec):
    if request.param == "ray":
        return request.getfixturevalue("ray_pool")
    return InProcessPool(spec)


def measurements(spec):
    schemes = tuple(row[0] for row in spec.choices)
    return [Task("measure", {"schemes": schemes, "ids": ids}, label=i) for i, ids in enumerate(IDS)]


def test_every_task_has_one_outcome(pool, spec):
    outcomes = list(pool.run(measurements(spec)))
    assert sorted(outcome.task.label for outcome in outcomes) == list(range(len(IDS)))
    assert all(outcome.error is None for outcome in outcomes)


def test_pools_agree(ray_pool, spec):
    def results(pool):
        return {
            o.task.label: (o.value.kl_sum, o.value.nll_sum) for o in pool.run(measurements(spec))
        }

    here, there = results(InProcessPool(spec)), results(ray_pool)
    assert {k: pytest.approx(v, rel=1e-6) for k, v in here.items()} == there


def estimates(spec, name):
    estimator = ESTIMATORS[name]
    return [
        Task("estimate", {"estimator": name, "chunks": IDS, "share": share}, label=i)
        for i, share in enumerate(estimator.shares(len(spec.choices), len(IDS)))
    ]


@pytest.mark.parametrize("name", ["fisher", "kl-fisher", "flips", "measured-maps"])
def test_tables_dont_depend_on_the_workers(ray_pool, spec, name):
    """The same tasks on one worker, and on two that are killed between: equal to 1e-6."""

    def table(pool, kill=False):
        tasks = estimates(spec, name)
        for task in tasks:
            pool.submit(task)
        if kill:
            os.kill(pool.processes()[0], signal.SIGKILL)
        found = {o.task.label: o.value[0] for o in (pool.next() for _ in tasks)}
        return merge(found[i] for i in range(len(tasks))).mean()

    one = table(InProcessPool(spec))
    assert table(ray_pool) == pytest.approx(one, rel=1e-6, nan_ok=True)
    assert table(ray_pool, kill=True) == pytest.approx(one, rel=1e-6, nan_ok=True)


def test_tasks_wait_for_the_memory_that_they_forecast(ray_pool, spec, monkeypatch):
    """Two that don't fit together run one after the other; one that fits nowhere runs alone."""
    monkeypatch.setattr(ray_pool, "_memory_bytes", 100)
    tasks = [replace(task, memory_bytes=60) for task in measurements(spec)]
    tasks[0] = replace(tasks[0], memory_bytes=1000)
    for task in tasks:
        ray_pool.submit(task)
    most = 0
    for _ in tasks:
        most = max(most, len(ray_pool._running))
        assert ray_pool.next().error is None
    assert most == 1


def test_an_error_of_the_work_is_an_outcome(pool, monkeypatch):
    """Out-of-vocabulary ids would be a bug; an unknown estimator is what a user may cause."""
    task = Task("estimate", {"estimator": "fischer", "chunks": IDS, "share": None})
    [outcome] = pool.run([task])
    assert isinstance(outcome.error, BitfrontError)
    assert "nearest: fisher" in str(outcome.error)


@pytest.mark.parametrize("victims_of", [1, 2], ids=["one of two", "both"])
def test_killed_workers_lose_no_task(ray_pool, spec, victims_of):
    """kill -9 in mid-measurement: Ray restarts the actor, the task runs again."""
    victims = ray_pool.processes()
    tasks = measurements(spec)
    for task in tasks:
        ray_pool.submit(task)
    for victim in victims[:victims_of]:
        os.kill(victim, signal.SIGKILL)
    outcomes = [ray_pool.next() for _ in tasks]
    assert sorted(outcome.task.label for outcome in outcomes) == list(range(len(IDS)))
    assert not set(victims[:victims_of]) & set(ray_pool.processes())


class Deadly:
    """Ends the process that unpickles it, as running out of memory would."""

    def __reduce__(self):
        return os._exit, (1,)


def test_a_task_that_kills_every_worker_is_given_up(ray_pool):
    """Three deaths are no accident: stop, say so, and suggest what usually helps."""
    ray_pool.submit(Task("measure", {"schemes": Deadly(), "ids": IDS[0]}))
    with pytest.raises(WorkerError, match="died 3 times in 'measure'.*try fewer workers"):
        ray_pool.next()


def test_nothing_queued_is_an_error(ray_pool):
    with pytest.raises(LookupError):
        ray_pool.next()


def test_nan_comes_back_as_an_error(spec, monkeypatch):
    session = Session(spec)
    schemes = tuple(row[0] for row in spec.choices)
    session.measure(schemes, IDS[0])
    nan = session.evaluator.reference(IDS[0]) * float("nan")
    monkeypatch.setattr(session.evaluator, "hidden", lambda *_: nan)
    with pytest.raises(MeasurementError, match="NaN or infinity in the logits"):
        session.measure(schemes, IDS[0])


def test_an_unreachable_cluster_is_one_line(spec):
    with pytest.raises(WorkerError, match="can't connect to Ray at '127.0.0.1:1'"):
        RayPool(spec, address="127.0.0.1:1")


def test_tasks_that_are_left_early_never_answer_for_others(pool, spec):
    """Whoever goes on after an error gets the outcomes of what it asked for."""
    with pytest.raises(RuntimeError, match="enough"):
        for _ in pool.run(measurements(spec)):
            raise RuntimeError("enough")
    outcomes = list(pool.run([Task("noise_floor", {"ids": IDS[0]}, label="mine")]))
    assert [outcome.task.label for outcome in outcomes] == ["mine"]
    with pytest.raises((LookupError, IndexError)):
        pool.next()

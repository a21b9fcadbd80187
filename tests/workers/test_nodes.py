"""Workers on several nodes: each node has a bank of its own, and what they measure is the same."""

import os

import numpy as np
import pytest
from ray.cluster_utils import Cluster

from tests.conftest import choices_of
from workers.pool import InProcessPool, Task
from workers.ray_pool import Needs, RayPool
from workers.session import SessionSpec

IDS = np.random.default_rng(0).integers(2, 300, (12, 32))


@pytest.fixture
def nodes(tmp_path):
    """Two nodes of a core each, with a cache folder each."""
    cluster = Cluster()
    caches = [tmp_path / name for name in ("one", "two")]
    for cache in caches:
        cluster.add_node(
            num_cpus=1, include_dashboard=False, env_vars={"BITFRONT_CACHE": str(cache)}
        )
    yield cluster, caches
    cluster.shutdown()


class Counter:
    """Work that needs no model."""

    def __init__(self, spec):
        self.spec = spec

    def double(self, number):
        return 2 * number


@pytest.fixture
def uneven():
    """A cluster whose head has memory and no cores, of a node with 4 cores and one with 2."""
    cluster = Cluster()
    for cores, memory in ((0, 64), (4, 2), (2, 4)):
        cluster.add_node(num_cpus=cores, memory=memory * 2**30, include_dashboard=False)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


def test_no_more_workers_than_there_is_memory_for(uneven):
    """One in 2 GiB and two in 4; of a forecast that no node has, half of the largest one is reserved."""
    for forecast_gib in (1.5, 64):
        needs = Needs(forecast_bytes=int(forecast_gib * 2**30))
        with RayPool(None, address=uneven.address, needs=needs, make=Counter) as pool:
            assert pool.workers == len(pool.processes()) == 3
            found = [o.value for o in pool.run(Task("double", {"number": n}) for n in range(5))]
        assert sorted(found) == [0, 2, 4, 6, 8]


@pytest.fixture
def node():
    """A cluster of one node with four cores and 1 GiB that workers may reserve."""
    cluster = Cluster()
    cluster.add_node(num_cpus=4, memory=2**30, include_dashboard=False)
    yield cluster
    cluster.shutdown()


def test_a_pool_says_that_it_waits_for_room_and_goes_on_when_there_is(node, monkeypatch):
    monkeypatch.setattr("workers.ray_pool.PATIENT_S", 0.5)
    monkeypatch.setattr("workers.ray_pool.SHARE_S", 0.2)
    said = []

    def notice(text):
        said.append(text)
        if len(said) == 1:
            node.add_node(num_cpus=1, num_gpus=1)

    pool = RayPool(None, node.address, Needs(1, cpus=1, gpus=1), lambda: 1.0, Counter, notice)
    with pool:
        assert [o.value for o in pool.run([Task("double", {"number": 4})])] == [8]
    first, second = said
    assert "wants 1 CPU, 1 GPU, and free on the cluster are 4 CPU, 0 GPU, 1.0 GiB" in first
    assert second.startswith("a worker has started, after ")


def test_every_node_builds_its_own_bank(nodes, make_bank):
    cluster, caches = nodes
    bank = make_bank("llama")
    spec = SessionSpec(
        checkpoint=bank.checkpoint, layout=bank.layout, quantizer="rtn",
        choices=tuple(tuple(s.name for s in row) for row in choices_of(bank.layout)),
        dtype="float32", threads=1, cache=os.environ["BITFRONT_CACHE"], calibration=IDS,
        statistics="test",
    )  # fmt: skip
    schemes = tuple(row[0] for row in spec.choices)
    tasks = [
        Task("measure", {"schemes": schemes, "ids": ids}, label=i) for i, ids in enumerate(IDS)
    ]

    def results(pool):
        return {o.task.label: o.value.kl_sum for o in pool.run(tasks)}

    with RayPool(spec, address=cluster.address, needs=Needs(2)) as pool:
        there = results(pool)
    assert there == pytest.approx(results(InProcessPool(spec)), rel=1e-6)
    for cache in caches:
        assert list((cache / "banks").rglob("*.safetensors"))

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

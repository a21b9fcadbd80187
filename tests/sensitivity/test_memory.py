"""Estimators hold a block, not the model: peak memory against the forecast, in real processes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "memory.py"
SLACK = 120e6  # what importing, threads and the heap's gaps come to


@pytest.fixture(scope="module")
def memory():
    """The benchmark, as a module."""
    spec = importlib.util.spec_from_file_location("memory_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(memory, tmp_path_factory):
    """A random checkpoint of 24 blocks, 170 million weights."""
    folder = tmp_path_factory.mktemp("checkpoint")
    memory.write_checkpoint(folder, layers=24, width=768, vocabulary=1024)
    return folder


def run(folder, name):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), "--step", name, "--length", "128"],
        env={**os.environ, "OMP_NUM_THREADS": "2"}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def test_peak_memory_is_what_was_forecast_and_below_the_model(checkpoint):
    """The bank first: it reads a few matrices at a time. Then both estimators from its pages."""
    files = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    model_bytes = 2 * files  # in float32, as machines without bfloat16 compute
    bank = run(checkpoint, "bank")
    assert bank["peak_bytes"] - bank["before_bytes"] < 0.75 * model_bytes
    for name in ("output-error", "kl-fisher"):
        found = run(checkpoint, name)
        grown = found["peak_bytes"] - found["before_bytes"]
        assert grown < 1.2 * found["forecast_bytes"] + SLACK
        assert grown < 0.75 * model_bytes

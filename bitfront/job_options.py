"""What the options of `search` and `submit` say of a job."""

from collections.abc import Mapping
from typing import Any

from bitfront.config import JobConfig, load_config
from bitfront.options import (
    bytes_of,
    joules_of,
    names_of,
    numbers_of,
    seconds_of,
    serving_of,
    sizes_of,
)

PLAIN = (
    "menu", "revision", "quantizer", "imatrix", "bank", "dtype", "transform", "interactions", "seed",
)  # fmt: skip
"""Options that are called like the fields that they set."""
NESTED = {
    "refine": "refinement.measurements",
    "strategy": "refinement.strategy",
    "minutes": "refinement.minutes",
    "generated": "serving.generated",
    "tensor_parallel": "serving.tensor_parallel",
}
SERVING = ("engine", "device", "threads", "batch", "context", "prompt")
ROLES = ("calibration", "search", "heldout")


def job_config(given: Mapping[str, Any]) -> JobConfig:
    """The configuration of a job.

    Args:
        given: the values of all options of `bitfront search`, by their parameters' names.

    Raises:
        ConfigError: a field or value that is wrong.
    """
    max_memory, estimators = given["max_memory"], given["estimators"]
    overrides: dict[str, Any] = {
        **{name: given[name] for name in PLAIN},
        **{field: given[name] for name, field in NESTED.items()},
        **serving_of(*(given[name] for name in SERVING)),
        "budgets": numbers_of(given["bits"]),
        "budgets_bytes": sizes_of(given["max_size"]),
        "trust_remote_code": given["trust_remote_code"] or None,
        "menu.cache": names_of(given["kv_menu"]),
        "estimators": estimators.split(",") if estimators else None,
        "serving.max_memory_bytes": bytes_of(max_memory) if max_memory else None,
        "serving.max_decode_s": seconds_of(given["max_decode_latency"]),
        "serving.max_prefill_s": seconds_of(given["max_prefill_latency"]),
        "serving.max_decode_j": joules_of(given["max_decode_energy"]),
        "serving.max_prefill_j": joules_of(given["max_prefill_energy"]),
        **{f"texts.{role}.source": given[f"{role}_text"] or given["text"] for role in ROLES},
    }
    return load_config(given["model"], given["config"], overrides)

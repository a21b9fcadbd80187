"""What this machine is, as a device: processor, memory, and their speed, found out in a second.

Nothing is raised for what can't be found: it stays None, and `Device.unknown` says why. Torch is
imported only where the system has an accelerator's device file.
"""

import os
import platform
import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from cost_models.devices import DEVICES, LOCAL, Arithmetic, Device, Efficiency, Rule, Tile

ACCELERATORS = ("/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/dxg", "/dev/kfd")
RAPL = Path("/sys/class/powercap/intel-rapl:0/energy_uj")
CGROUPS = Path("/sys/fs/cgroup")
FLAGS = {"avx2": "avx2", "avx512": "avx512f", "vnni": "avx512_vnni", "amx": "amx_tile"}
OPS_PER_CYCLE: dict[str, dict[Arithmetic, int]] = {
    "none": {"fp32": 8},
    "avx2": {"fp32": 32, "int8": 64},
    "avx512": {"fp32": 64, "int8": 128},
    "vnni": {"fp32": 64, "int8": 256},
    "amx": {"fp32": 64, "bf16": 1024, "int8": 2048},
}
"""Operations a cycle and core with two vector ports, the usual number on servers; for AMX, Intel's
https://en.wikipedia.org/wiki/Advanced_Matrix_Extensions. A core with one port does half."""
LANES = {"none": 4, "avx2": 16, "avx512": 32, "vnni": 32, "amx": 32}
COMPUTE_EFFICIENCY = 0.5
MOST_BYTES = 2**30
LEAST_BYTES = 2**27
ROUNDS = 3


def probe() -> Device:
    """This machine: its accelerator where there is one, else its processor."""
    if platform.system() == "Darwin":
        return _apple() or _processor()
    return _accelerator() or _processor()


@cache
def local_name(*, accelerated: bool) -> str:
    """What tells this machine's times from others': its accelerator, or its processor.

    Args:
        accelerated: whether the accelerator is meant, where there is one.
    """
    found = (_accelerator() or _apple()) if accelerated else None
    return found.title if found else _processor_title()


def _processor_title() -> str:
    return f"{_cpuinfo()[0]}, {core_limit():g} cores"


def memory_limit_bytes() -> int | None:
    """The memory that this process may use: the machine's, or less where a cgroup says so."""
    total = _physical_bytes()
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            limit = int((CGROUPS / name).read_text())
            total = limit if total is None else min(total, limit)
    return total


def core_limit() -> float:
    """The cores that this process may keep busy: its affinity, or a cgroup's quota if less."""
    try:
        cores: float = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        cores = os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = (CGROUPS / "cpu.max").read_text().split()
        cores = min(cores, int(quota) / int(period))
    with suppress(OSError, ValueError):
        old = CGROUPS / "cpu"
        quota_us = int((old / "cpu.cfs_quota_us").read_text())
        if quota_us > 0:
            cores = min(cores, quota_us / int((old / "cpu.cfs_period_us").read_text()))
    return cores


def bandwidth_bytes_per_s(threads: int, cache_bytes: int, limit_bytes: int | None) -> float:
    """Bytes/s read from memory by all threads at once, the best of a few rounds.

    Reading is what decoding does. The buffer is twice the last cache, within what memory allows.
    """
    size = min(max(2 * cache_bytes, LEAST_BYTES), MOST_BYTES, (limit_bytes or 2**33) // 8)
    words = max(1, size // 8 // threads)
    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(lambda _: np.full(words, 1.0), range(threads)))
        best = np.inf
        for _ in range(ROUNDS):
            start = time.perf_counter()
            list(pool.map(np.max, parts))  # one instruction a vector; numpy frees its lock here
            best = min(best, time.perf_counter() - start)
    return float(8 * words * threads / best)


def _processor() -> Device:
    unknown = {
        "tdp_w": "the system doesn't tell",
        "idle_w": "not measured",
        "energy": "not fitted; see facts for whether counters can be read",
        "link": "one machine",
    }
    model, flags, clock_hz = _cpuinfo()
    sets = [name for name, flag in FLAGS.items() if flag in flags]
    best = sets[-1] if sets else "none"
    cores, memory, cache_bytes = core_limit(), memory_limit_bytes(), _last_cache_bytes()
    if memory is None:
        unknown["memory_bytes"] = "the system doesn't tell"
    bandwidth: float | None = None
    try:
        bandwidth = bandwidth_bytes_per_s(max(1, int(cores)), cache_bytes, memory)
    except MemoryError:
        unknown["bandwidth_bytes_per_s"] = "too little memory is free to measure it"
    peaks: dict[Arithmetic, float] = {}
    if clock_hz is None:
        unknown["peaks"] = unknown["vector_ops_per_s"] = "the system doesn't tell the clock"
    else:
        peaks = {k: ops * cores * clock_hz for k, ops in OPS_PER_CYCLE[best].items()}
    facts: dict[str, Any] = {
        "processor": model,
        "cores": cores,
        "instruction_sets": sets,
        "clock_hz": clock_hz,
        "last_cache_bytes": cache_bytes,
        "peaks": "estimated: cores x clock x operations a cycle" if peaks else "unknown",
        "rapl": _rapl(),
        "nvml": _nvml(),
    }
    return Device(
        name=LOCAL,
        title=_processor_title(),
        kind="cpu",
        memory_bytes=memory,
        bandwidth_bytes_per_s=bandwidth,
        peaks=peaks,
        vector_ops_per_s=LANES[best] * cores * clock_hz if clock_hz else None,
        launch_s=5e-6,
        tile=Tile(m=16, n=16, units=max(1, int(cores))),
        # the bandwidth was measured, so all of it is reachable
        efficiency=Efficiency(compute=dict.fromkeys(peaks, COMPUTE_EFFICIENCY), memory=1.0),
        unknown=unknown,
        engines=_processor_engines(peaks),
        sources=("this machine: its system's tables, and a measurement of its memory",),
        facts=facts,
    )


def _processor_engines(peaks: dict[Arithmetic, float]) -> dict[str, tuple[Rule, ...]]:
    """The catalogue's rules for processors, in fp32 where this one has no narrower units."""
    if not peaks or platform.machine().lower() not in ("x86_64", "amd64"):
        return {}
    return {
        engine: tuple(
            rule
            if rule.arithmetic in peaks
            else rule.model_copy(update={"arithmetic": "fp32", "remark": "no units for bf16"})
            for rule in rules
        )
        for engine, rules in DEVICES["xeon-amx"].engines.items()
    }


def _accelerator() -> Device | None:
    """The first GPU that torch sees, with the catalogue's figures if its name is known."""
    if platform.system() != "Windows" and not any(Path(file).exists() for file in ACCELERATORS):
        return None
    try:
        import torch  # seconds; only where there may be something to find

        if not torch.cuda.is_available():
            return None
        properties = torch.cuda.get_device_properties(0)
    except Exception:  # a driver or build of torch that is broken is no accelerator
        return None
    facts = {
        "reported_as": properties.name,
        "processors": properties.multi_processor_count,
        "devices": torch.cuda.device_count(),
        "rapl": _rapl(),
        "nvml": _nvml(),
    }
    return _known(properties.name, int(properties.total_memory), facts) or Device(
        name=LOCAL,
        title=properties.name,
        kind="gpu",
        memory_bytes=int(properties.total_memory),
        bandwidth_bytes_per_s=None,
        peaks={},
        vector_ops_per_s=None,
        launch_s=3e-6,
        tile=Tile(m=128, n=128, units=properties.multi_processor_count),
        efficiency=Efficiency(compute={}, memory=0.85),
        unknown=dict.fromkeys(
            ("bandwidth_bytes_per_s", "peaks", "vector_ops_per_s", "tdp_w", "energy"),
            f"'{properties.name}' is not in the catalogue; add a file to configs/devices",
        ),
        sources=("this machine: torch.cuda",),
        facts=facts,
    )


def _apple() -> Device | None:
    name = _sysctl("machdep.cpu.brand_string") or ""
    memory = _sysctl("hw.memsize") or ""
    facts = {"reported_as": name, "rapl": "not on macOS", "nvml": "not on macOS"}
    return _known(name, int(memory) if memory.isdigit() else None, facts)


def _known(name: str, memory_bytes: int | None, facts: dict[str, Any]) -> Device | None:
    """The device of the catalogue that calls itself `name`, with this machine's memory."""
    for entry in DEVICES:
        device = DEVICES[entry]
        if any(_calls_itself(name, part) for part in device.reported_as):
            return device.model_copy(
                update={
                    "name": LOCAL,
                    "title": f"{name} (as {entry})",
                    "memory_bytes": memory_bytes or device.memory_bytes,
                    "facts": {**facts, "catalogue": entry},
                }
            )
    return None


def _calls_itself(name: str, part: str) -> bool:
    """Whether a name is that device's: whole words, and none of a slower or faster sibling's."""
    siblings = {"Laptop", "Mobile", "Max-Q", "D", "NX", "Nano", "SUPER"} - set(part.split())
    words = re.escape(part)
    return bool(re.search(rf"(?<![\w]){words}(?![\w])", name)) and not siblings & set(name.split())


def _cpuinfo() -> tuple[str, set[str], float | None]:
    """Model name, flags, and clock in Hz, of the first processor."""
    fields: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    clock: float | None = None
    with suppress(OSError, ValueError):
        most = Path("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq").read_text()
        clock = 1e3 * int(most)
    with suppress(KeyError, ValueError):
        clock = clock or 1e6 * float(fields["cpu MHz"])
    with suppress(TypeError, ValueError):
        clock = clock or float(_sysctl("hw.cpufrequency_max") or "")
    model = fields.get("model name") or _sysctl("machdep.cpu.brand_string")
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return model or platform.processor() or platform.machine() or "unknown processor", flags, clock


def _last_cache_bytes() -> int:
    """Bytes of the largest cache; 32 MiB where the system doesn't tell."""
    found = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with suppress(OSError):
            match = re.fullmatch(r"(\d+)([KM]?)", file.read_text().strip())
            if match:
                found.append(int(match.group(1)) * {"": 1, "K": 2**10, "M": 2**20}[match.group(2)])
    return max(found, default=2**25)


def _physical_bytes() -> int | None:
    with suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _rapl() -> str:
    """`readable`, or why the processor's energy counter isn't."""
    try:
        int(RAPL.read_text())
    except FileNotFoundError:
        return f"{RAPL.parent} doesn't exist (no Intel or AMD counter, or a virtual machine)"
    except PermissionError:
        return f"{RAPL} is for root alone; chmod o+r it to measure energy"
    except (OSError, ValueError) as error:
        return f"{RAPL} can't be read ({error})"
    return "readable"


def _nvml() -> str:
    """`readable`, or why an NVIDIA GPU's power isn't."""
    try:
        import pynvml  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        return "nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
        pynvml.nvmlDeviceGetPowerUsage(pynvml.nvmlDeviceGetHandleByIndex(0))
    except Exception as error:  # NVML's errors share no useful base
        return f"NVML: {error}"
    return "readable"


def _sysctl(name: str) -> str | None:
    if platform.system() != "Darwin":
        return None
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(  # noqa: S603  # a fixed command
            ["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=True
        )
        return done.stdout.strip()
    return None

"""Joules of a forward pass: E = P_idle t + e_mem bytes + e_op(dtype) ops, operator by operator.

Three or four coefficients for a device, which NVML or RAPL readings fit (`Device.energy`). The form
is that of the energy roofline (Choi et al., IPDPS 2013). No device of the catalogue has measured
coefficients: `joules` refuses such a device, `from_power` makes rough ones of its power limit for
those who accept its assumptions, and `limit_j` is a bound that needs none.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cost_models import roofline
from cost_models.devices import Device, DeviceError, Energy
from cost_models.geometry import Geometry
from cost_models.memory import FULL_CACHE_BITS, Phase, Workload
from cost_models.operations import Operator, fixed
from quantization.schemes import Scheme
from quantization.units import Layout

RESOURCE = "energy_j"
IDLE_SHARE = 0.15
MEMORY_SHARE = 0.6


def joules(operator: Operator, device: Device) -> float:
    """Joules of an operator on one rank.

    Raises:
        DeviceError: the device has no coefficients.
    """
    if device.energy is None:
        raise DeviceError(
            f"device '{device.name}' has no energy coefficients "
            f"({device.unknown.get('energy', 'none in its description')}); "
            "measure energy on the device, or take the bound of its power limit times the time"
        )
    spent = (device.idle_w or 0.0) * roofline.seconds(operator, device)
    spent += device.energy.memory_j_per_byte * operator.moved_bytes
    if operator.ops:
        arithmetic = device.arithmetic(operator.arithmetic)
        if arithmetic not in device.energy.op_j:
            raise DeviceError(
                f"device '{device.name}' has no energy of a {arithmetic} operation; "
                f"it has: {', '.join(device.energy.op_j)}"
            )
        spent += device.energy.op_j[arithmetic] * operator.ops
    return spent


def table(
    layout: Layout,
    geometry: Geometry,
    menu: Sequence[Scheme],
    device: Device,
    workload: Workload,
    phase: Phase,
    engine: str | None = None,
) -> NDArray[np.float64]:
    """Units x schemes, joules of all ranks together; infinite where the engine has no kernel.

    A map's energy is its sum plus `fixed_j`.
    """
    found = roofline.costs(layout, geometry, menu, device, workload, phase, engine, joules)
    return found * workload.tensor_parallel


def fixed_j(
    layout: Layout,
    geometry: Geometry,
    device: Device,
    workload: Workload,
    phase: Phase,
    cache_bits: float | Sequence[float] = FULL_CACHE_BITS,
) -> float:
    """Joules of what no unit decides, all ranks together."""
    parts = fixed(layout, geometry, workload, phase, cache_bits)
    return workload.tensor_parallel * sum(joules(part, device) for part in parts)


def limit_j(time_s: float, device: Device, ranks: int = 1) -> float:
    """The most that `time_s` seconds can cost: the power limit of every rank, all along.

    Raises:
        DeviceError: the device's power limit isn't known.
    """
    return time_s * device.need("tdp_w") * ranks


def from_power(device: Device) -> Device:
    """The device with coefficients made of its power limit, which is a guess and says so.

    Assumed, not measured: idling takes `IDLE_SHARE` of the limit, streaming from memory at the
    reachable bandwidth `MEMORY_SHARE`, and multiplying at the reachable peak all of it. Comparisons
    between schemes on one device lean on these shares less than the joules themselves do.

    Raises:
        DeviceError: the power limit or the bandwidth isn't known.
    """
    limit = device.need("tdp_w")
    idle = device.idle_w if device.idle_w is not None else IDLE_SHARE * limit
    streaming = device.need("bandwidth_bytes_per_s") * device.efficiency.memory
    if idle >= MEMORY_SHARE * limit:
        raise DeviceError(
            f"device '{device.name}' idles at {idle:g} W, which leaves nothing of {MEMORY_SHARE:.0%} of "
            f"its {limit:g} W for memory; measure its energy"
        )
    coefficients = Energy(
        memory_j_per_byte=(MEMORY_SHARE * limit - idle) / streaming,
        op_j={
            arithmetic: (limit - idle) / (peak * device.efficiency.compute[arithmetic])
            for arithmetic, peak in device.peaks.items()
        },
        source=f"derived from the power limit of {limit:g} W: idle {IDLE_SHARE:.0%}, "
        f"memory {MEMORY_SHARE:.0%}, products 100 %; not measured",
    )
    return device.model_copy(update={"idle_w": idle, "energy": coefficients})

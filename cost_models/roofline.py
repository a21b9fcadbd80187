"""Seconds of a forward pass from a device's peaks: the roofline, operator by operator.

    t = max(bytes / (bandwidth x eta_m), ops / (peak x eta_c) + unpacking / vector units)
        + launches x launch_s + what ranks exchange

after Williams et al. (2009) and LLM-Viewer (Yuan et al. 2024, arXiv:2402.16363), whose treatment of
decode and prefill this follows, with what it leaves out: grouped-query attention reads the cache of
key-value heads only, packed weights are unpacked on vector units once for every tile of rows,
products are rounded up to tiles and waves of tiles, and every kernel has a launch. The phases are
separate resources: prefill is one pass over every prompt, decode is one token of every sequence.
What a unit's scheme decides is in `table`; the rest is `fixed_s`.
"""

from collections.abc import Callable, Sequence
from math import ceil

import numpy as np
from numpy.typing import NDArray

from cost_models.devices import Arithmetic, Device, DeviceError
from cost_models.geometry import Geometry
from cost_models.memory import FULL_CACHE_BITS, PHASES, Phase, Workload, WorkloadError
from cost_models.operations import Operator, fixed, unit_operators
from engines import ENGINES, load_engine
from quantization.schemes import FULL_PRECISION, Scheme
from quantization.units import Layout


def operators(
    layout: Layout,
    geometry: Geometry,
    schemes: Sequence[Scheme],
    workload: Workload,
    phase: Phase,
    device: Device | None = None,
    engine: str | None = None,
    cache_bits: float | Sequence[float] = FULL_CACHE_BITS,
) -> list[Operator]:
    """All operators of a phase under a map; `schemes` has one for each unit.

    `device` with `engine` decides the arithmetic; without, weights are unpacked to bf16 and
    quantized activations multiplied in their own type. `cache_bits` are the bits of a number in
    the KV cache, one for all attending layers or one for each.

    Raises:
        WorkloadError: an unknown phase.
        DeviceError: the engine has no kernel on the device for a scheme.
    """
    found = fixed(layout, geometry, workload, phase, cache_bits)
    for index, (unit, scheme) in enumerate(zip(layout.units, schemes, strict=True)):
        cached = unit.kind == "cache"  # no product has it for a weight
        arithmetic = "bf16" if cached else choose_arithmetic(scheme, device, engine)
        if arithmetic is None:
            raise DeviceError(
                f"{engine} has no kernel for {scheme.name} on this device, which unit "
                f"'{unit.name}' is to have; choose another scheme or engine"
            )
        found += unit_operators(
            index, unit, scheme, geometry, workload, phase, arithmetic, _separate(engine)
        )
    return found


def seconds(operator: Operator, device: Device) -> float:
    """Seconds of an operator on a device by the module's formula.

    Raises:
        DeviceError: the device lacks a number that the operator needs, such as a link's.
    """
    memory = operator.moved_bytes / (
        device.need("bandwidth_bytes_per_s") * device.efficiency.memory
    )
    compute = 0.0
    if operator.ops:
        arithmetic = device.arithmetic(operator.arithmetic)
        peak = device.peaks[arithmetic] * device.efficiency.compute[arithmetic]
        compute = operator.ops * _rounding(operator, device) / peak
    if operator.unpacking:
        rows = operator.product[0] if operator.product else 1
        passes = max(1, ceil(rows / device.tile.m))
        compute += operator.unpacking * passes / device.need("vector_ops_per_s")
    exchange = 0.0
    if operator.collectives:
        if device.link is None:
            raise DeviceError(
                f"device '{device.name}' has no link for tensor parallelism "
                f"({device.unknown.get('link', 'none in its description')}); use one device"
            )
        exchange = (
            operator.link_bytes / device.link.bandwidth_bytes_per_s
            + operator.collectives * device.link.latency_s
        )
    return max(memory, compute) + operator.launches * device.launch_s + exchange


def table(
    layout: Layout,
    geometry: Geometry,
    menu: Sequence[Scheme],
    device: Device,
    workload: Workload,
    phase: Phase,
    engine: str | None = None,
) -> NDArray[np.float64]:
    """Units x schemes, seconds. A map's time is its sum plus `fixed_s`.

    Infinite where the engine has no kernel on this device; NaN is never returned. Shapes that a
    format refuses count with the bytes it would have, as the problem's mask leaves them out.

    Raises:
        WorkloadError: an unknown phase, or more ranks than the device's link joins.
        DeviceError: the device lacks a number.
    """
    return costs(layout, geometry, menu, device, workload, phase, engine, seconds)


def costs(
    layout: Layout,
    geometry: Geometry,
    menu: Sequence[Scheme],
    device: Device,
    workload: Workload,
    phase: Phase,
    engine: str | None,
    cost: Callable[[Operator, Device], float],
) -> NDArray[np.float64]:
    """Units x schemes, the sum of what operators cost by some measure; see `table`."""
    _check(device, workload, phase)
    found = np.full((len(layout.units), len(menu)), np.inf)
    for column, scheme in enumerate(menu):
        known = choose_arithmetic(scheme, device, engine)
        for row, unit in enumerate(layout.units):
            arithmetic = "bf16" if unit.kind == "cache" else known
            if arithmetic is None:
                continue
            parts = unit_operators(
                row, unit, scheme, geometry, workload, phase, arithmetic, _separate(engine)
            )
            found[row, column] = sum(cost(part, device) for part in parts)
    return found


def fixed_s(
    layout: Layout,
    geometry: Geometry,
    device: Device,
    workload: Workload,
    phase: Phase,
    cache_bits: float | Sequence[float] = FULL_CACHE_BITS,
) -> float:
    """Seconds of what no unit decides: attention and its cache, norms, look-ups, exchanges."""
    _check(device, workload, phase)
    parts = fixed(layout, geometry, workload, phase, cache_bits)
    return sum(seconds(part, device) for part in parts)


def choose_arithmetic(
    scheme: Scheme, device: Device | None, engine: str | None
) -> Arithmetic | None:
    """The type of a scheme's products; None where the engine has no kernel for it."""
    if engine is not None and device is not None and scheme.weight != FULL_PRECISION:
        rule = device.rule(engine, scheme.weight, scheme.activation)
        return rule.arithmetic if rule else None
    for name in ("int8", "int4", "fp8", "fp4"):  # activations in a narrow type multiply in it
        if scheme.activation.startswith((name, f"mx{name}", f"nv{name}")):
            return name
    return "bf16"


def _separate(engine: str | None) -> bool:
    """Whether an engine multiplies by every matrix by itself, so that a unit takes several launches.

    Those of the catalogue that we don't run serve fused matrices.
    """
    return engine is not None and engine in ENGINES and not load_engine(engine).fuses


def _rounding(operator: Operator, device: Device) -> float:
    """How much more than its operations a product computes: whole tiles, in whole waves.

    For fewer rows than a tile has there are kernels in powers of two, down to matrix times vector.
    Fewer tiles than processors make no wave: such products divide their inputs, too (split-K).
    """
    if operator.product is None:
        return 1.0
    rows, columns = operator.product
    tile = device.tile
    height = tile.m
    while height > 1 and height // 2 >= rows:
        height //= 2
    down, across = ceil(rows / height), ceil(columns / tile.n)
    padded = down * height * across * tile.n / (rows * columns)
    waves = down * across / tile.units
    return padded * (ceil(waves) / waves if waves > 1 else 1.0)


def _check(device: Device, workload: Workload, phase: Phase) -> None:
    if phase not in PHASES:
        raise WorkloadError(f"unknown phase '{phase}'; phases are prefill and decode")
    ranks = workload.tensor_parallel
    if device.link is not None and ranks > device.link.ranks:
        raise WorkloadError(
            f"tensor parallelism over {ranks} is more than the {device.link.ranks} that "
            f"'{device.name}' is linked to; ask for at most {device.link.ranks}"
        )

"""The catalogue of devices: what `configs/devices/*.yaml` says, checked. No torch.

A device is a bandwidth, peaks by data type and a handful of factors that turn peaks into what
programs reach; `cost_models/roofline.py` computes with nothing else. `local_device` describes the
machine that runs this.
"""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from quantization.errors import BitfrontError
from quantization.registry import Registry
from quantization.schemes import FULL_PRECISION

LOCAL = "local"
Arithmetic = Literal["fp32", "tf32", "fp16", "bf16", "fp8", "int8", "int4", "fp4"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
SUBSTITUTES: dict[str, tuple[Arithmetic, ...]] = {
    "bf16": ("fp16", "fp32"),
    "fp16": ("bf16", "fp32"),
}
"""What computes a type that a device has no units for, nearest first."""


class DeviceError(BitfrontError):
    """A device that lacks what a question needs, or whose description is wrong."""


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Rule(_Closed):
    """Formats that an engine has kernels for on a device.

    Args:
        formats: a pattern of weight formats, or `weights/activations` where inputs are quantized.
        arithmetic: the type that its products are computed in; a fallback where it is wider than
            what is stored, which `remark` then says.
    """

    formats: str
    arithmetic: Arithmetic
    remark: str | None = None

    def matches(self, weight: str, activation: str) -> bool:
        """Whether the rule speaks of weights with these activations, both by format name.

        Whatever the type of the scales: kernels are the same.
        """
        weights, _, activations = self.formats.partition("/")
        names = (weight, weight.removesuffix("-bf16"))
        return any(fnmatchcase(name, weights) for name in names) and fnmatchcase(
            activation, activations or FULL_PRECISION
        )


class Tile(_Closed):
    """How products are cut: `m` x `n` outputs for one of `units` processors at a time."""

    m: int = Field(ge=1)
    n: int = Field(ge=1)
    units: int = Field(ge=1)


class Efficiency(_Closed):
    """Shares of the peaks that kernels reach: of compute by data type, and of bandwidth."""

    compute: dict[Arithmetic, Share]
    memory: Share


class Energy(_Closed):
    """Coefficients of `cost_models/energy.py`, with where they come from.

    Args:
        memory_j_per_byte: joules a byte moved to or from memory.
        op_j: joules an operation, by data type.
    """

    memory_j_per_byte: Positive
    op_j: dict[Arithmetic, Positive]
    source: str


class Link(_Closed):
    """What joins devices of a kind: bytes/s in one direction, and seconds a collective at least.

    Args:
        ranks: how many devices it joins.
    """

    bandwidth_bytes_per_s: Positive
    latency_s: float = Field(ge=0)
    ranks: int = Field(ge=2)


class Device(_Closed):
    """A device; what is None is not known, and `unknown` says why.

    Args:
        kind: `gpu` with memory of its own, `unified` with the processor's, or `cpu`.
        memory_bytes: nominal.
        bandwidth_bytes_per_s: of its memory, by the data sheet; measured on `local`.
        peaks: dense operations/s by data type (a multiply-add is two).
        vector_ops_per_s: lane instructions/s of the vector units, which unpack weights.
        launch_s: what every kernel costs beside its work: launch, ramp and drain.
        reported_as: parts of the names by which drivers and systems call the device.
        engines: engine to what it has kernels for.
        facts: what was found out about this machine; only for `local`.
    """

    name: str
    title: str
    kind: Literal["gpu", "cpu", "unified"]
    memory_bytes: Annotated[int, Field(gt=0)] | None
    bandwidth_bytes_per_s: Positive | None
    peaks: dict[Arithmetic, Positive]
    vector_ops_per_s: Positive | None
    launch_s: float = Field(ge=0)
    tile: Tile
    efficiency: Efficiency
    tdp_w: Positive | None = None
    idle_w: Positive | None = None
    energy: Energy | None = None
    link: Link | None = None
    unknown: dict[str, str] = Field(default_factory=dict)
    reported_as: tuple[str, ...] = ()
    engines: dict[str, tuple[Rule, ...]] = Field(default_factory=dict)
    sources: tuple[str, ...] = Field(min_length=1)
    facts: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> "Device":
        if set(self.efficiency.compute) != set(self.peaks):
            raise ValueError("efficiency.compute must name the types of peaks, no more, no less")
        for engine, rules in self.engines.items():
            for rule in rules:
                if rule.arithmetic not in self.peaks:
                    raise ValueError(f"{engine} computes in {rule.arithmetic}, which has no peak")
        return self

    def need(self, field: str) -> float:
        """A number that must be known; raises `DeviceError` with the reason where it isn't."""
        value = getattr(self, field)
        if value is None:
            reason = self.unknown.get(field, "its description leaves it out")
            raise DeviceError(
                f"device '{self.name}' has no {field} ({reason}); name another device"
            )
        return float(value)

    def arithmetic(self, wanted: Arithmetic) -> Arithmetic:
        """The type that products of type `wanted` are computed in here, which has a peak."""
        for candidate in (wanted, *SUBSTITUTES.get(wanted, ("bf16", "fp16", "fp32"))):
            if candidate in self.peaks:
                return candidate
        raise DeviceError(
            f"device '{self.name}' has no peak for {wanted} nor for what could stand in for it; "
            f"it has: {', '.join(self.peaks) or 'none'}"
        )

    def rule(self, engine: str, weight: str, activation: str) -> Rule | None:
        """The first rule of an engine for a scheme, None where it has no kernel for it.

        Raises:
            UnknownNameError: an engine that the device has no rules for, with the nearest.
        """
        known: Registry[tuple[Rule, ...]] = Registry(f"engine on {self.name}")
        for name, rules in self.engines.items():
            known.add(name, rules)
        found = (rule for rule in known[engine] if rule.matches(weight, activation))
        return next(found, None)


class _Devices:
    """The catalogue by name; a file is read when its device is asked for."""

    def __getitem__(self, name: str) -> Device:
        return _read(_files()[name])

    def __iter__(self) -> Iterator[str]:
        return iter(_files())


DEVICES = _Devices()


def load_device(name: str) -> Device:
    """A device of the catalogue, or this machine for `local`.

    Raises:
        UnknownNameError: with the nearest names.
        DeviceError: a file that doesn't describe a device.
    """
    return local_device() if name == LOCAL else DEVICES[name]


@cache
def local_device() -> Device:
    """This machine; the first call takes about a second, in which its memory's bandwidth is measured.

    What can't be found out is None, with the reason in `unknown`; nothing is raised for it.
    """
    from cost_models.probing import probe

    return probe()


@cache
def _files() -> Registry[str]:
    known: Registry[str] = Registry("device")
    folder = files("configs").joinpath("devices")
    for name in sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml")):
        known.add(name.removesuffix(".yaml"), name)
    return known


@cache
def _read(file: str) -> Device:
    text = files("configs").joinpath("devices", file).read_text()
    try:
        return Device.model_validate(yaml.safe_load(text))
    except (yaml.YAMLError, ValidationError) as error:
        raise DeviceError(
            f"configs/devices/{file} is wrong: {' '.join(str(error).split())}"
        ) from error

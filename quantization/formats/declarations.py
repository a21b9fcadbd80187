"""Declarations of the scaled formats: the whole vocabulary on one screen."""

from collections.abc import Iterator
from dataclasses import replace

from quantization.formats.elements import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    NF4,
    Element,
    FixedPoint,
    SignedInteger,
    Ternary,
)
from quantization.formats.scaled import WHOLE, Scaled
from quantization.formats.scales import (
    BF16,
    FP16,
    FP32,
    PowerOfTwo,
    ScaleType,
    SecondLevel,
    TensorScaled,
)

GROUPS = (16, 32, 64, 128)


def scaled_formats() -> Iterator[Scaled]:
    """Every scaled format that has a name."""
    for bits in range(2, 9):
        for scale in (FP16, BF16, TensorScaled(), PowerOfTwo()):
            for columns in (*GROUPS, WHOLE):
                yield from _both(_grouped("integer", SignedInteger(bits), scale, columns))
        yield from _both(_grouped("integer", SignedInteger(bits), SecondLevel(), 16))
        for columns in GROUPS:
            real = _grouped("integer", SignedInteger(bits), FP16, columns)
            yield replace(real, name=f"{real.name}-real", asymmetric=True, real_zeros=True)
    for columns in (*GROUPS, WHOLE):
        yield _grouped("ternary", Ternary(), FP16, columns)
        for element in (E2M1, E3M2, E2M3):
            yield _grouped("float", element, FP16, columns)
        yield _grouped("table", NF4, FP16, columns)
    for element in (E4M3, E5M2):
        yield Scaled(element.name, "float", element, FP32, WHOLE, rows=WHOLE)
        yield Scaled(f"{element.name}-channel", "float", element, FP32, WHOLE)
        yield Scaled(f"{element.name}-b128", "float", element, FP32, 128, rows=128)
    yield from _microscaling()


def _grouped(family: str, element: Element, scale: ScaleType, columns: int | None) -> Scaled:
    group = "channel" if columns is WHOLE else f"g{columns}"
    return Scaled(f"{element.name}-{group}{scale.suffix}", family, element, scale, columns)


def _both(symmetric: Scaled) -> Iterator[Scaled]:
    """The symmetric format and its twin with zero points: `int4-g64-bf16`, `int4-g64-asym-bf16`."""
    yield symmetric
    suffix = symmetric.scale.suffix
    name = f"{symmetric.name.removesuffix(suffix)}-asym{suffix}"
    yield replace(symmetric, name=name, asymmetric=True)


def _microscaling() -> Iterator[Scaled]:
    """OCP Microscaling Formats (MX) Specification v1.0, table 1, and NVIDIA's NVFP4."""
    elements = {
        "mxfp4": E2M1,
        "mxfp6": E3M2,
        "mxfp6-e2m3": E2M3,
        "mxfp8": E4M3,
        "mxfp8-e5m2": E5M2,
        "mxint8": FixedPoint(),
    }
    for name, element in elements.items():
        scale = PowerOfTwo(microscaling=True)
        yield Scaled(name, "microscaling", element, scale, 32, ragged=False)
    yield Scaled("nvfp4", "microscaling", E2M1, TensorScaled(), 16, ragged=False)

"""What many tools can be told: integers of some bits in groups, for each module by name."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from quantization.errors import ExportError
from quantization.formats import FORMATS
from quantization.formats.elements import SignedInteger
from quantization.formats.scaled import Scaled
from quantization.formats.scales import Rounded
from quantization.schemes import FULL_PRECISION, Scheme
from quantization.units import Layout


def integer(name: str) -> Scaled:
    """The format of that name.

    Raises:
        ExportError: it isn't integers under plain scales.
    """
    format = FORMATS[name]
    if (
        not isinstance(format, Scaled)
        or not isinstance(format.element, SignedInteger)
        or not isinstance(format.scale, Rounded)
        or format.real_zeros
    ):
        raise ExportError(f"{name} is no format of integers under plain scales")
    return format


def integer_named(bits: int, group: int | None, *, asymmetric: bool = False, end: str = "") -> str:
    """The format of integers of so many bits.

    Args:
        bits: of a code.
        group: columns that share a scale; None or -1 for a whole row.
        asymmetric: with zero points.
        end: of the name: the type of its scales.

    Raises:
        ExportError: there is none.
    """
    columns = "channel" if group in (None, -1) else f"g{group}"
    name = f"int{bits}-{columns}{'-asym' if asymmetric else ''}{end}"
    if name not in FORMATS:
        raise ExportError(f"no format here is {bits} bits in groups of {group} ({name})")
    return name


def bits_and_group(name: str) -> dict[str, Any]:
    """What GPTQ and AutoRound are told of a format of integers."""
    made = integer(name)
    return {
        "bits": made.element.bits,
        "group_size": made.columns or -1,
        "sym": not made.asymmetric,
    }


def group_of(format: Scaled, columns: int) -> int:
    """Columns that share a scale."""
    return format.columns or columns


def named(layout: Layout, schemes: Sequence[Scheme], *, embeddings: bool = False) -> dict[str, str]:
    """The format of each module that is multiplied, layers that were kept included.

    Args:
        layout: the model's units.
        schemes: one for each.
        embeddings: also of those that are looked up.
    """
    found = {
        site.name: scheme.weight
        for unit, scheme in zip(layout.units, schemes, strict=True)
        for site in unit.sites
        if unit.kind != "cache" and (embeddings or unit.kind != "embedding")
    }
    return found | {kept.name: FULL_PRECISION for kept in layout.kept}


def most_common(formats: Mapping[str, str]) -> str:
    """The quantized format that most modules have.

    Raises:
        ExportError: all are in full precision.
    """
    counts = Counter(format for format in formats.values() if format != FULL_PRECISION)
    if not counts:
        raise ExportError("the map quantizes nothing; export it to safetensors")
    return counts.most_common(1)[0][0]

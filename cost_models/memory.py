"""Whole-model memory: weights, KV cache, activations and workspace. No torch: queries use it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import Literal

from cost_models.geometry import Geometry
from quantization.errors import BitfrontError
from quantization.schemes import Scheme
from quantization.units import Layout

RESOURCE = "memory_bytes"
Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
CACHE_ELEMENT_BYTES = 2  # bf16
FULL_CACHE_BITS = 8 * CACHE_ELEMENT_BYTES
ELEMENT_BYTES = 2  # activations and what isn't quantized: bf16
LOGIT_BYTES = 4  # engines sample from float32


class WorkloadError(BitfrontError):
    """A workload that no device could run."""


@dataclass(frozen=True)
class Workload:
    """What the model has to do, and to hold while it does.

    Args:
        batch: sequences side by side.
        context: tokens that the cache holds for each sequence when a token is decoded.
        prompt: tokens of each sequence that prefill takes at once.
        generated: tokens that are decoded for each sequence.
        tensor_parallel: devices that share every layer.

    Raises:
        WorkloadError: one of them is not a whole number from 1.
    """

    batch: int = 1
    context: int = 4096
    prompt: int = 512
    generated: int = 128
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise WorkloadError(
                    f"the workload's {name} is {value!r}; give a whole number from 1"
                )


@dataclass(frozen=True)
class Sharing:
    """What of a map's bytes one of several ranks holds, as an upper bound.

    Args:
        ranks: devices that share every matrix.
        units: how many are divided; each may be rounded up by a byte.
        other_bytes: what isn't divided, and every rank has.
        cache_share: of the KV cache, a rank's.
    """

    ranks: int = 1
    units: int = 0
    other_bytes: int = 0
    cache_share: float = 1.0

    def weights(self, weight_bytes: int) -> int:
        """A rank's, of a map's weight bytes."""
        if self.ranks == 1:
            return weight_bytes
        return ceil((weight_bytes - self.other_bytes) / self.ranks) + self.units + self.other_bytes

    def most_weights(self, rank_bytes: int) -> int:
        """The weight bytes of a map of which a rank holds no more than so many."""
        if self.ranks == 1:
            return rank_bytes
        return self.ranks * (rank_bytes - self.units - self.other_bytes) + self.other_bytes

    def cache(self, cache_bytes: int) -> int:
        """A rank's, of a KV cache."""
        return ceil(cache_bytes * self.cache_share)


def sharing_of(layout: Layout, geometry: Geometry, workload: Workload, other_bytes: int) -> Sharing:
    """Of a workload's ranks; `other_bytes` are those outside units."""
    if workload.tensor_parallel == 1:
        return Sharing()
    whole = kv_cache_bytes(layout, workload)
    own = _rank_cache(layout, geometry, workload, FULL_CACHE_BITS)
    share = own / whole if whole else 1.0
    return Sharing(workload.tensor_parallel, len(layout.units), other_bytes, share)


@dataclass(frozen=True)
class Footprint:
    """What one rank holds, in bytes; ranks are alike up to rounding.

    Args:
        blocks: the weights of the decoder blocks, packed.
        outside: embedding and head (once where they are tied), norms, and what wasn't placed.
        cache: the KV cache at full context.
        activations: the largest set of tensors that live at once, in prefill.
        workspace: the largest quantized matrix unpacked to bf16: what an engine needs that unpacks
            before it multiplies. Kernels that unpack in registers need none of it.
    """

    blocks: int
    outside: int
    cache: int
    activations: int
    workspace: int

    @property
    def total(self) -> int:
        """All of it; an upper bound for engines that need no workspace."""
        return self.blocks + self.outside + self.cache + self.activations + self.workspace


def kv_cache_bytes(
    layout: Layout, workload: Workload, bits: float | Sequence[float] = FULL_CACHE_BITS
) -> int:
    """Bytes of the KV cache at full context, sliding windows respected, on all ranks together.

    `bits` are those of an element, scales included: one number, or one for each layer of
    `layout.cache`.

    Raises:
        WorkloadError: another number of bits than layers.
    """
    widths = cache_widths(bits, len(layout.cache))
    return sum(
        ceil(
            layer.elements
            * min(workload.context, layer.window or workload.context)
            * workload.batch
            * width
            / 8
        )
        for layer, width in zip(layout.cache, widths, strict=True)
    )


def footprint(
    layout: Layout,
    geometry: Geometry,
    schemes: Sequence[Scheme],
    workload: Workload,
    cache_bits: float | Sequence[float] = FULL_CACHE_BITS,
) -> Footprint:
    """What one rank holds under a map; `schemes` has one for each unit of `layout`.

    Under tensor parallelism matrices are divided evenly, norms are copied, and key-value heads are
    divided until each rank has one: more ranks than heads hold copies.
    """
    from cost_models import weight_bytes  # the formats need torch

    ranks = workload.tensor_parallel
    packed = [
        weight_bytes.unit_bytes(unit, scheme)
        for unit, scheme in zip(layout.units, schemes, strict=True)
    ]
    blocks = sum(
        ceil(size / ranks)
        for size, unit in zip(packed, layout.units, strict=True)
        if unit.layer is not None
    )
    outside = sum(
        ceil(size / ranks)
        for size, unit in zip(packed, layout.units, strict=True)
        if unit.layer is None
    )
    return Footprint(
        blocks=blocks,
        outside=outside + weight_bytes.other_bytes(layout),
        cache=_rank_cache(layout, geometry, workload, cache_bits),
        activations=activation_bytes(layout, geometry, workload),
        workspace=_workspace(layout, schemes, ranks),
    )


def activation_bytes(layout: Layout, geometry: Geometry, workload: Workload) -> int:
    """The activation peak of one rank, in prefill: inside the widest unit, or at the logits.

    Beside the unit's outputs live its input and the residual stream, and a gate's product with
    its partner takes as much again as half of the outputs, which is in the same buffer already.
    """
    tokens = workload.batch * workload.prompt
    ranks = workload.tensor_parallel
    active = geometry.experts_per_token or 1
    widest = max(
        (
            sum(site.shape[-2] for site in unit.sites) * (active if unit.kind == "experts" else 1)
            for unit in layout.units
            if unit.layer is not None
        ),
        default=0,
    )
    inside = tokens * (2 * geometry.hidden + ceil(widest / ranks)) * ELEMENT_BYTES
    logits = (
        workload.batch * geometry.vocab * LOGIT_BYTES + tokens * geometry.hidden * ELEMENT_BYTES
    )
    return max(inside, logits)


def cache_widths(bits: float | Sequence[float], layers: int) -> list[float]:
    """Bits of a number in the cache, layer by layer; raises `WorkloadError` for another count."""
    widths = [float(bits)] * layers if isinstance(bits, int | float) else [float(b) for b in bits]
    if len(widths) != layers or any(width <= 0 for width in widths):
        raise WorkloadError(
            f"the cache's bits are {bits!r}; give one number above 0, or {layers} of them"
        )
    return widths


def _rank_cache(
    layout: Layout, geometry: Geometry, workload: Workload, bits: float | Sequence[float]
) -> int:
    if workload.tensor_parallel == 1:
        return kv_cache_bytes(layout, workload, bits)
    attending = [layer for layer in geometry.layers if layer.heads]
    heads = [layer.kv_heads for layer in attending] or [1]
    if len(heads) != len(layout.cache):  # layers that share a cache: all as the first
        heads = [heads[0]] * len(layout.cache)
    total = 0
    for layer, width, count in zip(
        layout.cache, cache_widths(bits, len(layout.cache)), heads, strict=True
    ):
        kept = workload.batch * min(workload.context, layer.window or workload.context)
        share = ceil(count / workload.tensor_parallel) / count
        total += ceil(layer.elements * share * kept * width / 8)
    return total


def _workspace(layout: Layout, schemes: Sequence[Scheme], ranks: int) -> int:
    from quantization.schemes import FULL_PRECISION

    return max(
        (
            ceil(site.numel * ELEMENT_BYTES / ranks)
            for unit, scheme in zip(layout.units, schemes, strict=True)
            if scheme.weight != FULL_PRECISION
            for site in unit.stored
        ),
        default=0,
    )

"""The operators of a forward pass: what each one computes, reads and writes, on one rank.

What a unit's scheme decides are its products; attention, norms, look-ups and exchanges between
ranks are `fixed`. Seconds and joules are made of these in `roofline.py` and `energy.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

from cost_models.devices import Arithmetic
from cost_models.geometry import Geometry, LayerGeometry
from cost_models.memory import (
    ELEMENT_BYTES,
    FULL_CACHE_BITS,
    PHASES,
    Phase,
    Workload,
    WorkloadError,
    cache_widths,
)
from quantization.schemes import FULL_PRECISION, Scheme
from quantization.units import Layout, Site, Unit, cache_slot

UNPACK_OPS = {"gguf": 6.0, "table": 8.0, "mixture": 8.0, "trellis": 10.0, "dialect": 12.0}
"""Lane instructions to turn one stored weight into a 16-bit number, by format family. Counted, not
measured: shift, mask, convert and multiply-add are the 4 of `UNPACK_OPS_PLAIN`; K-quants unpack
their scales too, tables and mixtures look up or gather; a trellis puts its state together from two words first."""
UNPACK_OPS_PLAIN = 4.0
REPACK_OPS = 2.0
"""The same, where products are computed on the stored integers and only their scales are applied."""
ELEMENTWISE_LAUNCHES = 4  # two norms with their residual sums, rotary embedding, gated activation
ROUTING_LAUNCHES = 2  # choose experts, gather tokens for them


@dataclass(frozen=True)
class Operator:
    """One kernel, or a few that always come together, on one rank.

    Args:
        unit: index of the unit whose scheme decides it, None for what no scheme decides.
        ops: operations, a multiply-add counting twice.
        weight_bytes: read from memory, as packed.
        activation_bytes: inputs read and outputs written.
        cache_bytes: of the KV cache, read and written.
        arithmetic: data type of the product.
        product: rows x columns of the output if it is a matrix product, which is cut into tiles.
        unpacking: lane instructions of the vector units for one pass over the weights.
        launches: kernels.
        link_bytes: sent to other ranks.
        collectives: exchanges between ranks.
    """

    name: str
    unit: int | None
    ops: float
    weight_bytes: float = 0.0
    activation_bytes: float = 0.0
    cache_bytes: float = 0.0
    arithmetic: Arithmetic = "bf16"
    product: tuple[float, float] | None = None
    unpacking: float = 0.0
    launches: float = 1.0
    link_bytes: float = 0.0
    collectives: int = 0

    @property
    def moved_bytes(self) -> float:
        """Everything that crosses the memory bus."""
        return self.weight_bytes + self.activation_bytes + self.cache_bytes


def unit_operators(
    index: int,
    unit: Unit,
    scheme: Scheme,
    geometry: Geometry,
    workload: Workload,
    phase: Phase,
    arithmetic: Arithmetic = "bf16",
    separate: bool = False,
) -> list[Operator]:
    """The products of one unit; none for an embedding that is only looked up.

    A tied embedding is a product once, as the head. The head sees one token of each sequence in
    both phases, since engines compute no other logits.

    `separate` makes a launch of every matrix instead of one of the fused unit.
    """
    if unit.kind == "cache":
        return [_kept(index, unit, scheme, geometry, workload, phase)]
    tokens = workload.batch * (1 if phase == "decode" else workload.prompt)
    # a tied head is the second site of the embedding's unit, and reads the same parameter
    sites = unit.sites[1:] if unit.kind == "embedding" else unit.sites
    if unit.kind in ("embedding", "head"):
        tokens = workload.batch
    if unit.kind == "experts":
        return [
            _expert_product(index, site, scheme, geometry, workload, phase, arithmetic)
            for site in sites
        ]
    groups = [(site,) for site in sites] if separate else [tuple(sites)] if sites else []
    return [
        _product(index, group, scheme, tokens, workload.tensor_parallel, arithmetic)
        for group in groups
    ]


def fixed(
    layout: Layout,
    geometry: Geometry,
    workload: Workload,
    phase: Phase,
    cache_bits: float | Sequence[float] = FULL_CACHE_BITS,
) -> list[Operator]:
    """The operators that no unit's scheme decides; `cache_bits` for all attending layers or each."""
    if phase not in PHASES:
        raise WorkloadError(f"unknown phase '{phase}'; phases are prefill and decode")
    tokens = workload.batch * (1 if phase == "decode" else workload.prompt)
    routed = any(unit.kind == "experts" for unit in layout.units)
    found = [
        # what no unit holds is read once: norms, biases, routers
        Operator("other", None, 0, weight_bytes=ELEMENT_BYTES * layout.other_numel, launches=0),
        Operator(
            "embedding", None, 0, activation_bytes=2 * tokens * geometry.hidden * ELEMENT_BYTES
        ),
        # the last norm, and choosing the next token among the logits
        Operator(
            "sample", None, 0, activation_bytes=workload.batch * geometry.vocab * 4, launches=2
        ),
    ]
    attending = [number for number, layer in enumerate(geometry.layers) if layer.heads]
    widths = dict(zip(attending, cache_widths(cache_bits, len(attending)), strict=True))
    for number, layer in enumerate(geometry.layers):
        if layer.heads:
            found.append(_attention(number, layer, workload, phase, widths[number] / 8))
        found.append(_elementwise(number, geometry, workload, tokens, routed))
        if workload.tensor_parallel > 1:
            found.append(_all_reduce(number, geometry, workload, tokens))
    return found


def _product(
    index: int,
    sites: tuple[Site, ...],
    scheme: Scheme,
    tokens: int,
    ranks: int,
    arithmetic: Arithmetic,
) -> Operator:
    """Sites that read the same input, as one product; a rank does its share of all of it.

    Either the inputs or the outputs of a matrix are divided between ranks, never both; dividing
    both understates the smaller of the two by at most its own bytes.
    """
    from quantization.formats import FORMATS

    rows, columns = sum(site.shape[-2] for site in sites), sites[0].shape[-1]
    numel = sum(site.numel for site in sites)
    return Operator(
        "+".join(site.name for site in sites),
        index,
        ops=2 * tokens * numel / ranks,
        weight_bytes=sum(FORMATS[scheme.weight].nbytes(site.shape) for site in sites) / ranks,
        activation_bytes=tokens * (columns + rows) * ELEMENT_BYTES / ranks,
        arithmetic=arithmetic,
        product=(tokens, rows / ranks),
        unpacking=numel * _unpack_ops(scheme, arithmetic) / ranks,
    )


def _expert_product(
    index: int,
    site: Site,
    scheme: Scheme,
    geometry: Geometry,
    workload: Workload,
    phase: Phase,
    arithmetic: Arithmetic,
) -> Operator:
    """The packed experts of one matrix: each token's k, of which decode reads only the distinct.

    With T tokens that choose k of E experts independently and evenly, E (1 - (1 - k/E)^T) are
    read; real routers are less even and read fewer.
    """
    from quantization.formats import FORMATS

    experts, rows, columns = site.shape
    active = min(geometry.experts_per_token or experts, experts)
    tokens = workload.batch * (1 if phase == "decode" else workload.prompt)
    ranks = workload.tensor_parallel
    read = float(experts)
    if phase == "decode":
        read = experts * (1 - (1 - active / experts) ** tokens)
    share = read / experts / ranks
    visits = tokens * active
    return Operator(
        site.name,
        index,
        ops=2 * visits * rows * columns / ranks,
        weight_bytes=FORMATS[scheme.weight].nbytes(site.shape) * share,
        activation_bytes=visits * (columns + rows) * ELEMENT_BYTES / ranks,
        arithmetic=arithmetic,
        product=(visits / read, rows / ranks),
        unpacking=prod(site.shape) * share * _unpack_ops(scheme, arithmetic),
    )


def _attention(
    number: int, layer: LayerGeometry, workload: Workload, phase: Phase, element_bytes: float
) -> Operator:
    """Scores and values of one layer; query heads share the cache of their key-value head.

    Decode reads the cache of `kv_heads` once for all queries. Prefill (FlashAttention, Dao 2023)
    keeps scores on chip, reads and writes keys and values once, and sees only the past.
    """
    window = layer.window or workload.context
    width = layer.head_dim + layer.value_dim
    ranks = workload.tensor_parallel
    heads = ceil(layer.heads / ranks)
    kept = layer.cache_elements * ceil(layer.kv_heads / ranks) / layer.kv_heads * element_bytes
    if phase == "decode":
        seen = min(workload.context, window)
        pairs, queries = seen, 1
        cache = kept * (seen + 1)
    else:
        prompt = workload.prompt
        seen = min(prompt, layer.window or prompt)
        pairs = seen * (seen + 1) // 2 + (prompt - seen) * seen
        queries = prompt
        cache = kept * prompt * 2
    return Operator(
        f"attention.{number}",
        None,
        ops=2 * workload.batch * heads * width * pairs,
        activation_bytes=workload.batch * queries * heads * width * ELEMENT_BYTES,
        cache_bytes=workload.batch * cache,
    )


def _kept(
    index: int, unit: Unit, scheme: Scheme, geometry: Geometry, workload: Workload, phase: Phase
) -> Operator:
    """Reading a cache for a token, and writing its row; in prefill both, once for all tokens."""
    from quantization.formats import FORMATS

    moved = 0.0
    for site in unit.sites:
        layer = geometry.layers[cache_slot(site)[0]]
        if phase == "decode":
            tokens = min(workload.context, layer.window or workload.context) + 1
        else:
            tokens = 2 * workload.prompt
        heads, width = site.shape
        moved += FORMATS[scheme.weight].nbytes((tokens * heads, width))
    share = moved / workload.tensor_parallel
    return Operator(f"cache.{index}", None, ops=0, cache_bytes=workload.batch * share, launches=0)


def _elementwise(
    number: int, geometry: Geometry, workload: Workload, tokens: int, routed: bool
) -> Operator:
    """Norms with residual sums (each reads two and writes two), rotary embedding, gate times up."""
    layer, ranks = geometry.layers[number], workload.tensor_parallel
    rotary = 2 * (layer.heads + layer.kv_heads) * layer.head_dim / ranks
    numbers = 8 * geometry.hidden + rotary + 3 * geometry.intermediate / ranks
    return Operator(
        f"elementwise.{number}",
        None,
        ops=0,
        activation_bytes=tokens * numbers * ELEMENT_BYTES,
        launches=ELEMENTWISE_LAUNCHES + (ROUTING_LAUNCHES if routed else 0),
    )


def _all_reduce(number: int, geometry: Geometry, workload: Workload, tokens: int) -> Operator:
    """Two sums over ranks a layer (Megatron-LM, Shoeybi et al. 2019), each around a ring.

    Every rank sends 2 (n - 1) / n of the tensor (Patarasuk and Yuan 2009).
    """
    ranks = workload.tensor_parallel
    tensor = tokens * geometry.hidden * ELEMENT_BYTES
    return Operator(
        f"all_reduce.{number}",
        None,
        ops=0,
        launches=0,
        link_bytes=2 * 2 * (ranks - 1) / ranks * tensor,
        collectives=2,
    )


def _unpack_ops(scheme: Scheme, arithmetic: Arithmetic) -> float:
    from quantization.formats import FORMATS

    if scheme.weight == FULL_PRECISION:
        return 0.0
    family = FORMATS[scheme.weight].family.split("+")[0]
    if arithmetic in ("bf16", "fp16", "fp32", "tf32"):
        return UNPACK_OPS.get(family, UNPACK_OPS_PLAIN)
    return REPACK_OPS if family == "gguf" else 0.0  # others multiply what is stored

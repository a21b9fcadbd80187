"""Sites, units and layouts: what of a model can be chosen, as plain data (no torch).

A *site* is one parameter that is multiplied with activations; a *unit* is the sites that must
share a scheme, the decision variable of the search; a *layout* is a whole model's.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any, Literal

from quantization.errors import ModelError

KEYS, VALUES = "k_cache", "v_cache"
EXPERTS_PER_TOKEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_top_k",
    "moe_topk",
    "top_k_experts",
    "experts_per_token",
)
"""What configurations call how many experts a token goes to."""
Slot = tuple[int, str]
"""Where a layer's past is kept: its index, and `KEYS` or `VALUES`."""
UnitKind = Literal["linear", "experts", "embedding", "head", "cache"]
CacheSharing = Literal["apart", "layers", "kinds", "all"]
"""What of a KV cache has one format: each layer's keys and values apart, each layer's together, all
keys and all values, or everything."""


@dataclass(frozen=True)
class Site:
    """One parameter.

    Args:
        name: the module's path; for packed experts, which have no module each, the parameter's.
        parameter: its name in the state dict; empty for a cache, which is no parameter.
        shape: rows x columns (outputs x inputs), packed experts with their number in front; of a
            cache what a token adds to it, heads x numbers.
        transposed: whether the checkpoint stores inputs before outputs; `shape` never does.
    """

    name: str
    parameter: str
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def numel(self) -> int:
        """Number of weights."""
        return prod(self.shape)


@dataclass(frozen=True)
class Unit:
    """Sites that share one scheme.

    Args:
        layer: index of the decoder block, None outside the blocks.
        active: of packed experts, how many a token goes to; None where it isn't known.
    """

    name: str
    kind: UnitKind
    sites: tuple[Site, ...]
    layer: int | None = None
    active: int | None = None

    @property
    def numel(self) -> int:
        """Number of weights, a tied parameter counted once; a cache has none."""
        return sum(site.numel for site in self.stored)

    @property
    def stored(self) -> tuple[Site, ...]:
        """The sites whose parameters are stored: a tied embedding and head are stored once."""
        if self.kind == "cache":
            return ()
        return tuple({site.parameter: site for site in self.sites}.values())

    @property
    def matrices(self) -> tuple[Site, ...]:
        """What takes bytes: the stored parameters, or of a cache what a token adds to it."""
        return self.sites if self.kind == "cache" else self.stored


@dataclass(frozen=True)
class Kept:
    """A layer that stays in full precision because the adapter couldn't place it."""

    name: str
    reason: str
    numel: int


@dataclass(frozen=True)
class CacheLayer:
    """What one layer keeps of the past.

    Args:
        elements: numbers a token (keys and values).
        window: how many tokens are kept; None for all.
        block: the decoder block's index; None in layouts that were stored without.
        keys: heads x numbers that a token adds to the keys.
        values: the same of the values.
    """

    elements: int
    window: int | None = None
    block: int | None = None
    keys: tuple[int, int] | None = None
    values: tuple[int, int] | None = None


@dataclass(frozen=True)
class Layout:
    """A model's units and everything else that it stores.

    Args:
        units: in the order of the forward pass, embedding first, head last (unless tied).
        kept: layers that weren't placed, by name and reason.
        other_numel: parameters outside units (norms, biases, `kept`) and buffers of the checkpoint; stored
            in bf16.
        cache: the layers' KV caches; empty if the model could not be traced.
    """

    units: tuple[Unit, ...]
    kept: tuple[Kept, ...]
    other_numel: int
    cache: tuple[CacheLayer, ...] = ()

    def split(self) -> "Layout":
        """The same model decided site by site, for engines that fuse nothing; tied ones stay one."""
        found: list[Unit] = []
        for unit in self.units:
            alone = [replace(unit, name=site.name, sites=(site,)) for site in unit.sites]
            found += alone if len(unit.stored) > 1 else [unit]
        return replace(self, units=tuple(found))

    @property
    def knows_caches(self) -> bool:
        """Whether it is known what each layer keeps of the past, and of which block that is."""
        known = {unit.layer for unit in self.units} - {None}
        return bool(self.cache) and all(layer.block in known for layer in self.cache)

    def with_caches(self, sharing: CacheSharing) -> "Layout":
        """The same model whose KV caches are units too, behind those of its weights.

        Raises:
            ModelError: what its layers keep of the past is unknown.
        """
        if not self.knows_caches:
            raise ModelError(
                "this model's KV cache is unknown (its forward pass could not be traced), so no "
                "format can be chosen for it; leave the cache out of the menu"
            )
        paths = {unit.layer: block_path(unit) for unit in self.units}
        groups: dict[tuple[str, int | None], list[Site]] = {}
        for layer in self.cache:
            path = paths[layer.block]
            for kind, shape in ((KEYS, layer.keys), (VALUES, layer.values)):
                if shape:
                    name = {
                        "apart": f"{path}.{kind}", "layers": f"{path}.kv_cache",
                        "kinds": kind, "all": "kv_cache",
                    }[sharing]  # fmt: skip
                    block = layer.block if sharing in ("apart", "layers") else None
                    own = Site(f"{path}.{kind}", "", shape)
                    groups.setdefault((name, block), []).append(own)
        caches = (Unit(name, "cache", tuple(own), b) for (name, b), own in groups.items())
        return replace(self, units=(*self.units, *caches))

    @property
    def weights(self) -> tuple[Unit, ...]:
        """The units of weights."""
        return tuple(unit for unit in self.units if unit.kind != "cache")

    def to_json(self) -> dict[str, Any]:
        """Plain data for the store; `from_json` undoes it."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Layout":
        """Undo `to_json`."""
        return cls(
            units=tuple(
                Unit(
                    name=unit["name"],
                    kind=unit["kind"],
                    layer=unit["layer"],
                    active=unit.get("active"),
                    sites=tuple(
                        Site(**{**site, "shape": tuple(site["shape"])}) for site in unit["sites"]
                    ),
                )
                for unit in data["units"]
            ),
            kept=tuple(Kept(**kept) for kept in data["kept"]),
            other_numel=data["other_numel"],
            cache=tuple(_cache_layer(layer) for layer in data["cache"]),
        )


def _cache_layer(data: dict[str, Any]) -> CacheLayer:
    shapes = {name: tuple(data[name]) for name in ("keys", "values") if data.get(name)}
    return CacheLayer(**{**data, **shapes})


def unit_name(sites: Iterable[str]) -> str:
    """A readable name for fused sites: `model.layers.0.mlp.gate_proj+up_proj`."""
    names = list(sites)
    parent = names[0].rpartition(".")[0]
    if len(names) == 1 or any(name.rpartition(".")[0] != parent for name in names):
        return "+".join(names)
    return f"{parent}.{'+'.join(name.rpartition('.')[2] for name in names)}"


def cache_slot(site: Site) -> Slot:
    """The slot of a cache's site: `model.layers.3.k_cache` is the keys of layer 3."""
    path, _, kind = site.name.rpartition(".")
    return int(path.rpartition(".")[2]), kind


def block_path(unit: Unit) -> str | None:
    """The path of the decoder block that the unit is in: `model.layers.0`."""
    if unit.layer is None:
        return None
    parts = unit.sites[0].name.split(".")  # a cache is called like its block, too
    return ".".join(parts[: parts.index(str(unit.layer)) + 1])

"""Sites, units and layouts: what of a model can be chosen, as plain data (no torch).

A *site* is one parameter that is multiplied with activations; a *unit* is the sites that must
share a scheme, the decision variable of the search; a *layout* is a whole model's.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any, Literal

UnitKind = Literal["linear", "experts", "embedding", "head"]


@dataclass(frozen=True)
class Site:
    """One parameter.

    Args:
        name: the module's path; for packed experts, which have no module each, the parameter's.
        parameter: its name in the state dict.
        shape: rows x columns (outputs x inputs), packed experts with their number in front.
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
    """

    name: str
    kind: UnitKind
    sites: tuple[Site, ...]
    layer: int | None = None

    @property
    def numel(self) -> int:
        """Number of weights, a tied parameter counted once."""
        return sum({site.parameter: site.numel for site in self.sites}.values())

    @property
    def stored(self) -> tuple[Site, ...]:
        """The sites whose parameters are stored: a tied embedding and head are stored once."""
        return tuple({site.parameter: site for site in self.sites}.values())


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
    """

    elements: int
    window: int | None = None


@dataclass(frozen=True)
class Layout:
    """A model's units and everything else that it stores.

    Args:
        units: in the order of the forward pass, embedding first, head last (unless tied).
        kept: layers that weren't placed, by name and reason.
        other_numel: parameters outside units: norms, biases, `kept`; stored in bf16.
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
            alone = [Unit(site.name, unit.kind, (site,), unit.layer) for site in unit.sites]
            found += alone if len(unit.stored) > 1 else [unit]
        return replace(self, units=tuple(found))

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
                    sites=tuple(
                        Site(**{**site, "shape": tuple(site["shape"])}) for site in unit["sites"]
                    ),
                )
                for unit in data["units"]
            ),
            kept=tuple(Kept(**kept) for kept in data["kept"]),
            other_numel=data["other_numel"],
            cache=tuple(CacheLayer(**layer) for layer in data["cache"]),
        )


def unit_name(sites: Iterable[str]) -> str:
    """A readable name for fused sites: `model.layers.0.mlp.gate_proj+up_proj`."""
    names = list(sites)
    parent = names[0].rpartition(".")[0]
    if len(names) == 1 or any(name.rpartition(".")[0] != parent for name in names):
        return "+".join(names)
    return f"{parent}.{'+'.join(name.rpartition('.')[2] for name in names)}"


def block_path(unit: Unit) -> str | None:
    """The path of the decoder block that the unit is in: `model.layers.0`."""
    if unit.layer is None:
        return None
    parts = unit.sites[0].name.split(".")
    return ".".join(parts[: parts.index(str(unit.layer)) + 1])

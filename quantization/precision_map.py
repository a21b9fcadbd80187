"""Precision maps: unit to scheme, the product's output, as JSON with a content hash.

No torch here: maps are read, compared and written by commands that answer at once.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from quantization.errors import ModelError
from quantization.schemes import Scheme
from quantization.units import Layout


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SchemeEntry(_Closed):
    """A scheme, spelled out."""

    weight: str
    activation: str


class UnitEntry(_Closed):
    """The sites of one unit and the scheme that they share.

    Args:
        kind: whether the sites are matrices, or keys and values of a KV cache.
    """

    name: str
    sites: tuple[str, ...]
    scheme: SchemeEntry
    kind: Literal["weights", "cache"] = "weights"


class KeptEntry(_Closed):
    """A layer outside the search that stays in full precision, and why."""

    name: str
    reason: str


class ModelEntry(_Closed):
    """Which model a map is for."""

    name: str
    weights_hash: str
    revision: str | None = None


class PrecisionMap(_Closed):
    """The document: `map_hash` covers what is stored how, not who found it."""

    schema_version: Literal[1] = 1
    map_hash: str
    model: ModelEntry
    units: tuple[UnitEntry, ...]
    kept: tuple[KeptEntry, ...] = ()
    provenance: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_hash(self) -> "PrecisionMap":
        found = content_hash(
            {s: f"{u.scheme.weight}/{u.scheme.activation}" for u in self.units for s in u.sites}
        )
        if found != self.map_hash:
            raise ValueError(
                f"map_hash is {self.map_hash} but the units hash to {found}: "
                "the file was edited; remove it and export again"
            )
        return self

    @property
    def weights(self) -> tuple[UnitEntry, ...]:
        """The units of weights."""
        return tuple(unit for unit in self.units if unit.kind == "weights")

    @property
    def caches(self) -> dict[str, str]:
        """The format of each site of the KV cache that the map speaks of."""
        own = (unit for unit in self.units if unit.kind == "cache")
        return {site: unit.scheme.weight for unit in own for site in unit.sites}

    @property
    def schemes(self) -> list[Scheme]:
        """The schemes, one a unit."""
        return [Scheme(unit.scheme.weight, unit.scheme.activation) for unit in self.units]

    def to_json(self) -> str:
        """The text of `precision_map.json`."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> "PrecisionMap":
        """Read and check a file; raises `ModelError` with what is wrong."""
        try:
            return cls.model_validate_json(path.read_text())
        except (OSError, ValueError) as error:
            raise ModelError(f"'{path}' is not a precision map: {error}") from error


def content_hash(site_schemes: dict[str, str]) -> str:
    """SHA-256 over (site, scheme) pairs, so that it doesn't depend on how sites were grouped."""
    return hashlib.sha256(json.dumps(sorted(site_schemes.items())).encode()).hexdigest()


def map_hash(layout: Layout, schemes: Sequence[tuple[str, str]]) -> str:
    """The content hash of (weight, activation) formats, one pair a unit."""
    return content_hash(
        {
            site.name: f"{weight}/{activation}"
            for unit, (weight, activation) in zip(layout.units, schemes, strict=True)
            for site in unit.sites
        }
    )


def build_map(
    layout: Layout,
    schemes: Sequence[tuple[str, str]],
    model: ModelEntry,
    provenance: dict[str, Any],
) -> PrecisionMap:
    """The document for (weight, activation) formats, one pair a unit of the layout."""
    return PrecisionMap(
        map_hash=map_hash(layout, schemes),
        model=model,
        units=tuple(
            UnitEntry(
                name=unit.name,
                sites=tuple(site.name for site in unit.sites),
                scheme=SchemeEntry(weight=weight, activation=activation),
                kind="cache" if unit.kind == "cache" else "weights",
            )
            for unit, (weight, activation) in zip(layout.units, schemes, strict=True)
        ),
        kept=tuple(KeptEntry(name=kept.name, reason=kept.reason) for kept in layout.kept),
        provenance=provenance,
    )

"""What files call a model's matrices: transformers merges and renames some of them on the way in.

Experts lie one by one in files, their gates apart from their ups; in the model a layer's are one
parameter. What loads such files goes by their names, so all of the model gets those. The numbers of a
parameter's rows are sent the way back that transformers sends weights when it saves a model: where they
come out says what the files hold.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from quantization.formats import Packed
from quantization.units import Layout, Site

EXPERTS = 3
"""Dimensions of packed ones."""
ANY = "*"
"""Stands for the numbers of all experts in names of modules."""
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


@dataclass(frozen=True)
class Place:
    """A matrix of the files.

    Args:
        name: of its tensor.
        expert: whose it is; None where it is all experts', or the parameter has none.
        start: of an expert's rows in the parameter, the first one that it holds.
        rows: how many; 0 for all.
    """

    name: str
    expert: int | None = None
    start: int = 0
    rows: int = 0

    @property
    def module(self) -> str:
        """The module whose weight it is."""
        return self.name.removesuffix(".weight")

    def of(self, whole: Tensor) -> Tensor:
        """Its part of a parameter, or of what a packed one keeps for each row or each expert."""
        own = whole if self.expert is None else whole[self.expert]
        if not self.rows or own.shape[-2] == 1:
            return own
        return own[..., self.start : self.start + self.rows, :]

    def packed(self, whole: Packed) -> Packed:
        """Its part of a packed parameter."""
        parts = {name: self.of(tensor) for name, tensor in whole.tensors.items()}
        # a scale of all rows goes into several matrices, and files want no tensor twice
        tensors = {n: t.clone() if self.rows and t.shape[-2] == 1 else t for n, t in parts.items()}
        leading = whole.shape[:-2] if self.expert is None else ()
        rows = self.rows or whole.shape[-2]
        return Packed(whole.format, (*leading, rows, whole.shape[-1]), tensors)


Places = Mapping[str, tuple[Place, ...]]
"""Of each parameter and buffer that files hold otherwise than the model, or under another name."""


def places_of(module: Any) -> Places:
    """Where the files of a mixture of experts have its parameters; nothing for other models.

    Without experts to take apart the model's own names stay: transformers matches configurations by them.

    Args:
        module: a model of transformers; on the meta device will do.
    """
    if not any(parameter.dim() == EXPERTS for parameter in module.parameters()):
        return {}
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # releases before 5 convert nothing
        return {}
    found: dict[str, tuple[Place, ...]] = {}
    saved = module.state_dict().keys()
    buffers = [(name, buffer) for name, buffer in module.named_buffers() if name in saved]
    for name, parameter in [*module.named_parameters(), *buffers]:
        *experts, rows = parameter.shape[:-1] if parameter.dim() > 1 else (parameter.numel(),)
        numbers = torch.arange(prod([*experts, rows])).reshape(*experts, rows, 1)
        try:
            sent = revert_weight_conversion(module, {name: numbers})
        except Exception:  # noqa: S112 -- other people's operations, some of which want more than this one
            continue
        places = tuple(_place(n, t.flatten(), experts, rows) for n, t in sent.items())
        if None not in places and places != (Place(name),):
            found[name] = places  # type: ignore[assignment]
    counts = Counter(place.name for places in found.values() for place in places)
    alone = {n: p for n, p in found.items() if all(counts[place.name] == 1 for place in p)}
    split = any(place.expert is not None for places in alone.values() for place in places)
    return alone if split else {}


def _place(name: str, numbers: Tensor, experts: list[int], rows: int) -> Place | None:
    """What rows these are; None if they don't follow each other within one expert."""
    first, count = int(numbers[0]), len(numbers)
    if not torch.equal(numbers, torch.arange(first, first + count)):
        return None
    if not experts:
        return Place(name) if count == rows else None
    inside = first % rows + count <= rows
    return Place(name, first // rows, first % rows, count) if inside else None


def places_in(places: Places, parameter: str) -> tuple[Place, ...]:
    """Those of a parameter."""
    return places.get(parameter) or (Place(parameter),)


def as_files_call(layout: Layout, places: Places) -> Layout:
    """The layout with the names of modules that files have, those of all experts as one with `*`."""

    def of(site: Site) -> tuple[Site, ...]:
        if site.parameter not in places:
            return (site,)
        names = dict.fromkeys(_EXPERT.sub(ANY, p.module) for p in places[site.parameter])
        return tuple(replace(site, name=name) for name in names)

    units = tuple(replace(u, sites=tuple(s for x in u.sites for s in of(x))) for u in layout.units)
    kept = tuple(
        replace(k, name=places_in(places, f"{k.name}.weight")[0].module) for k in layout.kept
    )
    return replace(layout, units=units, kept=kept)


def any_expert(name: str) -> str:
    """A regular expression for the module's name of every expert, of a name with `*`."""
    return re.escape(name).replace(re.escape(ANY), r"\d+")

"""What a menu allows: which schemes each unit may get, how many formats a map, how much is left alone."""

from collections.abc import Sequence
from fnmatch import fnmatch

import numpy as np
from numpy.typing import NDArray

from bitfront.config import ConfigError, Menu
from engines import Rules
from quantization.schemes import FULL_PRECISION, Scheme
from quantization.units import Layout, Unit
from search.problem import FewFormats, Ints, changed

KINDS = ("cache", "embedding", "experts", "head", "linear")
CHANGED = "changed_units"


def choices(
    layout: Layout, menu: Menu, engine: Rules | None = None
) -> tuple[tuple[Scheme, ...], ...]:
    """The schemes that each unit may get; where an engine is to serve them, those that it can.

    Raises:
        ConfigError: a pattern that matches nothing, or a unit that nothing is left for.
    """
    _check_patterns(layout, menu)
    schemes = [Scheme.parse(name) for name in dict.fromkeys(menu.schemes)]
    pasts = [Scheme.parse(name) for name in dict.fromkeys(menu.cache)]
    _check_caches(pasts)
    pins = {pattern: Scheme.parse(name) for pattern, name in menu.pinned.items()}
    bans = {p: {Scheme.parse(name) for name in names} for p, names in menu.forbidden.items()}
    found = tuple(
        _choices(unit, pasts if unit.kind == "cache" else schemes, pins, bans)
        for unit in layout.units
    )
    return tuple(_served(u, row, engine) for u, row in zip(layout.units, found, strict=True))


def _check_caches(schemes: Sequence[Scheme]) -> None:
    """Refuse formats that no KV cache can be kept in, whatever its shape."""
    from evaluation.caches import keeps

    for scheme in schemes:
        if scheme.activation != FULL_PRECISION:
            raise ConfigError(
                f"a KV cache has one format, and '{scheme.name}' is one of weights with activations; "
                f"give {scheme.weight} alone"
            )
        if not keeps(scheme.weight):
            raise ConfigError(
                f"no KV cache can be kept in {scheme.name}, which doesn't round each token's row by "
                "itself; there are integers such as int8-g32 and int4-channel, fp8-e4m3, mxfp8, "
                "nf4-g64 and llama.cpp's gguf-q8_0 to gguf-q4_0"
            )


def _served(unit: Unit, schemes: tuple[Scheme, ...], engine: Rules | None) -> tuple[Scheme, ...]:
    """Those that the engine serves."""
    if engine is None:
        return schemes
    reasons = {scheme: engine.unit_refusal(unit, scheme) for scheme in schemes}
    served = tuple(scheme for scheme, why in reasons.items() if why is None)
    # a cache that can only stay as it is was not what was asked for
    if not served or (unit.kind == "cache" and len(served) < min(2, len(schemes))):
        why = next(why for why in reasons.values() if why)
        raise ConfigError(f"{engine.name} serves no scheme of the menu for {unit.name}: {why}")
    return served


def why_not(layout: Layout, menu: Menu, engine: Rules | None) -> str | None:
    """Why an engine serves nothing of a menu but full precision, by the first unit of a block."""
    unit = next((unit for unit in layout.units if unit.layer is not None), None)
    if engine is None or unit is None:
        return None
    reasons = (engine.unit_refusal(unit, Scheme.parse(name)) for name in menu.schemes)
    why = next((why for why in reasons if why), None)
    return f" ({unit.name}: {why})" if why else None


def _choices(
    unit: Unit,
    schemes: Sequence[Scheme],
    pins: dict[str, Scheme],
    bans: dict[str, set[Scheme]],
) -> tuple[Scheme, ...]:
    """A pinned unit's only scheme, or those of the menu that apply to its shapes."""
    from quantization.formats import FORMATS

    for pattern, scheme in pins.items():
        if _matches(pattern, unit):
            _check_caches([scheme] if unit.kind == "cache" else [])
            return (scheme,)
    banned = {s for pattern, names in bans.items() if _matches(pattern, unit) for s in names}
    fitting = tuple(
        scheme
        for scheme in schemes
        if scheme not in banned
        and not any(FORMATS[scheme.weight].refusal(site.shape) for site in unit.matrices)
        and _reads(unit, scheme)
    )
    if not fitting:
        but = f", forbidden ones left out ({', '.join(sorted(s.name for s in banned))})"
        raise ConfigError(
            f"no scheme of the menu applies to {unit.name} {unit.sites[0].shape}"
            f"{but if banned else ''}; add one, or pin the unit to bf16"
        )
    return fitting


def _reads(unit: Unit, scheme: Scheme) -> bool:
    """Whether what a unit's layers read can be quantized like that as it comes."""
    from quantization.activations import ACTIVATIONS

    if scheme.activation == FULL_PRECISION:
        return True
    if unit.kind != "linear":  # experts are picked inside their kernels, heads are ours
        return False
    format = ACTIVATIONS[scheme.activation]
    return not any(format.refusal((1, site.shape[-1])) for site in unit.sites)


def _matches(pattern: str, unit: Unit) -> bool:
    return pattern == unit.kind or any(fnmatch(site.name, pattern) for site in unit.sites)


def _check_patterns(layout: Layout, menu: Menu) -> None:
    """Refuse a pin that matches nothing: it would open what it was meant to protect."""
    names = [site.name for unit in layout.units for site in unit.sites]
    for verb, patterns in (("pins", menu.pinned), ("forbids schemes for", menu.forbidden)):
        for pattern in patterns:
            if pattern not in KINDS and not any(fnmatch(name, pattern) for name in names):
                raise ConfigError(
                    f"the menu {verb} '{pattern}', which is no kind of unit ({', '.join(KINDS)}) "
                    f"and matches no site such as '{names[-1]}'"
                )


def few_formats(menu: Menu, columns: Sequence[Scheme]) -> FewFormats | None:
    """The cap on formats; full precision needs no kernel and isn't counted, nor what only caches have."""
    if menu.most_formats is None:
        return None
    formats = list(dict.fromkeys(scheme.weight for scheme in columns))
    stored = {name.partition("/")[0] for name in (*menu.schemes, *menu.pinned.values())}
    of = [
        -1 if s.weight == FULL_PRECISION or s.weight not in stored else formats.index(s.weight)
        for s in columns
    ]
    return FewFormats(np.array(of), menu.most_formats)


def changes(
    menu: Menu, columns: Sequence[Scheme], offered: NDArray[np.bool_]
) -> tuple[Ints, int] | None:
    """What changing a unit counts (units x schemes), and the most units that may be changed.

    Raises:
        ConfigError: more units must be left alone than can be.
    """
    if not menu.left_alone:
        return None
    alone = [i for i, s in enumerate(columns) if s.exact]
    open_ = offered.sum(axis=1) > 1
    able = int((open_ & offered[:, alone].any(axis=1)).sum()) if alone else 0
    wanted = int(np.ceil(menu.left_alone * open_.sum() - 1e-9))
    if able < wanted:
        raise ConfigError(
            f"left_alone: {menu.left_alone:g} of {open_.sum()} units are {wanted} in full precision, "
            f"and {able} may be; add bf16 to the menu's schemes"
        )
    table = np.where(open_[:, None], changed(offered, alone), 0)
    return table, int(open_.sum()) - wanted

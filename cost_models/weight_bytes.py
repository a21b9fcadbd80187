"""Weight bytes: exact, scales, zero points and padding included. Template for a cost model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.base import Rules
from quantization.formats import FORMATS
from quantization.schemes import FULL_PRECISION, Scheme
from quantization.units import Layout, Unit

RESOURCE = "weight_bytes"


def unit_bytes(unit: Unit, scheme: Scheme, engine: Rules | None = None) -> int:
    """Bytes of a unit's packed tensors; tied parameters are stored once."""
    if engine and engine.unit_refusal(unit, scheme) is None:
        return sum(engine.site_nbytes(scheme, site) for site in unit.stored)
    return sum(FORMATS[scheme.weight].nbytes(site.shape) for site in unit.stored)


def table(layout: Layout, menu: Sequence[Scheme], engine: Rules | None = None) -> NDArray[np.int64]:
    """Units x schemes; an engine's bytes where there is one. A map's total adds `other_bytes`."""
    rows = [[unit_bytes(unit, scheme, engine) for scheme in menu] for unit in layout.units]
    return np.array(rows)


def other_bytes(layout: Layout, engine: Rules | None = None, config: Any = None) -> int:
    """What no unit holds: norms, biases and layers that weren't placed, in full precision.

    Args:
        layout: the model's.
        engine: whose file is counted; our own packed tensors without one.
        config: the model's transformers configuration, which some engines count by.
    """
    if engine:
        return engine.other_bytes(layout, config)
    return FORMATS[FULL_PRECISION].nbytes((layout.other_numel,)) if layout.other_numel else 0

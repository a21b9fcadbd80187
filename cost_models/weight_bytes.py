"""Weight bytes: exact, scales, zero points and padding included. Template for a cost model."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from quantization.formats import FORMATS
from quantization.schemes import FULL_PRECISION, Scheme
from quantization.units import Layout, Unit

RESOURCE = "weight_bytes"


def unit_bytes(unit: Unit, scheme: Scheme) -> int:
    """Bytes of a unit's packed tensors; tied parameters are stored once."""
    return sum(FORMATS[scheme.weight].nbytes(site.shape) for site in unit.stored)


def table(layout: Layout, menu: Sequence[Scheme]) -> NDArray[np.int64]:
    """Units x schemes. A map's total is its sum plus `other_bytes`."""
    return np.array([[unit_bytes(unit, scheme) for scheme in menu] for unit in layout.units])


def other_bytes(layout: Layout) -> int:
    """What no unit holds: norms, biases and layers that weren't placed, in full precision."""
    return FORMATS[FULL_PRECISION].nbytes((layout.other_numel,)) if layout.other_numel else 0

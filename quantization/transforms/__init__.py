"""The transforms that a job can name. A new one is a file beside these and a line below."""

from quantization.registry import Registry
from quantization.transforms.awq import AWQ
from quantization.transforms.base import Transform
from quantization.transforms.smoothquant import SmoothQuant

TRANSFORMS: Registry[Transform] = Registry("transform")
for _transform in (AWQ(), SmoothQuant()):
    TRANSFORMS.add(_transform.name, _transform)

__all__ = ["TRANSFORMS", "Transform"]

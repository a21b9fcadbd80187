"""How much loss each unit suffers under each scheme; one estimator a file, one registry line."""

from quantization.registry import Registry
from sensitivity.base import Estimator, RawTable, Share, menu, merge
from sensitivity.fisher import DiagonalFisher
from sensitivity.output_error import OutputError

ESTIMATORS: Registry[Estimator] = Registry("estimator")
for _estimator in (OutputError(), DiagonalFisher()):
    ESTIMATORS.add(_estimator.name, _estimator)

__all__ = ["ESTIMATORS", "Estimator", "RawTable", "Share", "menu", "merge"]

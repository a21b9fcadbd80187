"""How much loss each unit suffers under each scheme; one estimator a file, one registry line."""

from quantization.registry import Registry
from sensitivity.base import Estimator, Experts, RawTable, Share, menu, merge
from sensitivity.context_marginal import ContextMarginal
from sensitivity.correction import MeasuredMap
from sensitivity.fisher import DiagonalFisher
from sensitivity.flips import Flips
from sensitivity.gradient import Gradient
from sensitivity.hessian_trace import HessianTrace
from sensitivity.higgs import HIGGS
from sensitivity.kl_fisher import KLFisher, gaussian_kl_fisher
from sensitivity.measured_maps import MeasuredMaps
from sensitivity.mixllm import MixLLM
from sensitivity.output_error import OutputError
from sensitivity.row_fisher import RowFisher
from sensitivity.shapley import ProgressiveShapley
from sensitivity.weight_error import WeightError
from sensitivity.work import Work

ESTIMATORS: Registry[Estimator] = Registry("estimator")
for _estimator in (
    OutputError(),
    DiagonalFisher(),
    DiagonalFisher(quantized=True),
    RowFisher(),
    KLFisher(),
    gaussian_kl_fisher(),
    MixLLM(),
    Gradient(),
    HessianTrace(),
    HIGGS(),
    Flips(quantized=False),
    Flips(quantized=True),
    ContextMarginal(),
    ProgressiveShapley(),
    MeasuredMaps(),
    WeightError(),
):
    ESTIMATORS.add(_estimator.name, _estimator)

__all__ = [
    "ESTIMATORS",
    "Estimator",
    "Experts",
    "MeasuredMap",
    "RawTable",
    "Share",
    "Work",
    "menu",
    "merge",
]

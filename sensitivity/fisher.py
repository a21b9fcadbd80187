"""Diagonal Fisher: the second-order KL of a perturbation, correlations between weights ignored.

    score = 1/2 sum_i F_ii dW_i^2,   F_ii = E[ (d log p(y) / d w_i)^2 ],   y sampled from the model

At the unquantized model KL(p || q) has zero gradient and the Fisher matrix as its Hessian, so with
all of F the score would be the loss itself to second order. Labels must be the model's own samples:
then the scores of different tokens are uncorrelated, and the square of a whole chunk's gradient
is an unbiased sum over its tokens; with the text's labels it is neither.

A quantized model is curved otherwise than the unquantized one. `fisher-quantized` takes the matrix
F at the model with each unit in the middle of its schemes, for what a map there loses.
"""

from torch import Tensor

from sensitivity.weight_gradients import WeightGradient


class DiagonalFisher(WeightGradient):
    """Diagonal Fisher times squared error. Template for an estimator from gradients by weights."""

    revision = 2  # other seeds, and experts apart
    unit = "nats per token, to second order, diagonal"

    def __init__(self, *, quantized: bool = False) -> None:
        self.quantized = quantized
        self.name = "fisher-quantized" if quantized else "fisher"

    def contract(self, errors_SRC: Tensor, gradients_PRC: Tensor) -> Tensor:
        """Sums of g^2 dW^2."""
        return errors_SRC.square().flatten(1) @ gradients_PRC.square().flatten(1).T

    def total(self, contracted_SP: Tensor) -> Tensor:
        """See the module."""
        return 0.5 * contracted_SP.sum(-1) / self.probes

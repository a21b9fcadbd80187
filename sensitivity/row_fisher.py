"""Row Fisher: between `fisher` and `kl-fisher`, with correlations kept within an output channel.

    score = 1/2 sum_r ( sum_c g_rc dW_rc )^2

The Fisher matrix with blocks of one row each. A quantizer's errors in a row add up in one output,
which the diagonal doesn't see; and a sum over thousands of rows is far less noisy than the one
square of `kl-fisher`.
"""

import torch
from torch import Tensor

from sensitivity.weight_gradients import WeightGradient


class RowFisher(WeightGradient):
    """Squared inner products of gradients and errors, row by row."""

    name = "row-fisher"
    unit = "nats per token, to second order, output channels apart"

    def contract(self, errors_SRC: Tensor, gradients_PRC: Tensor) -> Tensor:
        """Sums over rows of squared inner products."""
        return torch.einsum("src,prc->rsp", errors_SRC, gradients_PRC).square_().sum(0)

    def total(self, contracted_SP: Tensor) -> Tensor:
        """See the module."""
        return 0.5 * contracted_SP.sum(-1) / self.probes

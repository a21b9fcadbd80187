"""MixLLM: the loss to first and second order in each output channel's error, by the text's labels.

    S1 = sum_c g_rc dW_rc        score = sum_r mean over samples | S1 + 1/2 S1^2 |

(arXiv 2412.14590, equation 5; g is the gradient of a sample's mean loss, a chunk being a sample.)
The text's labels, not the model's, so the first-order term doesn't vanish on average.
"""

import torch
from torch import Tensor

from evaluation.passes import Probe, text_labels
from sensitivity.weight_gradients import WeightGradient


class MixLLM(WeightGradient):
    """The blocked empirical Fisher with its first-order term."""

    name = "mixllm"
    unit = "nats per chunk, over its tokens"
    probe: Probe = staticmethod(text_labels)

    def contract(self, errors_SRC: Tensor, gradients_PRC: Tensor) -> Tensor:
        """Sums over rows of |S1 + S1^2 / 2|."""
        first = torch.einsum("src,prc->rsp", errors_SRC, gradients_PRC)
        return (first + first.square() / 2).abs().sum(0)

    def total(self, contracted_SP: Tensor) -> Tensor:
        """The sum over samples."""
        return contracted_SP.sum(-1)

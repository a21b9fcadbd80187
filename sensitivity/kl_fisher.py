"""KL-Fisher probes: the second-order KL of a perturbation, all correlations within a unit kept.

    score = 1/2 mean_k < g_k, dW >^2,    g_k = J^T z_k,    E[z z^T] = diag(p) - p p^T

(PrismaQuant's AURA.) J is the logits' derivative by the unit's weights and z a probe of the model's
own distribution: p - e_y with y drawn from it, or a Gaussian with the same covariance. Unbiased
where `fisher` neglects all but the diagonal, and noisier: a chi-square of one degree of freedom a
pass, so it wants many.
"""

from torch import Tensor

from evaluation.passes import Probe, gaussian, sampled_labels
from sensitivity.weight_gradients import WeightGradient


class KLFisher(WeightGradient):
    """Squared inner products of probe gradients with the error of a whole unit."""

    unit = "nats per token, to second order"
    probes = 2

    def __init__(self, name: str = "kl-fisher", probe: Probe = sampled_labels) -> None:
        self.name, self.probe = name, probe

    def contract(self, errors_SRC: Tensor, gradients_PRC: Tensor) -> Tensor:
        """Inner products."""
        return errors_SRC.flatten(1) @ gradients_PRC.flatten(1).T

    def total(self, contracted_SP: Tensor) -> Tensor:
        """See the module."""
        return 0.5 * contracted_SP.square().sum(-1) / self.probes


def gaussian_kl_fisher() -> KLFisher:
    """With Gaussian probes."""
    return KLFisher("kl-fisher-gaussian", gaussian)

"""HIGGS: how much loss a unit's relative squared error costs, by noise of several sizes.

    score = alpha_u t^2,    t^2 = ||dW||^2 / ||W||^2,    KL(W + noise of size t) = alpha_u t^2

(The linearity theorem, arXiv 2411.17525, equation 4.) Gaussian noise is put into one unit at a
time and alpha fitted by least squares; a scheme then only needs its error's norm, so that cost
doesn't grow with the menu.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from evaluation.assembly import AssembledModel
from evaluation.restarts import Restarts
from quantization.schemes import Scheme
from sensitivity.base import RawTable, Share, empty_table, lossy, menu, squared_error
from sensitivity.by_restarts import ByRestarts, losses, places

LEVELS = (0.05, 0.1, 0.2)  # t: about those of 5, 4 and 3 bits; the paper takes 15 levels


class HIGGS(ByRestarts):
    """Relative squared error times a coefficient measured by noise injection."""

    name = "higgs"
    unit = "nats per token, linear in the relative squared error"

    def score(
        self,
        model: AssembledModel,
        chunks: NDArray[np.int64],
        choices: Sequence[Sequence[Scheme]],
        share: Share,
    ) -> RawTable:
        """See `Estimator.score`."""
        table, columns = empty_table(choices), menu(choices)
        restarts = Restarts(model, chunks[slice(*share.chunks)])
        table.tokens[slice(*share.units)] = restarts.tokens
        squares = np.square(LEVELS)
        for block, here in places(restarts, range(*share.units)):
            open_ = [u for u in here if lossy(choices[u])]
            changes = [partial(_disturb, model, u, level) for u in open_ for level in LEVELS]
            found = np.array(losses(restarts, block, changes)).reshape(len(open_), len(LEVELS))
            alphas = found @ squares / (squares @ squares)
            model.load(open_)
            for u, alpha in zip(open_, alphas, strict=True):
                size = _squared_norm(model, u)
                for scheme in lossy(choices[u]):
                    error = squared_error(model, u, scheme) / max(size, 1e-30)
                    table.sums[u, columns.index(scheme)] += alpha * error
            if block is not None:
                restarts.blocks.unload(block)
        return table


def _disturb(model: AssembledModel, u: int, level: float) -> None:
    """Gaussian noise of `level` times the norm of each of a unit's sites."""
    generator = torch.Generator(model.device).manual_seed(u)
    for site in model.bank.layout.units[u].stored:
        parameter = model.parameter(site.parameter)
        weight = parameter.detach().float()
        noise = torch.randn(weight.shape, generator=generator, device=weight.device)
        noise *= level * weight.norm() / noise.norm()
        parameter.data = (weight + noise).to(parameter.dtype)


def _squared_norm(model: AssembledModel, u: int) -> float:
    """||W||^2 of a unit whose reference is loaded."""
    weights = (model.parameter(s.parameter).detach() for s in model.bank.layout.units[u].stored)
    return sum(float(weight.float().square().sum()) for weight in weights)

"""Hessian trace: HAWQ's measure, the mean curvature of a unit times its squared error.

    score = 1/2 Tr(H_u) / n_u ||dW||^2,    Tr(H) = E[ v^T H v ],  v Rademacher

(HAWQ-V2, arXiv 1911.03852, equation 9; Hutchinson's estimate.) H is the Hessian of the KL from the
unquantized model, which at that model is the Fisher matrix; products with it come from
differentiating twice. That graph spans the whole model: this estimator alone isn't bounded by a
block.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from evaluation.assembly import AssembledModel
from quantization.schemes import Scheme
from quantization.units import Site
from sensitivity.base import (
    Estimator,
    RawTable,
    Share,
    empty_table,
    lossy,
    menu,
    split,
    squared_error,
)
from sensitivity.work import Work

MOST_CHUNKS = 4
PROBES = 2


class HessianTrace(Estimator):
    """Hutchinson's trace of each unit's Hessian block times its mean squared error."""

    name = "hessian-trace"
    unit = "nats per token, to second order, isotropic"

    def shares(self, units: int, chunks: int) -> list[Share]:
        """All units, chunk by chunk."""
        return [Share((0, units), part) for part in split(min(chunks, MOST_CHUNKS), MOST_CHUNKS)]

    def forecast_bytes(self, choices: Sequence[Sequence[Scheme]], share: Share, work: Work) -> int:
        """See `Estimator.forecast_bytes`: not bounded by a block."""
        weights = sum(unit.numel for unit in work.layout.units) * work.itemsize
        attention = 8 * 4 * work.tokens**2 * (work.width // 64)
        return (
            5 * weights
            + work.blocks * (3 * work.activations_bytes + attention)
            + 8 * work.logits_bytes
        )

    def score(
        self,
        model: AssembledModel,
        chunks: NDArray[np.int64],
        choices: Sequence[Sequence[Scheme]],
        share: Share,
    ) -> RawTable:
        """See `Estimator.score`."""
        table, columns = empty_table(choices), menu(choices)
        units = model.bank.layout.units
        own = range(*share.chunks)
        table.tokens[slice(*share.units)] = len(own) * chunks.shape[1]
        open_ = [u for u in range(*share.units) if lossy(choices[u])]
        sites = [site for u in open_ for site in units[u].stored]
        model.assign(None)
        traces = dict.fromkeys((site.parameter for site in sites), 0.0)
        for c in own:
            for probe in range(PROBES):
                for name, value in _traces(model, sites, chunks[c], 1000 * c + probe).items():
                    traces[name] += value / PROBES
        for u in open_:
            trace = sum(traces[site.parameter] for site in units[u].stored)
            for scheme in lossy(choices[u]):
                mean = squared_error(model, u, scheme) / units[u].numel
                table.sums[u, columns.index(scheme)] += 0.5 * trace * mean
        return table


def _traces(
    model: AssembledModel, sites: Sequence[Site], ids: NDArray[np.int64], seed: int
) -> dict[str, float]:
    """v^T H v of each site's block, summed over the tokens of a chunk, for one random v."""
    parameters = [model.parameter(site.parameter) for site in sites]
    generator = torch.Generator(model.device).manual_seed(seed)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        batch = torch.from_numpy(ids)[None].to(model.device)
        # only the plain attention can be differentiated twice
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            logits = model.module(input_ids=batch, use_cache=False).logits[0].float()
            loss = _kl_from_itself(logits)
            gradients = torch.autograd.grad(
                loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True
            )
            probes = [_rademacher(g, generator) for g in gradients]
            products = torch.autograd.grad(
                gradients, parameters, probes, allow_unused=True, materialize_grads=True
            )
        return {
            site.parameter: float(torch.sum(v.float() * hv.float(), dtype=torch.float64))
            for site, v, hv in zip(sites, probes, products, strict=True)
        }
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def _kl_from_itself(logits: Tensor) -> Tensor:
    """KL(p || q) at q = p, up to a constant: zero gradient, and the Fisher matrix as Hessian."""
    q = logits.log_softmax(-1)
    return -(q.detach().exp() * q).sum()


def _rademacher(like: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, like.shape, generator=generator, device=like.device)
    return (2 * signs - 1).to(like.dtype)

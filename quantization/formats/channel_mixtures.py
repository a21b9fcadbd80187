"""The field's mixtures by rows, columns and column groups: what they rank by, and their parts.

Each fraction is a format of its own, and the search chooses among them. A ranking over the whole
model with one threshold, as MixLLM has it, is then the search's own: with additive losses, the
fractions that the optimum gives each unit are those that a common threshold would.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from quantization.formats.base import ScalarFormat
from quantization.formats.mixtures import ColumnMixture, Part, RowMixture
from quantization.statistics import SiteStatistics, Statistic


class OWQ(ColumnMixture):
    """Weak columns in bfloat16 (OWQ, arXiv 2306.02272, equation 4): H_jj ||W_:j - Q(W_:j)||^2."""

    def salience(self, weight: Tensor, statistics: SiteStatistics) -> Tensor:
        """See `Mixture.salience`."""
        base = self.parts[0].format
        codes, grid = base.nearest(weight)
        error = (base.decode(codes, grid) - weight).square_().sum(-2)
        return error if statistics.importance is None else error * statistics.importance


class Atom(ColumnMixture):
    """Columns of large inputs in INT8 (Atom, arXiv 2310.19102, section 4.1; QUIK, 2310.09259).

    Ranked by sum x^2; without calibration by the weights' own energy.
    """

    def salience(self, weight: Tensor, statistics: SiteStatistics) -> Tensor:
        """See `Mixture.salience`."""
        if statistics.importance is None:
            return weight.square().sum(-2)
        return statistics.importance.to(weight)


class SliM(ColumnMixture):
    """Groups of columns at b - 1, b and b + 1 bits (SliM-LLM, arXiv 2405.14917, equation 3).

    Salience is the sum of w^2 / [H^-1]_jj^2 over a group; as many groups gain a bit as lose one.
    Without calibration H is the identity.
    """

    def salience(self, weight: Tensor, statistics: SiteStatistics) -> Tensor:
        """See `Mixture.salience`."""
        energy = weight.square().sum(-2)
        moment = statistics.second_moment
        if moment is not None:
            diagonal = moment.diagonal(dim1=-2, dim2=-1)
            damping = 0.01 * diagonal.mean(-1, keepdim=True) + 1e-30
            inverse = torch.linalg.inv(moment.double() + torch.diag_embed(damping.double()))
            energy = energy / inverse.diagonal(dim1=-2, dim2=-1).square().to(energy)
        return energy.unflatten(-1, (-1, self.size)).sum(-1)


class MixLLM(RowMixture):
    """Output channels at 8 bits (MixLLM, arXiv 2412.14590, equation 5).

    Ranked by what rounding to the low format costs, 1/2 sum_d F_cd dW_cd^2: the paper's score under
    independent gradients. Without calibration, by the squared error.
    """

    @property
    def needs(self) -> frozenset[Statistic]:  # type: ignore[override]
        """The Fisher information of each weight."""
        return frozenset({"fisher"})

    def salience(self, weight: Tensor, statistics: SiteStatistics) -> Tensor:
        """See `Mixture.salience`."""
        base = self.parts[0].format
        codes, grid = base.nearest(weight)
        error = (base.decode(codes, grid) - weight).square_()
        return (error if statistics.fisher is None else error * statistics.fisher.to(error)).sum(-1)


def channel_mixtures(named: dict[str, ScalarFormat]) -> Iterator[ColumnMixture | RowMixture]:
    """Every mixture that has a name, made of the named formats."""
    for group in (64, 128):
        for bits in (2, 3, 4):
            base = Part(named[f"int{bits}-g{group}"])
            for percent in (0.5, 1, 2, 5):
                exact = Part(named["bf16"], percent / 100)
                yield OWQ(f"owq-{base.format.name}@{percent}%", (base, exact))
            fine = named[f"int8-g{group}"]
            for percent in (3, 6, 12, 25):
                name = f"atom-{base.format.name}@{percent}%"
                yield Atom(name, (base, Part(fine, percent / 100)))
            base = Part(named[f"int{bits}-g{group}-asym"])
            for percent in (5, 10, 20, 40):
                name = f"mixllm-{base.format.name}@{percent}%"
                yield MixLLM(name, (base, Part(fine, percent / 100)))
        for bits in (3, 4):
            for percent in (10, 20, 40):
                share = percent / 100
                coarse, middle, fine = (
                    named[f"int{b}-g{group}"] for b in (bits - 1, bits, bits + 1)
                )
                parts = (Part(coarse, share), Part(middle), Part(fine, share))
                yield SliM(f"slim-{middle.name}@{percent}%", parts, size=group)

"""What estimators from gradients by weights share: one backward pass, all schemes from it.

Legend: S schemes, P backward passes (chunks times probes), R rows, C columns, E experts.

A task goes through the blocks once, last one first, and holds the gradients of one block by all of
its P passes. Each estimator only says what a gradient and an error make together (`contract`) and
what the sums over a unit's weights make of its score (`total`).
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evaluation.assembly import AssembledModel
from evaluation.passes import Passes, Probe, sampled_labels
from evaluation.tap import Tap
from quantization.schemes import Scheme
from quantization.units import Site
from sensitivity.base import (
    Estimator,
    RawTable,
    Share,
    add_experts,
    by_chunks,
    empty_table,
    lossy,
    menu,
    middle,
)
from sensitivity.online import Online
from sensitivity.work import Work

CHUNKS_A_TASK = 4
SLICE = 2**18  # weights at a time: temporaries stay in cache


class WeightGradient(Estimator):
    """Scores from gradients by weights.

    Attributes:
        probe: what is differentiated.
        probes: backward passes a chunk.
        quantized: whether gradients are those of a model with each unit in its middle scheme.
        resident: whether the replica holds all weights anyhow (see `evaluation.blocks.Blocks`).
        linear: whether `contract` is linear in the errors: it is then given the weights themselves,
            one scheme at a time, and the exact weights' numbers are taken off.
    """

    online = True
    probe: Probe = staticmethod(sampled_labels)
    probes = 1
    quantized = False
    resident = False
    linear = False

    @abstractmethod
    def contract(self, errors_SRC: Tensor, gradients_PRC: Tensor) -> Tensor:
        """S x P numbers of some whole rows (float32), to be added up over a unit."""

    @abstractmethod
    def total(self, contracted_SP: Tensor) -> Tensor:
        """A unit's S scores, summed over the tokens of all passes."""

    def base(
        self, model: AssembledModel, choices: Sequence[Sequence[Scheme]]
    ) -> Sequence[Scheme | None] | None:
        """The map whose gradients are taken; None for the unquantized model."""
        if not self.quantized:
            return None
        units = model.bank.layout.units
        return [middle(unit, row) for unit, row in zip(units, choices, strict=True)]

    def arrived(self, passes: Passes) -> list[list[Tensor]] | None:
        """Between the forward and the backward passes; may give the gradients by the last states."""
        return None

    def shares(self, units: int, chunks: int) -> list[Share]:
        """All units for a range of chunks: a backward pass reaches them all."""
        return by_chunks(units, chunks, CHUNKS_A_TASK)

    def forecast_bytes(self, choices: Sequence[Sequence[Scheme]], share: Share, work: Work) -> int:
        """See `Estimator.forecast_bytes`."""
        chunks = share.chunks[1] - share.chunks[0]
        passes = chunks * self.probes
        states = (work.blocks + 1 + self.probes) * chunks * work.states_bytes
        block = work.largest_block * work.itemsize * (1 + passes)
        errors = len(menu(choices)) * work.largest_site * work.itemsize + work.errors_bytes
        return (
            work.outer_bytes + 2 * self.probes * work.opened_bytes(choices) + states + block + errors
            + work.graphs_bytes(chunks) + (3 + self.probes) * work.logits_bytes
        )  # fmt: skip

    def score(
        self,
        model: AssembledModel,
        chunks: NDArray[np.int64],
        choices: Sequence[Sequence[Scheme]],
        share: Share,
    ) -> RawTable:
        """See `Estimator.score`."""
        table = empty_table(choices)
        own = chunks[slice(*share.chunks)]
        table.tokens[slice(*share.units)] = own.size
        base = self.base(model, choices)
        passes = Passes(model, own, share.chunks[0], base, resident=self.resident)
        wanted = [
            [u for u in units if u in range(*share.units) and lossy(choices[u])]
            for units in passes.blocks.units
        ]
        outer = [u for u in passes.blocks.outer if u in range(*share.units) and lossy(choices[u])]
        online = Online(model, choices, [*(u for units in wanted for u in units), *outer])
        wanted = [[u for u in units if _is_weights(model, u)] for units in wanted]
        outer = [u for u in outer if _is_weights(model, u)]
        stop = next((i for i, units in enumerate(wanted) if units or online.units(i)), len(wanted))
        stop = 0 if outer else stop  # an embedding wants the gradient before the first block
        counts = _Counts(model)

        @contextmanager
        def watch(index: int) -> Iterator[list[Tensor]]:
            sites = _sites(model, wanted[index])
            targets: list[Tensor] = [model.parameter(site.parameter) for site in sites]
            with counts.of(sites), online.watch(index) as kept:
                yield targets
            targets += kept()

        held: list[tuple[Tensor, ...]] = []
        bank = model.bank
        work = Work(bank.layout, own.shape[1], bank.dtype.itemsize, roomy=not bank.packed)
        with _differentiable(model, [u for units in wanted for u in units]):
            passes.forward(watch=watch if work.keeps_graphs(len(own)) else None)
            given = self.arrived(passes)
            for index, c, found in passes.backward(self.probe, self.probes, watch, stop, given):
                online.score(self, table, index, c, found)
                held += found
                if c + 1 == len(own):
                    self._add(table, model, choices, wanted[index], held, counts)
                    held = []
        self._add_outer(table, model, choices, outer, passes)
        return table

    def _add(
        self,
        table: RawTable,
        model: AssembledModel,
        choices: Sequence[Sequence[Scheme]],
        units: Sequence[int],
        held: Sequence[tuple[Tensor, ...]],
        counts: "_Counts",
    ) -> None:
        """Turn the gradients of some units by all passes (in the order of their sites) into scores."""
        columns = menu(choices)
        place = 0
        for u in units:
            unit, every = model.bank.layout.units[u], lossy(choices[u])
            schemes = list(dict.fromkeys(Scheme(scheme.weight) for scheme in every))
            contracted = None
            for site in unit.stored:
                gradients = [passed[place] for passed in held]
                place += 1
                own = self._contracted(model, u, site, schemes, gradients)
                contracted = own if contracted is None else contracted + own
            assert contracted is not None
            scores = torch.stack([self.total(expert) for expert in contracted], 1)  # S x E
            if unit.kind == "experts":
                seen = counts.tokens[unit.stored[0].name]
                add_experts(table, u, choices, schemes, scores.numpy(), seen)
                continue
            of = dict(zip(schemes, scores.sum(1).tolist(), strict=True))
            for scheme in every:  # what activations cost is added elsewhere
                table.sums[u, columns.index(scheme)] += of[Scheme(scheme.weight)]

    def _contracted(
        self,
        model: AssembledModel,
        u: int,
        site: Site,
        schemes: Sequence[Scheme],
        gradients: Sequence[Tensor],
    ) -> Tensor:
        """E x S x P, E being 1 for a plain matrix."""
        bank, unit = model.bank, model.bank.layout.units[u]

        def matrices(tensor: Tensor) -> Tensor:
            tensor = tensor.mT if site.transposed else tensor
            return tensor if tensor.dim() == 3 else tensor[None]

        exact = matrices(bank.reference(unit)[site.parameter].to(model.device))
        if self.resident:
            shipped = [matrices(bank.tensors(unit, s)[site.parameter]) for s in schemes]
        else:
            shipped = [matrices(bank.borrow(unit, s, site.parameter)) for s in schemes]
        given = [matrices(gradient) for gradient in gradients]
        found = []
        experts, rows, columns = exact.shape
        step = max(1, SLICE // columns)
        for e in range(experts):
            total = torch.zeros(len(schemes), len(given), dtype=torch.float64)
            for r in range(0, rows, step):
                part = slice(r, r + step)
                reference = exact[e, part].float()
                passed = torch.stack([g[e, part].float() for g in given])
                own = [s[e, part].to(reference) for s in shipped]
                total += self._contract(reference, own, passed).double().cpu()
            found.append(total)
        return torch.stack(found)

    def _contract(self, exact_RC: Tensor, shipped: list[Tensor], gradients_PRC: Tensor) -> Tensor:
        """`contract`, of errors that are made here if they are needed."""
        if not self.linear:
            return self.contract(torch.stack([s - exact_RC for s in shipped]), gradients_PRC)
        found = [self.contract(s[None], gradients_PRC).double() for s in (exact_RC, *shipped)]
        return torch.cat(found[1:]) - found[0]

    def _add_outer(
        self,
        table: RawTable,
        model: AssembledModel,
        choices: Sequence[Sequence[Scheme]],
        open_: Sequence[int],
        passes: Passes,
    ) -> None:
        """Embedding and head, where the menu opens them: their gradients a chunk at a time."""
        if not open_:
            return
        parameters = [model.parameter(site.parameter) for site in _sites(model, open_)]
        with _differentiable(model, open_):
            for _, found in passes.outer(self.probe, self.probes, parameters):
                self._add(table, model, choices, open_, found, _Counts(model))


def _is_weights(model: AssembledModel, u: int) -> bool:
    return model.bank.layout.units[u].kind != "cache"


def _sites(model: AssembledModel, units: Sequence[int]) -> list[Site]:
    return [site for u in units for site in model.bank.layout.units[u].stored]


@contextmanager
def _differentiable(model: AssembledModel, units: Sequence[int]) -> Iterator[None]:
    """Let passes differentiate by the weights of some units."""
    parameters = [model.parameter(site.parameter) for site in _sites(model, units)]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


class _Counts:
    """Tokens that each expert saw, by site."""

    def __init__(self, model: AssembledModel) -> None:
        self._model = model
        self.tokens: dict[str, NDArray[np.float64]] = {}

    @contextmanager
    def of(self, sites: Sequence[Site]) -> Iterator[None]:
        """Count within a block's run."""
        packed = [site for site in sites if len(site.shape) == 3]
        if not packed:
            yield
            return
        for site in packed:
            self.tokens.setdefault(site.name, np.zeros(site.shape[0]))
        with Tap(self._model.module, packed, self._add):
            yield

    def _add(self, site: Site, expert: int, inputs: Tensor, outputs: Tensor) -> None:
        self.tokens[site.name][expert] += inputs.numel() // inputs.shape[-1]

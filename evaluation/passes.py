"""Passes over a text, block by block: one decoder block's weights are loaded at a time.

Legend: T tokens of a chunk, V vocabulary, C chunks, P probes a chunk.

All chunks go through a block before the next one is loaded, forwards and backwards; between them
only hidden states are kept (blocks x C x T x width). The backward pass recomputes a block's
activations from the states before it, so its graph is as large as one block on one chunk; or, where
a model is small, all graphs are kept from the forward pass, which saves a fifth of the time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evaluation.assembly import AssembledModel
from evaluation.blocks import Blocks
from evaluation.calibration import sample_labels
from quantization.memory import trim
from quantization.schemes import Scheme

Probe = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""From logits (T x V, float32) and the chunk's ids (T) to the gradient by the logits (T x V)."""

Watch = Callable[[int], AbstractContextManager[list[Tensor]]]
"""Around a block's run, by its index: gives the tensors to differentiate by, complete at its end."""

Schemes = Sequence[Scheme | None]


class Graph(NamedTuple):
    """A block's run on one chunk, to differentiate by its input and by what was watched."""

    before: Tensor
    after: Tensor
    targets: list[Tensor]


class Passes:
    """Forward and backward passes of a model over some chunks.

    Args:
        chunks: C x T of ids.
        first: the number of the first chunk among all, so that random numbers don't depend on how
            the work is cut.
        schemes: one for each unit of the layout; None for the unquantized model.
        resident: whether weights and heap stay as they are between blocks (see `Blocks`).
    """

    def __init__(
        self,
        model: AssembledModel,
        chunks: NDArray[np.int64],
        first: int = 0,
        schemes: Schemes | None = None,
        *,
        resident: bool = False,
    ) -> None:
        self.blocks = Blocks(model, resident=resident)
        self.first, self.schemes = first, schemes
        model.load(self.blocks.outer, schemes)
        self.ids = [torch.from_numpy(ids)[None].to(model.device) for ids in chunks]
        with torch.no_grad():
            starts = [self.blocks.start(ids) for ids in self.ids]
        self.calls = [calls for _, calls in starts]
        self.states: list[list[Tensor]] = [[hidden for hidden, _ in starts]]
        self._graphs: dict[tuple[int, int], Graph] = {}

    def forward(
        self,
        around: Callable[[int], AbstractContextManager[object]] = lambda _: nullcontext(),
        last: int | None = None,
        keep: bool = True,
        watch: Watch | None = None,
    ) -> None:
        """Run all chunks through the blocks that they haven't been through (up to and with `last`).

        Args:
            around: a context that a block is run in, by its index; its weights are loaded.
            last: where to stop; None for the last block.
            keep: whether the states before every block are kept, for a backward pass.
            watch: where there is memory for the whole graph of all chunks, what that backward pass
                will watch: it then needn't compute the blocks a second time.
        """
        end = len(self.blocks) if last is None else last + 1
        for index in range(len(self.states) - 1, end):
            self.blocks.load(index, self.schemes)
            if watch:
                after = [self._keep_graph(index, c, watch) for c in range(len(self.ids))]
            else:
                with torch.no_grad(), around(index):
                    after = [
                        self.blocks.run(index, hidden, calls[index])
                        for hidden, calls in zip(self.states[-1], self.calls, strict=True)
                    ]
            self._leave(index)
            if not keep:
                self.states.pop()
            self.states.append(after)

    def rewind(self, index: int) -> None:
        """Forget the states after block `index` was entered, because its weights have changed."""
        del self.states[index + 1 :]

    def backward(
        self,
        probe: Probe,
        probes: int,
        watch: Watch,
        stop: int = 0,
        given: list[list[Tensor]] | None = None,
    ) -> Iterator[tuple[int, int, list[tuple[Tensor, ...]]]]:
        """From the last block to block `stop`, after a `forward` that kept its states.

        The gradients by the states after the last block (C x P) are those of `probe`, or `given`.

        Yields block, chunk and, for each probe, the gradients by what `watch` gave; the block's
        weights are loaded until all chunks have been through it.
        """
        self.gradients = given or [
            self._by_final_states(c, probe, probes) for c in range(len(self.ids))
        ]
        for index in reversed(range(stop, len(self.blocks))):
            self.blocks.load(index, self.schemes)
            before = self.states[index]
            for c in range(len(self.ids)):
                yield index, c, self._through(index, c, before[c], watch)
            self._leave(index)

    def outer(
        self, probe: Probe, probes: int, parameters: Sequence[Tensor]
    ) -> Iterator[tuple[int, list[tuple[Tensor, ...]]]]:
        """Chunk and gradients by parameters outside of the blocks, after a whole `backward`."""
        for c, ids in enumerate(self.ids):
            with torch.enable_grad():
                start, _ = self.blocks.start(ids)
                logits = self.blocks.logits(ids, self.states[-1][c])
                given = self._probed(c, logits, probe, probes)
            found = []
            for p, by_logits in enumerate(given):
                pairs = [(logits, by_logits), (start, self.gradients[c][p])]
                outputs, gradients = zip(
                    *(pair for pair in pairs if pair[0].requires_grad), strict=True
                )
                found.append(
                    torch.autograd.grad(
                        outputs, list(parameters), gradients, retain_graph=p + 1 < probes,
                        allow_unused=True, materialize_grads=True,
                    )
                )  # fmt: skip
            yield c, found

    def _leave(self, index: int) -> None:
        self.blocks.unload(index)
        if not self.blocks.resident:
            trim()

    def _by_final_states(self, c: int, probe: Probe, probes: int) -> list[Tensor]:
        hidden = self.states[-1][c].detach().requires_grad_()
        with torch.enable_grad():
            logits = self.blocks.logits(self.ids[c], hidden)
        given = self._probed(c, logits, probe, probes)
        return [
            torch.autograd.grad(logits, hidden, g, retain_graph=p + 1 < probes)[0]
            for p, g in enumerate(given)
        ]

    def _probed(self, c: int, logits: Tensor, probe: Probe, probes: int) -> list[Tensor]:
        found = []
        with torch.no_grad():
            for p in range(probes):
                generator = torch.Generator(logits.device).manual_seed(1000 * (self.first + c) + p)
                found.append(probe(logits.float(), self.ids[c][0], generator).to(logits.dtype))
        return found

    def _graph(self, index: int, c: int, before: Tensor, watch: Watch) -> Graph:
        hidden = before.detach().requires_grad_()
        with torch.enable_grad(), watch(index) as targets:
            after = self.blocks.run(index, hidden, self.calls[c][index])
        return Graph(hidden, after, list(targets))

    def _keep_graph(self, index: int, c: int, watch: Watch) -> Tensor:
        graph = self._graphs[index, c] = self._graph(index, c, self.states[-1][c], watch)
        return graph.after.detach()

    def _through(
        self, index: int, c: int, before: Tensor, watch: Watch
    ) -> list[tuple[Tensor, ...]]:
        graph = self._graphs.pop((index, c), None) or self._graph(index, c, before, watch)
        found = []
        for p, gradient in enumerate(self.gradients[c]):
            by_hidden, *rest = torch.autograd.grad(
                graph.after, [graph.before, *graph.targets], gradient,
                retain_graph=p + 1 < len(self.gradients[c]),
                allow_unused=True, materialize_grads=True,
            )  # fmt: skip
            self.gradients[c][p] = by_hidden
            found.append(tuple(rest))
        return found


def sampled_labels(logits_TV: Tensor, _: Tensor, generator: torch.Generator) -> Tensor:
    """Of -log p(y) with y drawn from the model: p - e_y, whose covariance is the logits' Fisher."""
    p_TV = logits_TV.softmax(-1)
    labels_T = sample_labels(p_TV, generator)
    return p_TV.scatter_add_(-1, labels_T[:, None], -torch.ones_like(p_TV[:, :1]))


def gaussian(logits_TV: Tensor, _: Tensor, generator: torch.Generator) -> Tensor:
    """sqrt(p) xi - p <sqrt(p), xi>, xi standard normal: the same covariance, diag(p) - p p^T."""
    p_TV = logits_TV.softmax(-1)
    xi_TV = torch.randn(p_TV.shape, generator=generator, device=p_TV.device)
    scaled_TV = p_TV.sqrt() * xi_TV
    return scaled_TV - p_TV * scaled_TV.sum(-1, keepdim=True)


def text_labels(logits_TV: Tensor, ids_T: Tensor, _: torch.Generator) -> Tensor:
    """Of the mean loss of the text itself, as losses are trained on; not a Fisher probe."""
    p_TV = logits_TV.softmax(-1)
    p_TV[:-1].scatter_add_(-1, ids_T[1:, None], -torch.ones_like(p_TV[:-1, :1]))
    p_TV[-1] = 0
    return p_TV.div_(len(ids_T) - 1)

"""KL of models that differ from a base in one block: passes that restart at the change.

Up to the changed block a model computes what its base computed, so its pass starts from the base's
hidden states there. All changes of a block go through the later blocks together, which are loaded
once for all of them.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evaluation.assembly import AssembledModel
from evaluation.divergence import FixedReference, Head, divergence
from evaluation.passes import Passes, Schemes

Change = Callable[[], None]
"""Changes weights of the loaded block (or of embedding and head), which is unloaded afterwards."""


class Restarts:
    """KL from the unquantized model, summed over the predicted tokens of some chunks.

    Args:
        chunks: C x T of ids.
        base: what is changed: a scheme for each unit of the layout, None for the unquantized model.

    Attributes:
        passes: the base's states at every block.
    """

    def __init__(
        self, model: AssembledModel, chunks: NDArray[np.int64], base: Schemes | None = None
    ) -> None:
        self.model = model
        self.passes = Passes(model, chunks)
        self.blocks = self.passes.blocks
        self.head = Head(model.module)
        self.passes.forward(keep=base is None)
        self._reference = self._finals(self.passes.states[-1])
        self._fixed = [
            FixedReference(self.head, p_TH[:-1])
            for p_TH in (self._reference if FixedReference.applies(self.head) else ())
        ]
        if base is not None:
            self.passes = Passes(model, chunks, schemes=base)
            self.passes.forward()

    def loss_of(self, schemes: Schemes) -> float:
        """Of a whole map, from the first block on; the base stays what it is."""
        self.model.load(self.blocks.outer, schemes)
        with torch.no_grad():
            states = [self.blocks.start(ids)[0] for ids in self.passes.ids]
        for index in range(len(self.blocks)):
            self.blocks.load(index, schemes)
            states = self._through(index, states)
            self.blocks.unload(index)
        loss = self.loss(states)
        self.model.load(self.blocks.outer, self.passes.schemes)
        return loss

    @property
    def tokens(self) -> int:
        """Predicted tokens of all chunks."""
        return sum(ids.shape[-1] - 1 for ids in self.passes.ids)

    def loss(self, states: Sequence[Tensor] | None = None) -> float:
        """Of given hidden states after the last block (one a chunk); of the base's by default."""
        finals = self._finals(self.passes.states[-1] if states is None else states)
        if self._fixed and self.head.assigned_weight.data_ptr() == self.head.weight.data_ptr():
            pairs = zip(self._fixed, finals, strict=True)
            return sum(fixed.kl_sum(q_TH[:-1]) for fixed, q_TH in pairs)
        total = 0.0
        for ids, p_TH, q_TH in zip(self.passes.ids, self._reference, finals, strict=True):
            found = divergence(
                self.head, p_TH[:-1], q_TH[:-1], ids[0, 1:], self.head.assigned_weight
            )
            total += found.kl_sum
        return total

    def losses(
        self, block: int, changes: Sequence[Change], downstream: Schemes | None = None
    ) -> list[float]:
        """Of the base with each of the changes in `block`, and `downstream` in the blocks after."""
        branches = []
        for change in changes:
            self.blocks.load(block, self.passes.schemes)
            change()
            branches.append(self._through(block, self.passes.states[block]))
            self.blocks.unload(block)
        for index in range(block + 1, len(self.blocks)):
            self.blocks.load(index, downstream)
            branches = [self._through(index, states) for states in branches]
            self.blocks.unload(index)
        return [self.loss(states) for states in branches]

    def outer_losses(self, changes: Sequence[Change]) -> list[float]:
        """Of the base with each of the changes in embedding or head."""
        found = []
        for change in changes:
            change()
            with torch.no_grad():
                states = [self.blocks.start(ids)[0] for ids in self.passes.ids]
            for index in range(len(self.blocks)):
                self.blocks.load(index, self.passes.schemes)
                states = self._through(index, states)
                self.blocks.unload(index)
            found.append(self.loss(states))
            self.model.reload(self.blocks.outer, self.passes.schemes)
        return found

    def _through(self, index: int, states: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return [
                self.blocks.run(index, hidden, calls[index])
                for hidden, calls in zip(states, self.passes.calls, strict=True)
            ]

    def _finals(self, states: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            pairs = zip(self.passes.ids, states, strict=True)
            return [self.blocks.finish(ids, hidden) for ids, hidden in pairs]

"""A model block by block: a forward pass that can start and stop at any decoder block.

Hidden states between blocks are plain tensors here, so a pass can be cut there: run all chunks
through a block while its weights are loaded, restart at a changed block, or go backwards block by
block. Masks, positions and what else a block is called with are the model's own: its forward pass
runs with stand-ins for the blocks, which note their arguments. Whether a model can be cut at all
(some pass more than hidden states between blocks) is found by trying.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evaluation.assembly import AssembledModel
from quantization.errors import MeasurementError
from quantization.units import block_path

PROMPT = 8  # tokens, of the trial
Forward = Callable[..., Any]


class Call(NamedTuple):
    """What a model calls one of its blocks with, but for the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Blocks:
    """The decoder blocks of a replica, whose weights are those that the replica has loaded.

    Args:
        resident: whether weights stay where they are when a block is done with: a replica that also
            measures whole maps holds them anyhow, and mapping their pages anew takes its time.

    Attributes:
        units: the numbers of each block's units in the layout, in the order of the blocks.
        outer: the units outside of all blocks (embedding and head), loaded all the time.

    Raises:
        MeasurementError: the model can't be cut between its blocks.
    """

    def __init__(self, model: AssembledModel, *, resident: bool = False) -> None:
        self.model, self.resident = model, resident
        layout = model.bank.layout
        paths = [block_path(unit) for unit in layout.units]
        stacks = {path.rpartition(".")[0] for path in paths if path}
        if len(stacks) != 1:
            raise MeasurementError(
                f"the model has {len(stacks)} stacks of decoder blocks ({', '.join(stacks)}), and "
                "block by block one can only go through one; leave the estimator out of the job"
            )
        stack = stacks.pop()
        self._blocks = list(model.module.get_submodule(stack).children())
        self.units = [
            [u for u, path in enumerate(paths) if path == f"{stack}.{i}"]
            for i in range(len(self._blocks))
        ]
        self.outer = [u for u, path in enumerate(paths) if not path]
        if not resident:
            self.model.unload(u for units in self.units for u in units)
        if model.block_outputs is None:
            model.block_outputs = self._try()
        self._wraps: Sequence[Callable[[Tensor], Any]] = model.block_outputs

    @property
    def _numbered(self) -> Iterator[tuple[int, Any]]:
        return enumerate(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def load(self, index: int, schemes: Sequence[Any] | None = None) -> None:
        """Load a block's weights: the reference's, or those of one scheme a unit of the layout."""
        self.model.load(self.units[index], schemes, dense=True)

    def unload(self, index: int) -> None:
        """Let go of a block's weights, unless they are resident."""
        if not self.resident:
            self.model.unload(self.units[index])

    def start(self, ids: Tensor) -> tuple[Tensor, list[Call]]:
        """Hidden states before the first block (1 x tokens x width), and each block's call."""
        calls: dict[int, Call] = {}
        first: list[Tensor] = []

        def note(index: int) -> Forward:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, call = _split(args, kwargs)
                first.append(hidden)
                calls[index] = call
                return self._wraps[index](hidden)

            return forward

        with self._standing_in(note):
            self.model.module.base_model(input_ids=ids, use_cache=False)
        return first[0], [calls[index] for index in range(len(self))]

    def run(self, index: int, hidden: Tensor, call: Call) -> Tensor:
        """One block."""
        result = self._blocks[index](hidden, *call.args, **call.kwargs)
        states: Tensor = result if isinstance(result, Tensor) else result[0]
        return states

    def finish(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Final hidden states (tokens x width) from those after the last block."""
        with self._standing_in(lambda index: lambda *_, **__: self._wraps[index](hidden)):
            output = self.model.module.base_model(input_ids=ids, use_cache=False)
        states: Tensor = output.last_hidden_state
        return states[0]

    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Logits (tokens x vocabulary) from the hidden states after the last block."""
        with self._standing_in(lambda index: lambda *_, **__: self._wraps[index](hidden)):
            output = self.model.module(input_ids=ids, use_cache=False)
        states: Tensor = output.logits
        return states[0]

    @contextmanager
    def _standing_in(self, make: Callable[[int], Forward]) -> Iterator[None]:
        """Replace the blocks' forward passes by those that `make` gives."""
        for index, module in enumerate(self._blocks):
            module.forward = make(index)
        try:
            yield
        finally:
            for module in self._blocks:
                del module.forward  # the class's own

    def _try(self) -> list[Callable[[Tensor], Any]]:
        """Learn what blocks return, and check that cut in pieces the model computes the same."""
        self.model.load(self.outer)
        ids = torch.arange(PROMPT, device=self.model.device)[None]
        returned: dict[int, Any] = {}

        def entered(index: int) -> Forward:
            return lambda *_: self.load(index)

        def left(index: int) -> Forward:
            def hook(_module: Any, _inputs: Any, output: Any) -> None:
                returned[index] = output
                self.unload(index)

            return hook

        handles = [block.register_forward_pre_hook(entered(i)) for i, block in self._numbered]
        handles += [block.register_forward_hook(left(i)) for i, block in self._numbered]
        try:
            with torch.no_grad():
                whole = self.model.module.base_model(input_ids=ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        self._wraps = wraps = [_wrap(returned[i]) for i in range(len(self))]
        with torch.no_grad():
            hidden, calls = self.start(ids)
            for i in range(len(self)):
                self.load(i)
                hidden = self.run(i, hidden, calls[i])
                self.unload(i)
            pieces = self.finish(ids, hidden)
        if not torch.equal(pieces, whole.last_hidden_state[0]):
            raise MeasurementError(
                "the model passes more than hidden states from block to block, so it can't be run "
                "block by block; leave the estimator out of the job"
            )
        return wraps


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    if args:
        return args[0], Call(args[1:], kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), Call((), rest)


def _wrap(returned: Any) -> Callable[[Tensor], Any]:
    """Hidden states in the form that a block returns them in."""
    if isinstance(returned, Tensor):
        return lambda hidden: hidden
    length = len(returned)
    return lambda hidden: (hidden, *[None] * (length - 1))

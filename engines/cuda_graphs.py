"""Work on a GPU, captured in CUDA graphs and timed by events: Python's launches aren't in it."""

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache

WARM_UPS = 3
"""Runs before the capture: they compile and tune kernels and make the libraries' handles."""
ROOM = 64
"""Tokens that are generated behind the same past before the cache is emptied."""


class Captured:
    """What a function does on the GPU, to be replayed.

    A function that can't be captured is run itself, its launches included; `graph` is None then.

    Args:
        run: queues the work; same tensors each time. What it returned is `result`: the same tensors
            hold the results of each replay.
    """

    def __init__(self, run: Callable[[], object]) -> None:
        self._run = run
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.result: Any = None
        self.graph = self._captured()

    def __call__(self) -> None:
        """Queue the work once."""
        if self.graph is None:
            self.result = self._run()
        else:
            self.graph.replay()

    def seconds(self, least_s: float = 0.0) -> float:
        """Seconds of one run by the GPU's clock, from as many as take `least_s`.

        One run is queued ahead of them, so that the GPU never waits for the first launch.
        """
        count = 1 if least_s == 0 else max(1, math.ceil(least_s / self.seconds()))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self()
        start.record()
        for _ in range(count):
            self()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e-3 / count

    def _captured(self) -> Any:
        graph = torch.cuda.CUDAGraph()
        with suppress(RuntimeError):
            with torch.cuda.graph(graph):
                self.result = self._run()
            return graph
        return None


class GraphModel:
    """A model on the GPU: a prompt in one graph, a token in another.

    A prompt is processed without keeping its keys and values, so that it can be replayed. Tokens
    attend to a cache of constant length, as captured kernels must: past and `ROOM`.

    Args:
        module: transformers' model, on the GPU.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module: Any = module
        self._prompts: dict[int, Captured] = {}
        self._past, self._left = 0, 0
        self._cache: Any = None
        self._step: Captured | None = None

    def prefill_s(self, tokens: int) -> float:
        """Seconds of a prompt."""
        return self._prompt(tokens).seconds()

    def prefill(self, tokens: int) -> None:
        """Process a prompt, and wait for it."""
        self._prompt(tokens)()
        torch.cuda.synchronize()

    def start(self, past: int) -> None:
        """Put tokens into the cache; steps go on behind them."""
        past = max(past, 1)
        if self._cache is None or past != self._past:
            self._cache = StaticCache(self._module.config, max_cache_len=past + ROOM)
            self._past, self._step = past, None
        self._cache.reset()
        self._forward(self._ids(past), past_key_values=self._cache, use_cache=True)
        self._left = ROOM
        if self._step is None:
            one, cache = self._ids(1), self._cache
            self._step = Captured(lambda: self._forward(one, past_key_values=cache, use_cache=True))
            self._left -= WARM_UPS

    def step_s(self) -> float:
        """Seconds of one more token."""
        return self._started(2).seconds()

    def step(self) -> None:
        """Generate one more token, and wait for it."""
        self._started(1)()
        torch.cuda.synchronize()

    def _started(self, steps: int) -> Captured:
        if self._step is None:
            raise RuntimeError("step before start: there is no cache to go on from")
        if self._left < steps:  # a masked place costs what a token does
            self._cache.reset()
            self._left = ROOM
        self._left -= steps
        return self._step

    def _prompt(self, tokens: int) -> Captured:
        if tokens not in self._prompts:
            ids = self._ids(tokens)
            self._prompts[tokens] = Captured(lambda: self._forward(ids, use_cache=False))
        return self._prompts[tokens]

    def _forward(self, ids: Tensor, **given: Any) -> object:
        return self._module(input_ids=ids, logits_to_keep=1, **given)

    def _ids(self, tokens: int) -> Tensor:
        device = next(self._module.parameters()).device
        return (torch.arange(10, 10 + tokens, device=device) % self._module.config.vocab_size)[None]

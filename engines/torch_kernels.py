"""Our own kernels under PyTorch: transformers' model whose weights are packed.

It serves every format, the ones without a kernel by dequantizing first. On GPUs the work is in
CUDA graphs and timed by events.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from engines.base import Cell, Engine, Exercise, Run, Timing
from engines.cuda_graphs import Captured, GraphModel
from engines.turns import LEAST_S, joules_of, seconds_of, timing_beside, usual_of
from evaluation.arithmetic import choose_dtype, default_device
from quantization.checkpoints import Checkpoint, load_model
from quantization.errors import KernelError
from quantization.formats import FORMATS, Packed
from quantization.kernels.operator import packed_linear
from quantization.kernels.packed_weight import PackedWeight
from quantization.schemes import FULL_PRECISION, Scheme
from quantization.units import Layout, Site

WORKING_SET_BYTES = {"cpu": 96 * 2**20, "cuda": 2**28}  # more than last-level caches hold
MOST_COPIES, MOST_OPERATIONS = 256, 2e10
PROMPTS, WARM_UP = 3, 3
GPU_JOULES_S = 1.0
"""A GPU's counter is renewed a few times a second."""
REVISION = 2
"""Of the kernels: raised when their speed changes."""
ROWS = 256


class TorchKernels(Engine):
    """PyTorch with the kernels of `quantization/kernels`."""

    name = "torch"
    fuses = False
    reference = Scheme(FULL_PRECISION)
    reference_cell = Cell((1024, 1024), FULL_PRECISION, 1)

    @property
    def accelerated(self) -> bool:  # type: ignore[override]
        """See `Engine.accelerated`."""
        return default_device().type == "cuda"

    @property
    def most_batch(self) -> int:  # type: ignore[override]
        """See `Engine.most_batch`: graphs of a GPU are captured for one."""
        return 1 if self.accelerated else MOST_BATCH

    def refusal(self, site: Site, scheme: Scheme) -> str | None:
        """See `Engine.refusal`."""
        if scheme.activation != FULL_PRECISION:
            return f"activations in {scheme.activation} have no kernel here"
        if scheme.weight != FULL_PRECISION and (len(site.shape) != 2 or site.transposed):
            return "packed experts and transposed weights aren't timed yet"
        return FORMATS[scheme.weight].refusal(site.shape)

    def kernel(self, scheme: Scheme, shape: tuple[int, ...]) -> str:
        """See `Engine.kernel`: the format."""
        return scheme.weight

    def kernel_version(self) -> str:
        """See `Engine.kernel_version`."""
        device = default_device()
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        return f"torch {version('torch')} {name} {_dtype()} kernels {REVISION}"

    def time_cells(
        self, cells: Sequence[Cell], threads: int, usual_s: float | None
    ) -> list[Timing]:
        """See `Engine.time_cells`."""
        device = default_device()
        with _threads(threads), torch.inference_mode():
            reference = _Products(self.reference_cell, device)
            usual = usual_s or usual_of(reference.seconds)
            return [
                timing_beside(_Products(cell, device).seconds, reference.seconds, usual)
                for cell in cells
            ]

    def time_map(
        self,
        checkpoint: Checkpoint,
        layout: Layout,
        schemes: Sequence[Scheme],
        reference: Sequence[Scheme],
        exercise: Exercise,
    ) -> tuple[Run, Run]:
        """See `Engine.time_map`."""
        counter, _ = self.counter()
        with _threads(exercise.threads), torch.inference_mode():
            modules = [_packed(checkpoint, layout, found) for found in (schemes, reference)]
            both = [
                GraphModel(m) if self.accelerated else _Model(m, exercise.batch) for m in modules
            ]
            prompts = [[m.prefill_s(exercise.prompt) for m in both] for _ in range(1 + PROMPTS)]
            for model in both:
                model.start(exercise.past)
            count = WARM_UP + exercise.generated
            tokens = [[model.step_s() for model in both] for _ in range(count)]
            joules = joules_of(
                counter,
                lambda: both[0].prefill(exercise.prompt),
                lambda: both[0].start(exercise.past),
                both[0].step,
                exercise.generated,
                GPU_JOULES_S if self.accelerated else 0.0,
            )
        own, beside = (
            Run(tuple(p[i] for p in prompts[1:]), tuple(t[i] for t in tokens[WARM_UP:]), *found)
            for i, found in ((0, joules), (1, (None, None)))
        )
        return own, beside


class _Products:
    """Equal products, each with a weight of its own."""

    def __init__(self, cell: Cell, device: torch.device) -> None:
        self._device = device
        rows, columns = cell.shape
        packed = _noise(cell.kernel, cell.shape)
        most = min(
            WORKING_SET_BYTES.get(device.type, 2**26) // packed.nbytes,
            int(MOST_OPERATIONS // (2 * rows * columns * cell.batch)),
            MOST_COPIES,
        )
        self._weights = [_copy(packed, device) for _ in range(max(1, most))]
        self._inputs = torch.randn(cell.batch, columns).to(device, _dtype())
        self._run()
        self._graph = Captured(self._run) if device.type == "cuda" else None

    def seconds(self) -> float:
        """Of one product."""
        graph = self._graph
        taken = graph.seconds(LEAST_S) if graph is not None else seconds_of(self._run)
        return taken / len(self._weights)

    def _run(self) -> None:
        for weight in self._weights:
            _product(self._inputs, weight)


MOST_BATCH = 1024


class _Model:
    """A model on the processor, and what it has seen, in each of `batch` sequences."""

    def __init__(self, module: nn.Module, batch: int) -> None:
        self._module: Any = module
        self._batch = batch
        self._cache: Any = None

    def prefill_s(self, tokens: int) -> float:
        """Seconds of a prompt, from an empty cache."""
        self._cache = None
        return self._forward_s(torch.arange(10, 10 + tokens) % self._module.config.vocab_size)

    def start(self, past: int) -> None:
        """Put tokens into the cache; `step_s` goes on behind them."""
        self.prefill_s(max(past, 1))

    def step_s(self) -> float:
        """Seconds of one more token."""
        return self._forward_s(torch.tensor([10]))

    prefill, step = prefill_s, step_s

    def _forward_s(self, ids: Tensor) -> float:
        start = time.perf_counter()
        found = self._module(
            input_ids=ids.expand(self._batch, -1),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = found.past_key_values
        return time.perf_counter() - start


def _packed(checkpoint: Checkpoint, layout: Layout, schemes: Sequence[Scheme]) -> nn.Module:
    """The model with packed weights, on the default device."""
    device = default_device()
    module: nn.Module = load_model(checkpoint, _dtype()).to(device)
    for unit, scheme in zip(layout.units, schemes, strict=True):
        if scheme.weight == FULL_PRECISION or unit.kind not in ("linear", "head"):
            continue
        for site in unit.stored:
            path, _, name = site.parameter.rpartition(".")
            weight = PackedWeight(_copy(_noise(scheme.weight, site.shape), device), _dtype())
            parameter = nn.Parameter(weight, requires_grad=False)
            module.get_submodule(path)._parameters[name] = parameter
    return module


def _product(inputs: Tensor, weight: Packed) -> Tensor:
    if weight.format == FULL_PRECISION:
        return inputs @ weight.tensors["values"].T
    return packed_linear(inputs, weight)


@cache
def _noise(format: str, shape: tuple[int, ...]) -> Packed:
    """Normal numbers, few rows of them again and again: values don't matter, fitting takes long."""
    if format not in FORMATS:
        raise KernelError(f"there is no format '{format}'")
    *_, rows, columns = shape
    few = torch.randn(min(ROWS, rows), columns, generator=torch.Generator().manual_seed(0))
    kind = FORMATS[format]
    packed = kind.pack(*kind.nearest(few / columns**0.5))
    if rows <= ROWS:
        return packed
    if any(len(tensor) != len(few) for tensor in packed.tensors.values()):  # not row by row
        whole = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
        return kind.pack(*kind.nearest(whole / columns**0.5))
    times = -(-rows // ROWS)
    tensors = {name: torch.cat([t] * times)[:rows] for name, t in packed.tensors.items()}
    return Packed(format, (rows, columns), tensors)


def _copy(packed: Packed, device: torch.device) -> Packed:
    dtype = _dtype()
    tensors = {
        name: (t.to(dtype) if packed.format == FULL_PRECISION else t).to(device, copy=True)
        for name, t in packed.tensors.items()
    }
    return Packed(packed.format, packed.shape, tensors)


def _dtype() -> torch.dtype:
    found: torch.dtype = choose_dtype("auto")[0]
    return found


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

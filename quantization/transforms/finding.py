"""The folds of a model, found by structure and proven by computing: no list of architectures.

A pass over a few tokens shows which modules read the same tensor and which norm wrote it. Where no
norm did, a neighbour whose outputs are as many as the inputs may have: an up projection behind a
gate, values behind attention. Each guess is tried in float32: random scales are folded in, and the
smallest module around the fold computes again. What comes out must be the same; most guesses (a
gate, queries, a norm that something else reads too) fail and are dropped.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantization.transforms.folds import Fold, Operand
from quantization.units import Layout, Site

TOKENS = 16
TOLERANCE = 1e-3  # what isn't a fold errs by a hundredth at least; float32 by a millionth
SPREAD = 0.5  # of the logarithms of the random scales

Place = tuple[int, int, int]
"""Where a tensor lies: a reshaped one lies where it was."""


@dataclass(frozen=True)
class Call:
    """What a module was called with and what it returned first."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor | None

    @property
    def input(self) -> Tensor | None:
        """The first tensor of numbers that aren't indices."""
        given = (*self.args, *self.kwargs.values())
        floats = (t for t in given if isinstance(t, Tensor) and t.is_floating_point())
        return next(floats, None)


def find_folds(model: Any, layout: Layout) -> tuple[Fold, ...]:
    """The folds of a model in float32 whose readers are in decoder blocks.

    Leaves the model as it was; costs about ten passes over `TOKENS` tokens.
    """
    sites = {
        site.parameter: site
        for unit in layout.units
        if unit.layer is not None
        for site in unit.stored
    }
    calls = _trace(model)
    parameters = dict(model.named_parameters())
    found = []
    for guesses in _guesses(model, calls, sites):
        holding = (fold for fold in guesses if _holds(fold, model, calls, parameters))
        if fold := next(holding, None):
            found.append(fold)
    return tuple(found)


def sample_ids(model: Any) -> Tensor:
    """Random tokens, the same at each call: 1 x `TOKENS`."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(
        model.config.get_text_config().vocab_size, (1, TOKENS), generator=generator
    )


def _trace(model: Any) -> dict[str, Call]:
    """The call of each module, by path; tensors are kept alive, so that none shares a place."""
    calls: dict[str, Call] = {}
    handles = []
    for path, module in model.named_modules():

        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
            calls[path] = Call(args, dict(kwargs), _first(output))

        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    with torch.no_grad():
        model(input_ids=sample_ids(model), use_cache=False)
    for handle in handles:
        handle.remove()
    return calls


def _guesses(
    model: nn.Module, calls: dict[str, Call], sites: dict[str, Site]
) -> Iterator[Iterator[Fold]]:
    """For each tensor that sites read, the folds that may hold, the likeliest first."""
    modules = dict(model.named_modules())
    written = {_place(c.output): p for p, c in calls.items() if p and _is_norm(modules[p], c)}
    readers: dict[Place, list[Operand]] = {}
    for path, call in calls.items():
        x = call.input
        if x is not None:
            operand = _reader(path, modules[path], x.shape[-1], sites)
            readers.setdefault(_place(x), []).extend(operand)
    for place, group in readers.items():
        own = tuple(sites[reader.parameter] for reader in group if reader.parameter in sites)
        if own and place in written:
            norm = written[place]
            yield _norm_folds(norm, modules[norm], own, tuple(group))
        elif own:
            yield _neighbour_folds(modules, own, tuple(group), sites)
    for path, module in modules.items():  # experts in one module, which nothing but it calls
        packed = [sites[f"{path}.{n}"] for n, _ in _own(module) if f"{path}.{n}" in sites]
        if len(packed) > 1 and len(packed[0].shape) == 3:
            down = packed[-1]
            reader = Operand(down.parameter, -2 if down.transposed else -1, down.shape[-1])
            yield _row_folds((down,), (reader,), packed[:-1], reader.count, {})


def _reader(path: str, module: nn.Module, width: int, sites: dict[str, Site]) -> list[Operand]:
    """The matrix with which a module multiplies an input of that width, if it has one."""
    for name, parameter in _own(module):
        site = sites.get(f"{path}.{name}")
        flipped = site.transposed if site else isinstance(module, Conv1D)
        axis = -2 if flipped else -1
        if parameter.dim() > 1 and parameter.shape[axis] == width:
            return [Operand(f"{path}.{name}", axis, width)]
    return []


def _is_norm(module: nn.Module, call: Call) -> bool:
    """Whether all that a module holds is one weight (and bias) for each channel of its output."""
    own = _own(module)
    output = call.output
    return (
        output is not None
        and any(name == "weight" for name, _ in own)
        and all(tuple(p.shape) == tuple(output.shape[-1:]) for _, p in own)
    )


def _norm_folds(
    path: str, norm: nn.Module, sites: tuple[Site, ...], readers: tuple[Operand, ...]
) -> Iterator[Fold]:
    """A norm that multiplies with w, and one that multiplies with 1 + w."""
    width = readers[0].count
    for offset in (0.0, 1.0):
        producers = tuple(
            Operand(f"{path}.{name}", -1, width, offset if name == "weight" else 0.0)
            for name, _ in _own(norm)
        )
        yield Fold(_name(path, sites), sites, producers, readers, width)


def _neighbour_folds(
    modules: dict[str, nn.Module],
    sites: tuple[Site, ...],
    readers: tuple[Operand, ...],
    known: dict[str, Site],
) -> Iterator[Fold]:
    """Each linear beside the readers, in the order of the module around them."""
    parent = sites[0].name.rpartition(".")[0]
    beside = [
        site
        for name, child in modules[parent].named_children()
        if isinstance(child, (nn.Linear, Conv1D))
        and (site := known.get(f"{parent}.{name}.weight"))
        and site not in sites
    ]
    biases = {s.parameter: f"{s.name}.bias" for s in beside if _has_bias(modules[s.name])}
    head = getattr(modules[parent], "head_dim", None) or readers[0].count
    return _row_folds(sites, readers, beside, head, biases)


def _row_folds(
    sites: tuple[Site, ...],
    readers: tuple[Operand, ...],
    beside: list[Site],
    head: int,
    biases: dict[str, str],
) -> Iterator[Fold]:
    """Folds of the readers' inputs into outputs of a matrix: all of them, or the last."""
    columns = readers[0].count
    for site in beside:
        rows = site.shape[-2]
        # the last may be an up projection or values; with shared heads, half of what isn't queries
        for count in dict.fromkeys((rows, columns, (rows - columns) // 2)):
            block = count if count == columns else head
            if not 0 < count <= rows or columns % count or count % block:
                continue
            producers = [Operand(site.parameter, -1 if site.transposed else -2, count)]
            if site.parameter in biases:
                producers.append(Operand(biases[site.parameter], -1, count))
            experts = len(site.shape) == 3
            yield Fold(_name(site.name, sites), sites, tuple(producers), readers, block, experts)


@torch.no_grad()
def _holds(fold: Fold, model: nn.Module, calls: dict[str, Call], parameters: Any) -> bool:
    """Whether random scales leave the module around the fold as it was."""
    names = [operand.parameter for operand in (*fold.producers, *fold.readers)]
    path = _around(names)
    if path not in calls or not all(name in parameters for name in names):
        return False
    module, call = model.get_submodule(path), calls[path]
    before = _first(module(*call.args, **call.kwargs))
    experts = fold.sites[0].shape[:1] if fold.experts else ()
    generator = torch.Generator().manual_seed(0)
    scale = (SPREAD * torch.randn(*experts, fold.channels, generator=generator)).exp()
    kept = {name: parameters[name].clone() for name in names}
    try:
        fold.apply(parameters, scale)
        after = _first(module(*call.args, **call.kwargs))
    finally:
        for name, tensor in kept.items():
            parameters[name].copy_(tensor)
    return before is not None and after is not None and _same(before, after, call.input)


def _same(before: Tensor, after: Tensor, given: Tensor | None) -> bool:
    """Whether outputs agree, measured by the smaller of the output and what it adds to the input.

    A block hands on a residual that may be far larger than what it adds.
    """
    size = before.norm()
    if given is not None and given.shape == before.shape:
        size = torch.minimum(size, (before - given).norm())
    return bool((after - before).norm() <= TOLERANCE * size)


def _around(names: list[str]) -> str:
    """The path of the smallest module that holds all of these parameters."""
    paths = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return ".".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, paths))


def _own(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters(recurse=False))


def _has_bias(module: nn.Module) -> bool:
    return isinstance(getattr(module, "bias", None), nn.Parameter)


def _first(output: Any) -> Tensor | None:
    first = output if isinstance(output, Tensor) else output[0] if output else None
    return first if isinstance(first, Tensor) else None


def _place(tensor: Tensor | None) -> Place:
    if tensor is None:
        return 0, 0, 0
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()), tensor.numel()


def _name(producer: str, sites: tuple[Site, ...]) -> str:
    return f"{producer} > {'+'.join(site.name.rpartition('.')[2] for site in sites)}"

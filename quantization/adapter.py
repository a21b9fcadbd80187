"""The adapter to transformers models: their units, found by structure and not by name.

A forward pass on fake tensors (no weights, no memory) shows which linear layers of one parent
module read the same tensor object: q/k/v, gate/up, MLA's down-projections. Those must share a
scheme, because engines fuse them into one matrix. Linears of different parents never fuse, so
parallel attention and MLP, or shared and routed experts, stay apart even where they read the same
tensor. The packed experts of a layer are one unit, since serving engines give them one kernel.
"""

import logging
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.pytorch_utils import Conv1D

from quantization.checkpoints import Checkpoint, load_config
from quantization.errors import ModelError
from quantization.units import (
    EXPERTS_PER_TOKEN,
    CacheLayer,
    Kept,
    Layout,
    Site,
    Unit,
    UnitKind,
    unit_name,
)

TRACED_TOKENS = 8
ROUTER = "routes tokens to experts"
BLOCK_INDEX = re.compile(r"\.(\d+)(?:\.|$)")


def describe(checkpoint: Checkpoint) -> Layout:
    """The layout of a checkpoint, from its configuration alone: no weight is read.

    Raises:
        ModelError: not a causal language model, or none of its layers could be placed.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(checkpoint)
    try:
        with FakeTensorMode():
            model = AutoModelForCausalLM.from_config(
                config, trust_remote_code=checkpoint.trust_remote_code
            )
            return find_units(model)
    except ModelError:
        raise
    except Exception as error:  # a model's own code runs here
        raise ModelError(
            f"'{checkpoint.name}' is not a causal language model that transformers can build "
            f"({(str(error).splitlines() or [''])[0][:200]})"
        ) from error


def find_units(model: nn.Module) -> Layout:
    """The layout of a model of fake tensors, which this leaves unusable for anything else.

    Call it under the `FakeTensorMode` that built the model.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    experts = {name: m for name, m in model.named_modules() if _is_packed_experts(m)}
    outer = _outer_units(model, names)
    placed = {site.parameter for unit in outer for site in unit.sites}
    trace = _trace(model, list(experts.values()))

    groups: dict[tuple[Any, ...], list[Site]] = {}
    reasons: dict[str, str] = {}
    for path, module in model.named_modules():
        if path in experts and experts[path].is_transposed is not None:
            groups[path, "experts"] = _expert_sites(path, module)
        elif isinstance(module, (nn.Linear, Conv1D)) and names[id(module.weight)] not in placed:
            reason = _why_not(path, module, model, trace)
            if reason is None:
                key = (path.rpartition(".")[0], trace.inputs[path])
                groups.setdefault(key, []).append(_linear_site(path, module))
            else:
                reasons[f"{path}.weight"] = reason

    active = _active(model.config) if hasattr(model, "config") else None
    blocks = [
        _unit("experts", sites, active) if key[1] == "experts" else _unit("linear", sites)
        for key, sites in groups.items()
    ]
    if not blocks:
        raise ModelError(
            "none of the model's layers can be quantized: "
            + (next(iter(reasons.values()), "it has no linear layers in decoder blocks"))
        )
    embedding = [unit for unit in outer if unit.kind == "embedding"]
    units = (*embedding, *blocks, *(unit for unit in outer if unit.kind == "head"))
    placed |= {site.parameter for unit in units for site in unit.sites}
    kept = tuple(
        Kept(name.removesuffix(".weight"), reasons.get(name) or _why_kept(name, model), p.numel())
        for name, p in model.named_parameters()
        if name not in placed and p.dim() > 1
    )
    total = sum(p.numel() for p in [*model.parameters(), *_saved_buffers(model)])
    return Layout(units, kept, total - sum(unit.numel for unit in units), trace.cache)


def _saved_buffers(model: nn.Module) -> list[torch.Tensor]:
    """What checkpoints hold beside parameters, such as a router's corrections."""
    saved = model.state_dict().keys()
    return [b for name, b in model.named_buffers() if name in saved and b.is_floating_point()]


@dataclass
class _Trace:
    inputs: dict[str, int]
    cache: tuple[CacheLayer, ...]
    failure: str | None


def _trace(model: nn.Module, experts: list[nn.Module]) -> _Trace:
    """Which tensor each linear reads: path to a number that equal inputs share."""
    seen: list[torch.Tensor] = []  # kept alive, so that no two tensors share an identity
    inputs: dict[str, int] = {}

    def watch(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen.append(args[0])
            inputs[path] = id(args[0])

        return hook

    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            module.register_forward_pre_hook(watch(path))
    for module in experts:  # their loops depend on data, which fake tensors don't have
        module.forward = lambda hidden, *_, **__: torch.empty_like(hidden)
    failure: str | None = None
    cache: tuple[CacheLayer, ...] = ()
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # it prints a traceback; the reason below is enough
    try:
        with torch.no_grad():
            outputs = model(torch.zeros(1, TRACED_TOKENS, dtype=torch.long), use_cache=True)
            cache = _cache_layers(outputs)
    except Exception as error:  # any model code may fail on fake tensors; what was seen stands
        failure = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
    finally:
        logger.setLevel(level)
    return _Trace(inputs, cache, failure)


def _cache_layers(outputs: Any) -> tuple[CacheLayer, ...]:
    """What each layer kept of the traced tokens; layers without keys keep a fixed state."""
    layers = getattr(getattr(outputs, "past_key_values", None), "layers", [])
    found = []
    for block, layer in enumerate(layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor):
            elements = (keys.numel() + values.numel()) // keys.shape[-2]
            shapes = [(t.shape[-3], t.shape[-1]) for t in (keys, values)]
            window = getattr(layer, "sliding_window", None)
            found.append(CacheLayer(elements, window, block, *shapes))
    return tuple(found)


def _is_packed_experts(module: nn.Module) -> bool:
    """Whether all weights of a layer's experts lie in this module's own 3-D parameters."""
    if type(module).__module__.startswith("torch.nn"):
        return False  # convolutions have 3-D weights too
    packed = [p for p in module.parameters(recurse=False) if p.dim() == 3]
    if not packed or len({p.shape[0] for p in packed}) != 1:
        return False
    if not hasattr(module, "is_transposed"):
        module.is_transposed = None  # type: ignore[assignment]  # a layout that we don't know
    return True


def _why_not(path: str, module: nn.Module, model: nn.Module, trace: _Trace) -> str | None:
    """Why a linear layer can't be placed, or None."""
    if not BLOCK_INDEX.search(path):
        return "a linear layer outside the decoder blocks"
    if _shape(module)[0] in {1, *_expert_numbers(path, model)} and _expert_numbers(path, model):
        return ROUTER
    if path not in trace.inputs:
        return (
            f"the forward pass could not be traced ({trace.failure})"
            if trace.failure
            else "not used in a forward pass"
        )
    return None


def _why_kept(parameter: str, model: nn.Module) -> str:
    """Why a parameter that isn't a linear layer's stays as it is."""
    path = parameter.rpartition(".")[0]
    module = model.get_submodule(path)
    if _is_packed_experts(module):
        return "packed experts whose layout is unknown, or their bias"
    if model.get_parameter(parameter).shape[0] in _expert_numbers(path, model):
        return ROUTER
    return f"a parameter of {type(module).__name__}, which is not a linear layer"


def _expert_numbers(path: str, model: nn.Module) -> set[int]:
    """How many experts the packed siblings of the module at `path` hold; empty without any."""
    parent = model.get_submodule(path.rpartition(".")[0])
    return {
        parameter.shape[0]
        for child in parent.children()
        if _is_packed_experts(child)
        for parameter in child.parameters(recurse=False)
        if parameter.dim() == 3
    }


def _outer_units(model: Any, names: dict[int, str]) -> list[Unit]:
    """Embedding and head; one unit where they are tied."""
    paths = {id(m): path for path, m in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    sites: dict[UnitKind, list[Site]] = {}
    if embedding is not None:
        sites["embedding"] = [_outer_site(paths[id(embedding)], embedding, names)]
    if head is not None:
        tied = embedding is not None and head.weight is embedding.weight
        sites.setdefault("embedding" if tied else "head", []).append(
            _outer_site(paths[id(head)], head, names)
        )
    return [_unit(kind, members) for kind, members in sites.items()]


def _outer_site(path: str, module: Any, names: dict[int, str]) -> Site:
    return Site(path, names[id(module.weight)], tuple(module.weight.shape))


def _linear_site(path: str, module: nn.Module) -> Site:
    return Site(path, f"{path}.weight", _shape(module), isinstance(module, Conv1D))


def _shape(module: nn.Module) -> tuple[int, int]:
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def _expert_sites(path: str, module: nn.Module) -> list[Site]:
    transposed = bool(module.is_transposed)
    sites = []
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() == 3:
            number, rows, columns = parameter.shape
            shape = (number, columns, rows) if transposed else (number, rows, columns)
            sites.append(Site(f"{path}.{name}", f"{path}.{name}", shape, transposed))
    return sites


def _active(config: Any) -> int | None:
    """How many experts a token goes to."""
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in EXPERTS_PER_TOKEN)
    return next((int(value) for value in found if value is not None), None)


def _unit(kind: UnitKind, sites: list[Site], active: int | None = None) -> Unit:
    index = BLOCK_INDEX.search(sites[0].name) if kind in ("linear", "experts") else None
    return Unit(
        unit_name(site.name for site in sites),
        kind,
        tuple(sites),
        int(index.group(1)) if index else None,
        active,
    )

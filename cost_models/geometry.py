"""What the roofline must know of a model beside its layout, from its configuration alone.

A layout says which matrices there are; how many heads attend and over how many tokens is in the
transformers configuration. No weight is read and no torch imported.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quantization.errors import ModelError
from quantization.units import EXPERTS_PER_TOKEN, Layout


@dataclass(frozen=True)
class LayerGeometry:
    """How one decoder block attends.

    Args:
        heads: query heads; 0 for a block without attention (linear attention, state spaces).
        kv_heads: heads that keys and values have, which share the query heads evenly (GQA).
        head_dim: numbers of a query and of a key, each head.
        value_dim: numbers of a value, each head.
        window: tokens that a query sees; None for all.
        cache_elements: numbers that the cache keeps for each token.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None
    cache_elements: int


@dataclass(frozen=True)
class Geometry:
    """A model's sizes.

    Args:
        layers: one entry for each decoder block.
        hidden: width of the residual stream.
        intermediate: inputs of the MLP's last matrix, all active experts together.
        vocab: rows of the embedding.
        experts_per_token: routed experts that each token visits; None for dense models.
    """

    layers: tuple[LayerGeometry, ...]
    hidden: int
    intermediate: int
    vocab: int
    experts_per_token: int | None = None


def geometry_of(config: Any, layout: Layout) -> Geometry:
    """The geometry of a transformers configuration (of its text part, if it has several).

    Raises:
        ModelError: a size is missing, or experts whose number for each token isn't given.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden = int(_first(text, ("hidden_size",)))
    active = _experts(text, layout)
    blocks = 1 + max((unit.layer for unit in layout.units if unit.layer is not None), default=-1)
    return Geometry(
        layers=_layers(text, layout, hidden, blocks),
        hidden=hidden,
        intermediate=_intermediate(text, hidden, active),
        vocab=int(_first(text, ("vocab_size",))),
        experts_per_token=active,
    )


def _layers(text: Any, layout: Layout, hidden: int, blocks: int) -> tuple[LayerGeometry, ...]:
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * blocks
    attending = ["attention" in kind and "linear" not in kind for kind in kinds[:blocks]]
    traced = iter(layout.cache) if len(layout.cache) == sum(attending) else None
    layers = []
    for index in range(blocks):
        if not attending[index]:
            layers.append(LayerGeometry(0, 0, 0, 0, None, 0))
            continue
        heads = int(_at(_first(text, ("num_attention_heads",)), index))
        groups = int(_at(_kv_heads(text, heads), index) or heads)
        key, value = _head_dims(text, hidden, heads, index)
        window = _window(text, kinds[index])
        elements = groups * (key + value)
        if traced is not None:  # what the forward pass really kept outranks the configuration
            layer = next(traced)
            window, elements = layer.window, layer.elements
        layers.append(LayerGeometry(heads, groups, key, value, window, elements))
    return tuple(layers)


def _kv_heads(text: Any, heads: int) -> Any:
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        return 1
    for name in ("num_key_value_heads", "num_kv_heads"):
        value = getattr(text, name, None)
        if value is not None:
            return value
    return heads


def _head_dims(text: Any, hidden: int, heads: int, index: int) -> tuple[int, int]:
    """Widths of a key and of a value; latent attention (MLA) names both in parts."""
    plain = _at(getattr(text, "head_dim", None), index) or hidden // heads
    rope, rest = getattr(text, "qk_rope_head_dim", None), getattr(text, "qk_nope_head_dim", None)
    key = rope + rest if rope is not None and rest is not None else plain
    return int(key), int(getattr(text, "v_head_dim", None) or plain)


def _window(text: Any, kind: str) -> int | None:
    window = getattr(text, "sliding_window", None)
    if kind == "sliding_attention":
        return window
    typed = getattr(text, "layer_types", None) is not None
    return None if typed or not getattr(text, "use_sliding_window", True) else window


def _experts(text: Any, layout: Layout) -> int | None:
    if not any(unit.kind == "experts" for unit in layout.units):
        return None
    return int(_first(text, EXPERTS_PER_TOKEN))


def _intermediate(text: Any, hidden: int, active: int | None) -> int:
    """The MLP's inner width, 4 x hidden where the configuration is silent (GPT-2's default)."""
    if active is not None and getattr(text, "moe_intermediate_size", None):
        return active * int(_at(text.moe_intermediate_size, 0))
    width = int(_at(getattr(text, "intermediate_size", None), 0) or 4 * hidden)
    return width * (active or 1)


def _at(value: Any, index: int) -> Any:
    """A size of one layer, where a configuration may give a list with one for each."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return value[min(index, len(value) - 1)]
    return value


def _first(text: Any, names: Sequence[str]) -> Any:
    for name in names:
        value = getattr(text, name, None)
        if value is not None:
            return value
    kind = getattr(text, "model_type", type(text).__name__)
    raise ModelError(
        f"the configuration of '{kind}' has no {' or '.join(names)}, which times can't be computed "
        "without; ask for bytes alone, or for measured times"
    )

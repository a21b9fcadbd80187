"""llama.cpp: every tensor of a GGUF file may have a type of its own.

Rules: it serves ggml's types and bf16, weights only; it fuses nothing, so units need not be split
for it, and may be. Bytes: blocks of the stored type, vectors in float32, no padding counted.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engines.base import Cell, Engine, Exercise, Export, Run, Target, Timing
from engines.declared import Declared
from engines.neutral_map import NeutralMap
from quantization.checkpoints import Checkpoint, load_config
from quantization.errors import ExportError
from quantization.schemes import FULL_PRECISION, Scheme
from quantization.units import KEYS, VALUES, Layout, Site, Unit, cache_slot

if TYPE_CHECKING:
    from engines.gguf_file import Stored
    from evaluation.evaluator import Evaluator

PREFIX = "gguf-"
CACHE_BLOCK = 32
LOSSLESS = {"int4-g32": "q4_0", "int8-g32": "q8_0"}
"""Formats of ours that are ggml's blocks in another order, by ggml's name."""
FILE_NAME, TYPES_NAME = "model.gguf", "tensor-types.txt"
TOLERANCE, NOISE_NATS = 0.05, 0.02
"""Of the KL: llama.cpp rounds activations to 8 bits in each product, which the candidate doesn't."""


class LlamaCpp(Declared, Engine):
    """llama.cpp on this machine's CPU, through the xllamacpp wheel."""

    reference = Scheme("gguf-q8_0")
    reference_cell = Cell((1024, 1024), "q8_0", 1)
    most_batch = 64  # of older builds; newer ones take 256

    def __init__(self) -> None:
        super().__init__("llama.cpp")

    def check(self, config: Any) -> None:
        """See `Engine.check`."""
        from engines.gguf_file import family_of

        family_of(config)

    def refusal(self, site: Site, scheme: Scheme) -> str | None:
        """See `Engine.refusal`."""
        if scheme.activation != FULL_PRECISION:
            return (
                f"llama.cpp chooses how activations are rounded; {scheme.activation} can't be set"
            )
        return super().refusal(site, scheme)

    def presets(self, config: Any, layout: Layout) -> Mapping[str, Mapping[str, str]]:
        """See `Rules.presets`: `Q4_K_M` and its kin."""
        from engines.llama_presets import preset_types

        if any(unit.kind == "experts" for unit in layout.units):
            return {}  # rules of their own, which aren't known here
        return {
            name: {parameter: f"{PREFIX}{type}" for parameter, type in types.items()}
            for name, types in preset_types(config, layout).items()
        }

    def kernel(self, scheme: Scheme, shape: tuple[int, ...]) -> str:
        """See `Engine.kernel`: ggml's type."""
        if scheme.weight == FULL_PRECISION:
            return FULL_PRECISION
        if scheme.weight in LOSSLESS:
            return LOSSLESS[scheme.weight]
        from quantization.formats import FORMATS
        from quantization.formats.gguf import GGUFFormat

        format = FORMATS[scheme.weight]
        assert isinstance(format, GGUFFormat)
        return format.stored_type(shape)

    def cache_types(self, layout: Layout, schemes: Sequence[Scheme]) -> tuple[str, str]:
        """The types of all keys and of all values; float16 where the map doesn't say.

        Raises:
            ExportError: layers differ.
        """
        found: dict[str, dict[str, str]] = {KEYS: {}, VALUES: {}}
        for unit, scheme in zip(layout.units, schemes, strict=True):
            type = LOSSLESS.get(scheme.weight, scheme.weight.removeprefix(PREFIX))
            for site in unit.sites if unit.kind == "cache" else ():
                kind = cache_slot(site)[1]
                found[kind].setdefault("f16" if type == FULL_PRECISION else type, site.name)
        for types in found.values():
            if len(types) > 1:
                (first, one), (second, two), *_ = types.items()
                raise ExportError(
                    f"llama.cpp keeps all keys in one type, and all values: {one} is in {first} and "
                    f"{two} in {second}; search with --engine llama.cpp for maps that it can serve"
                )
        keys, values = (next(iter(found[kind]), "f16") for kind in (KEYS, VALUES))
        return keys, values

    def unit_refusal(self, unit: Unit, scheme: Scheme) -> str | None:
        """See `Rules.unit_refusal`; caches have blocks of 32."""
        if unit.kind == "cache" and not scheme.exact:
            wrong = [site for site in unit.sites if site.shape[-1] % CACHE_BLOCK]
            if wrong:
                return f"heads of {wrong[0].shape[-1]} numbers don't divide into blocks of {CACHE_BLOCK}"
        return super().unit_refusal(unit, scheme)

    def cache_refusal(self, scheme: Scheme) -> str | None:
        """See `Rules.cache_refusal`; what it stores in another order will do."""
        return None if scheme.weight in LOSSLESS else super().cache_refusal(scheme)

    def other_bytes(self, layout: Layout, config: Any = None) -> int:
        """See `Engine.other_bytes`: what isn't in a unit, and Llama 3's divisors, in float32."""
        from engines.gguf_file import rope_divisors

        return 4 * (layout.other_numel + (0 if config is None else len(rope_divisors(config))))

    def kernel_version(self) -> str:
        """See `Engine.kernel_version`."""
        from engines.llama_library import kernel_version

        return kernel_version()

    def time_cells(
        self, cells: Sequence[Cell], threads: int, usual_s: float | None
    ) -> list[Timing]:
        """See `Engine.time_cells`."""
        from engines.llama_cells import time_products

        return time_products(cells, self.reference_cell, threads, usual_s)

    def time_map(
        self,
        checkpoint: Checkpoint,
        layout: Layout,
        schemes: Sequence[Scheme],
        reference: Sequence[Scheme],
        exercise: Exercise,
    ) -> tuple[Run, Run]:
        """See `Engine.time_map`."""
        from engines.llama_runs import time_beside

        own, beside = (
            {
                site.parameter: self.kernel(scheme, site.shape)
                for unit, scheme in zip(layout.units, found, strict=True)
                for site in unit.stored
            }
            for found in (schemes, reference)
        )
        caches = self.cache_types(layout, schemes)
        counter, _ = self.counter()
        return time_beside(checkpoint, layout, own, beside, exercise, caches, counter)


class GGUFFile(Target):
    """Writes `model.gguf` with the bank's own bytes, and reads it back with llama.cpp."""

    name = "gguf"
    engine = "llama.cpp"
    needs_model = True

    def refuse(self, export: Export) -> None:
        """See `Target.refuse`."""
        from engines.reload import check_served

        assert export.evaluator is not None
        bank = export.evaluator.bank
        check_served(LlamaCpp(), bank.checkpoint, bank.layout, export.precision_map.schemes)

    def write(self, export: Export, folder: Path) -> None:
        """See `Target.write`."""
        from engines.gguf_file import write_gguf

        assert export.evaluator is not None
        tensors = list(stored_tensors(export.evaluator, export.precision_map.schemes))
        checkpoint = export.evaluator.bank.checkpoint
        write_gguf(folder / FILE_NAME, checkpoint, tensors)
        (folder / TYPES_NAME).write_text(_types(checkpoint, tensors))
        NeutralMap().write(export, folder)

    def check(self, export: Export, folder: Path) -> dict[str, Any]:
        """Load with llama.cpp, count bytes, and compare its logits with the unquantized model's."""
        from engines.gguf_file import tensor_bytes
        from engines.llama_reload import compared
        from engines.reload import predicted_bytes

        assert export.evaluator is not None
        assert export.chunks is not None
        assert export.measured_kl is not None
        bank, schemes = export.evaluator.bank, export.precision_map.schemes
        expected = predicted_bytes(LlamaCpp(), bank.checkpoint, bank.layout, schemes)
        written = tensor_bytes(folder / FILE_NAME)
        if written != expected:
            raise ExportError(f"the file holds {written:,} bytes of tensors, not {expected:,}")
        caches = LlamaCpp().cache_types(bank.layout, schemes)
        found = compared(export.evaluator, schemes, folder / FILE_NAME, export.chunks, caches)
        if not found["tokens_agree"] and not bank.checkpoint.name.endswith(".gguf"):
            raise ExportError("llama.cpp splits text otherwise than the model's own tokenizer")
        measured, kl = export.measured_kl, found["reloaded_kl"]
        if not abs(kl - measured) <= TOLERANCE * measured + NOISE_NATS:
            raise ExportError(
                f"llama.cpp computes a KL of {kl:.5f} nats per token where {measured:.5f} was "
                "measured; nothing was exported"
            )
        return {
            "measured_kl": measured,
            **found,
            "chunks": len(export.chunks),
            "weight_bytes": written,
            "serve": f"llama-server -m {FILE_NAME}{_cache_flags(caches)}",
            "requantize": _requantize(schemes),
        }


def stored_tensors(evaluator: "Evaluator", schemes: Sequence[Scheme]) -> Iterator["Stored"]:
    """Every tensor of the file: units as the bank has them, the rest in float32.

    Raises:
        ExportError: llama.cpp doesn't serve a unit's scheme; the units are named.
    """
    from engines.gguf_file import F32, Stored, parts_of
    from engines.reload import check_served

    bank, engine = evaluator.bank, LlamaCpp()
    check_served(engine, bank.checkpoint, bank.layout, schemes)
    held: dict[str, NDArray[np.uint8]] = {}
    engine.cache_types(bank.layout, schemes)
    for unit, scheme in zip(bank.layout.units, schemes, strict=True):
        for site in unit.stored:

            def read(
                unit: Any = unit, scheme: Scheme = scheme, site: Site = site
            ) -> NDArray[np.uint8]:
                if site.parameter not in held:  # the parts of a site come one after another
                    held.clear()
                    found = _bytes_of(bank.packed_parameters(unit, scheme, site.parameter))
                    held[site.parameter] = found.reshape(*site.shape[:-1], -1)
                return held[site.parameter]

            for name, shape, rows in parts_of(site):

                def part(
                    read: Callable[[], NDArray[np.uint8]] = read, rows: slice = rows
                ) -> NDArray[np.uint8]:
                    return np.ascontiguousarray(read()[..., rows, :])

                yield Stored(name, engine.kernel(scheme, site.shape), shape, part)
    for name, tensor in bank.rest().items():
        values = tensor.float().contiguous().numpy()
        yield Stored(name, F32, values.shape, lambda values=values: values.view(np.uint8))  # type: ignore[misc]


def _types(checkpoint: Checkpoint, tensors: Sequence["Stored"]) -> str:
    """What `llama-quantize --tensor-type-file` reads: a pattern and a type a line."""
    from engines.gguf_file import F32, tensor_names

    name_of = tensor_names(load_config(checkpoint))
    rows = [(name_of(t.parameter), t.type) for t in tensors if t.type != F32]
    return "".join(f"^{re.escape(name)}$={type}\n" for name, type in rows)


def _bytes_of(packed: Any) -> NDArray[np.uint8]:
    """Rows of ggml's blocks."""
    if packed.format in LOSSLESS:
        from engines.llama_blocks import blocks

        own: NDArray[np.uint8] = blocks(packed).numpy()
        return own
    (tensor,) = packed.tensors.values()
    found: NDArray[np.uint8] = tensor.view(_uint8()).numpy()
    return found


def _requantize(schemes: Sequence[Scheme]) -> str:
    """The command that makes the same types of an original; some want an importance matrix."""
    imatrix = any(scheme.weight.startswith(f"{PREFIX}iq") for scheme in schemes)
    known = " --imatrix IMATRIX.gguf" if imatrix else ""
    return f"llama-quantize{known} --tensor-type-file {TYPES_NAME} ORIGINAL.gguf OUT.gguf q8_0"


def _cache_flags(caches: tuple[str, str]) -> str:
    """What llama.cpp is told of the KV cache; quantized values need flash attention."""
    flags = "".join(
        f" --cache-type-{kind} {type}"
        for kind, type in zip("kv", caches, strict=True)
        if type != "f16"
    )
    return f"{flags} --flash-attn on" if caches[1] != "f16" else flags


def _uint8() -> Any:
    import torch

    return torch.uint8

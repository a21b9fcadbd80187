"""llama.cpp: every tensor of a GGUF file may have a type of its own.

Rules: it serves ggml's types and bf16, weights only; it fuses nothing, so units need not be split
for it, and may be. Bytes: blocks of the stored type, vectors in float32, no padding counted.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engines.base import Cell, Engine, Exercise, Export, Run, Target, Timing
from engines.neutral_map import NeutralMap
from quantization.checkpoints import Checkpoint, load_config
from quantization.errors import ExportError
from quantization.schemes import FULL_PRECISION, Scheme
from quantization.units import Layout, Site

if TYPE_CHECKING:
    from engines.gguf_file import Stored
    from evaluation.evaluator import Evaluator

PREFIX = "gguf-"
FILE_NAME = "model.gguf"
TOLERANCE, NOISE_NATS = 0.05, 0.02
"""Of the KL: llama.cpp rounds activations to 8 bits in each product, which the candidate doesn't."""


class LlamaCpp(Engine):
    """llama.cpp on this machine's CPU, through the xllamacpp wheel."""

    name = "llama.cpp"
    fuses = False
    reference = Scheme("gguf-q8_0")
    reference_cell = Cell((1024, 1024), "q8_0", 1)

    def check(self, config: Any) -> None:
        """See `Engine.check`."""
        from engines.gguf_file import family_of

        family_of(config)

    def refusal(self, site: Site, scheme: Scheme) -> str | None:
        """See `Engine.refusal`."""
        if len(site.shape) != 2 or site.transposed:
            return "packed experts and transposed weights aren't written to GGUF files yet"
        if scheme.activation != FULL_PRECISION:
            return (
                f"llama.cpp chooses how activations are rounded; {scheme.activation} can't be set"
            )
        if scheme.weight == FULL_PRECISION or scheme.weight.startswith(PREFIX):
            return None
        return f"llama.cpp has no {scheme.weight}; its types are gguf-q4_K and so on"

    def kernel(self, scheme: Scheme, shape: tuple[int, ...]) -> str:
        """See `Engine.kernel`: ggml's type."""
        if scheme.weight == FULL_PRECISION:
            return FULL_PRECISION
        from quantization.formats import FORMATS
        from quantization.formats.gguf import GGUFFormat

        format = FORMATS[scheme.weight]
        assert isinstance(format, GGUFFormat)
        return format.stored_type(shape)

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
        return time_beside(checkpoint, layout, own, beside, exercise)


class GGUFFile(Target):
    """Writes `model.gguf` with the bank's own bytes, and reads it back with llama.cpp."""

    name = "gguf"
    needs_model = True

    def write(self, export: Export, folder: Path) -> None:
        """See `Target.write`."""
        from engines.gguf_file import write_gguf

        assert export.evaluator is not None
        tensors = list(stored_tensors(export.evaluator, export.precision_map.schemes))
        write_gguf(folder / FILE_NAME, export.evaluator.bank.checkpoint, tensors)
        NeutralMap().write(export, folder)

    def check(self, export: Export, folder: Path) -> dict[str, Any]:
        """Load with llama.cpp, count bytes, and compare its logits with the unquantized model's."""
        from engines.gguf_file import tensor_bytes

        assert export.evaluator is not None
        assert export.chunks is not None
        assert export.measured_kl is not None
        bank, engine = export.evaluator.bank, LlamaCpp()
        layout = bank.layout
        expected = engine.other_bytes(layout, load_config(bank.checkpoint)) + sum(
            engine.nbytes(scheme, site.shape)
            for unit, scheme in zip(layout.units, export.precision_map.schemes, strict=True)
            for site in unit.stored
        )
        written = tensor_bytes(folder / FILE_NAME)
        if written != expected:
            raise ExportError(f"the file holds {written:,} bytes of tensors, not {expected:,}")
        kl, agreed = _compared(export.evaluator, folder / FILE_NAME, export.chunks)
        if not agreed and not bank.checkpoint.name.endswith(".gguf"):
            raise ExportError("llama.cpp splits text otherwise than the model's own tokenizer")
        measured = export.measured_kl
        if not abs(kl - measured) <= TOLERANCE * measured + NOISE_NATS:
            raise ExportError(
                f"llama.cpp computes a KL of {kl:.5f} nats per token where {measured:.5f} was "
                "measured; nothing was exported"
            )
        return {
            "measured_kl": measured,
            "reloaded_kl": kl,
            "chunks": len(export.chunks),
            "weight_bytes": written,
            "tokens_agree": agreed,
            "serve": f"llama-server -m {FILE_NAME}",
        }


def stored_tensors(evaluator: "Evaluator", schemes: Sequence[Scheme]) -> Iterator["Stored"]:
    """Every tensor of the file: units as the bank has them, the rest in float32.

    Raises:
        ExportError: llama.cpp doesn't serve a unit's scheme; the units are named.
    """
    from engines.gguf_file import F32, Stored

    bank, engine = evaluator.bank, LlamaCpp()
    units = list(zip(bank.layout.units, schemes, strict=True))
    wrong = [
        f"{unit.name}: {why}"
        for unit, scheme in units
        for why in (engine.refusal(unit.stored[0], scheme),)
        if why
    ]
    if wrong:
        more = f" (and {len(wrong) - 2} more)" if len(wrong) > 2 else ""
        raise ExportError(
            f"llama.cpp can't serve {len(wrong)} units: {'; '.join(wrong[:2])}{more}; "
            "search with --engine llama.cpp for maps that it can"
        )
    for unit, scheme in units:
        for site in unit.stored:

            def read(
                unit: Any = unit, scheme: Scheme = scheme, name: str = site.parameter
            ) -> NDArray[np.uint8]:
                (tensor,) = bank.packed_parameters(unit, scheme, name).tensors.values()
                found: NDArray[np.uint8] = tensor.view(_uint8()).numpy()
                return found

            yield Stored(site.parameter, engine.kernel(scheme, site.shape), site.shape, read)
    for name, tensor in bank.rest().items():
        values = tensor.float().contiguous().numpy()
        yield Stored(name, F32, values.shape, lambda values=values: values.view(np.uint8))  # type: ignore[misc]


def _uint8() -> Any:
    import torch

    return torch.uint8


def _compared(evaluator: "Evaluator", file: Path, chunks: NDArray[np.int64]) -> tuple[float, bool]:
    """KL from the unquantized model to llama.cpp on a file, and whether both split text alike."""
    import torch

    from engines.gguf_tokenizer import agrees
    from engines.llama_library import LlamaModel

    total = tokens = 0.0
    length = chunks.shape[1]
    with LlamaModel(file, torch.get_num_threads(), context=length, batch=length) as model:
        agreed = agrees(model, evaluator.bank.checkpoint)
        for ids in chunks:
            found = torch.from_numpy(model.logits(ids)[:-1])
            wanted = evaluator.reference_logits(ids)[:-1]
            log_p, log_q = wanted.log_softmax(-1), found[:, : wanted.shape[1]].log_softmax(-1)
            total += float((log_p.exp() * (log_p - log_q)).sum())
            tokens += len(found)
    return total / tokens, agreed

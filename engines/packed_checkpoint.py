"""Our own checkpoint: a map's packed tensors as the kernels of this project multiply by them.

A parameter's tensors are called `PARAMETER|TENSOR`; what isn't quantized keeps its name and is in
bfloat16. `load_packed` makes a model of transformers from it:

    from engines.packed_checkpoint import load_packed
    model = load_packed("DIR")
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from engines.base import Export, Rules
from engines.checkpoint_files import assembled
from engines.checkpoint_target import CheckpointTarget
from engines.file_names import Places
from quantization.errors import ModelError
from quantization.formats import FORMATS, Packed
from quantization.kernels.packed_weight import PackedWeight
from quantization.schemes import FULL_PRECISION, Scheme
from quantization.units import Layout, Site, Unit

MARK = "bitfront"
"""Under which the files say what is packed: parameter to format, shape and whether transposed."""


class PackedFiles(Rules):
    """What `load_packed` puts together: any format of this project."""

    name = "packed"
    fuses = False

    def refusal(self, site: Site, scheme: Scheme) -> str | None:
        """See `Rules.refusal`; the map beside the files says how activations are rounded."""
        return FORMATS[scheme.weight].refusal(site.shape)

    def cache_refusal(self, scheme: Scheme) -> str | None:
        """None: the map says that, too (`evaluation.caches`)."""
        return None


class PackedCheckpoint(CheckpointTarget):
    """Writes the bank's packed bytes, and multiplies by them to read them back."""

    name = "packed"
    engine = "packed"
    rules = PackedFiles()

    def stored(self, packed: Packed) -> dict[str, Tensor]:
        """See `CheckpointTarget.stored`."""
        return packed.tensors

    def name_of(self, parameter: str, name: str) -> str:
        """See the module."""
        return f"{parameter}|{name}"

    def config_of(self, layout: Layout, schemes: Sequence[Scheme]) -> dict[str, Any]:
        """Nothing: the files of tensors say it."""
        return {}

    def metadata(self, layout: Layout, schemes: Sequence[Scheme]) -> Mapping[str, str]:
        """Format, shape and whether transposed, of each packed parameter."""
        packed = {
            site.parameter: [scheme.weight, site.shape, site.transposed]
            for unit, scheme in zip(layout.units, schemes, strict=True)
            for site in unit.stored
            if scheme.weight != FULL_PRECISION
        }
        return {MARK: json.dumps(packed)}

    def _check_split(self, experts: Sequence[Unit], places: Places) -> None:
        """Nothing is taken apart."""

    def places(self, module: Any) -> Places:
        """See `CheckpointTarget.places`: all is as it is in the model."""
        return {}

    def load(self, export: Export, folder: Path) -> nn.Module:
        """See `load_packed`."""
        assert export.evaluator is not None
        bank = export.evaluator.bank
        trusted = bank.checkpoint.trust_remote_code
        return load_packed(folder, bank.dtype, trust_remote_code=trusted)


def load_packed(
    folder: Path | str, dtype: torch.dtype = torch.bfloat16, *, trust_remote_code: bool = False
) -> nn.Module:
    """The model of a folder, whose linear layers multiply by packed bytes.

    Args:
        folder: as the target `packed` writes it.
        dtype: of everything else, and of the activations.
        trust_remote_code: run the folder's own code.

    Raises:
        ModelError: not such a folder.
    """
    packed: dict[str, Any] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            packed |= json.loads((opened.metadata() or {}).get(MARK, "{}"))
    if not packed:
        raise ModelError(f"'{folder}' holds no packed checkpoint of this project")

    def value_of(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        format, shape, transposed = packed[name]
        parts = {k.split("|")[1]: t for k, t in tensors.items() if k.startswith(f"{name}|")}
        return PackedWeight(Packed(format, tuple(shape), parts), dtype, transposed)

    module = assembled(
        folder, dtype, value_of, places=lambda _: {}, trust_remote_code=trust_remote_code
    )
    return _looked_up(module)


def _looked_up(module: Any) -> nn.Module:
    """With a plain embedding: looking into packed bytes would dequantize all of them each time."""
    embedding = module.get_input_embeddings()
    if isinstance(embedding.weight.data, PackedWeight):
        plain = nn.Parameter(embedding.weight.data.dequantize(), requires_grad=False)
        embedding.weight = plain
        module.tie_weights()
    found: nn.Module = module
    return found

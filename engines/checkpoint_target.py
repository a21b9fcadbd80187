"""Targets that are checkpoint folders: the bank's bytes under another format's names.

A target says how a matrix lies in its files and what the configuration tells; the rest is here.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engines.base import Export, Rules, Target
from engines.checkpoint_files import write_checkpoint
from engines.file_names import Places, as_files_call, places_in, places_of
from engines.neutral_map import NeutralMap
from engines.reload import check_bytes, check_losses, check_served
from quantization.errors import BitfrontError, ExportError
from quantization.formats import Packed
from quantization.schemes import FULL_PRECISION, Scheme
from quantization.units import Layout, Unit
from quantization.weights import skeleton

if TYPE_CHECKING:
    from quantization.bank import Bank


class CheckpointTarget(Target):
    """A checkpoint with a matrix's tensors under its module's name."""

    needs_model = True
    dtype = torch.bfloat16
    """Of what isn't quantized."""

    @property
    @abstractmethod
    def rules(self) -> Rules:
        """What it can hold, and the bytes of that."""

    def stored_in(self, scheme: Scheme, packed: Packed) -> dict[str, Tensor]:
        """`stored`, where activations change what is stored."""
        return self.stored(packed)

    @abstractmethod
    def stored(self, packed: Packed) -> dict[str, Tensor]:
        """The tensors of a quantized matrix, by their names behind the module's."""

    @abstractmethod
    def config_of(self, layout: Layout, schemes: Sequence[Scheme]) -> dict[str, Any]:
        """What the model's configuration says of the map."""

    @abstractmethod
    def load(self, export: Export, folder: Path) -> Any:
        """What the target's own loader makes of the folder: a model of transformers."""

    def remarks(self, export: Export, folder: Path) -> dict[str, Any]:
        """What else users should know, such as `serve`."""
        return {}

    def quantizes_inputs(self, export: Export) -> bool:
        """Whether what `load` gives quantizes activations by itself, as the checkpoint says."""
        return False

    def refuse(self, export: Export) -> None:
        """See `Target.refuse`."""
        assert export.evaluator is not None
        bank, schemes = export.evaluator.bank, export.precision_map.schemes
        check_served(self.rules, bank.checkpoint, bank.layout, schemes)
        units = zip(bank.layout.units, schemes, strict=True)
        experts = [unit for unit, s in units if unit.kind == "experts" and not s.exact]
        if experts:
            self._check_split(experts, self.places(skeleton(bank.checkpoint, bank.dtype)))

    def write(self, export: Export, folder: Path) -> None:
        """See `Target.write`."""
        self.refuse(export)
        assert export.evaluator is not None
        bank, schemes = export.evaluator.bank, export.precision_map.schemes
        places = self.places(skeleton(bank.checkpoint, bank.dtype))
        named = as_files_call(bank.layout, places)
        config = {"dtype": self.dtype, **self.config_of(named, schemes)}
        metadata = self.metadata(bank.layout, schemes)
        tensors = self._tensors(bank, schemes, places)
        write_checkpoint(folder, bank.checkpoint, tensors, config, metadata)
        NeutralMap().write(export, folder)

    def check(self, export: Export, folder: Path) -> dict[str, Any]:
        """Count bytes, and compare the loss of what is loaded."""
        written = check_bytes(export, self.rules, folder)
        try:
            loaded = self.load(export, folder)
        except BitfrontError:
            raise
        except Exception as error:  # of other people's loaders
            raise ExportError(
                f"what was written for {self.name} can't be loaded ({type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else ''}); nothing was exported"
            ) from error
        found = check_losses(export, loaded, quantizes_inputs=self.quantizes_inputs(export))
        return {**found, "weight_bytes": written, **self.remarks(export, folder)}

    def metadata(self, layout: Layout, schemes: Sequence[Scheme]) -> Mapping[str, str]:
        """What each file of tensors says of itself."""
        return {}

    def name_of(self, parameter: str, name: str) -> str:
        """A tensor's name in the file."""
        return f"{parameter.removesuffix('.weight')}.{name}"

    def _check_split(self, experts: Sequence[Unit], places: Places) -> None:
        """Refuse experts that files hold otherwise than one by one."""
        for site in (site for unit in experts for site in unit.sites):
            if site.parameter not in places:
                raise ExportError(
                    f"{site.name} isn't stored expert by expert in files of this kind of model, "
                    f"which is all that {self.name} is written for; pin it to {FULL_PRECISION}, or "
                    "export to packed"
                )

    def places(self, module: Any) -> Places:
        """What its files hold of a model of transformers, where that differs from the model."""
        return places_of(module)

    def _tensors(
        self, bank: "Bank", schemes: Sequence[Scheme], places: Places
    ) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the checkpoint."""
        for unit, scheme in zip(bank.layout.units, schemes, strict=True):
            for site in unit.stored:
                made = bank.packed_parameters(unit, scheme, site.parameter)
                own = places_in(places, site.parameter)
                if scheme.weight == FULL_PRECISION:
                    values = made.tensors["values"].view(torch.bfloat16).to(self.dtype)
                    values = values.mT if site.transposed else values
                    yield from ((place.name, place.of(values)) for place in own)
                    continue
                for place in own:
                    for name, tensor in self.stored_in(scheme, place.packed(made)).items():
                        yield self.name_of(place.name, name), tensor
        for name, tensor in bank.rest().items():
            values = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
            for place in places_in(places, name):
                yield place.name, place.of(values)

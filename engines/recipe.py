"""Targets that are instructions: a tool reads them and quantizes the model itself.

Nothing of ours is in the file but which layer gets what; the tool's own rounding makes the weights.
"""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from engines.base import Export, Target
from engines.declared import BF16_SCALES
from engines.neutral_map import NeutralMap
from quantization.errors import ExportError
from quantization.formats import FORMATS
from quantization.schemes import FULL_PRECISION

EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
"""How their modules are called."""


class Recipe(Target):
    """A file of YAML (JSON is YAML) that names every layer.

    Attributes:
        file: its name.
        command: what to do with it.
    """

    needs_model = False
    file: str
    command: str

    @abstractmethod
    def arguments(self, format: str) -> Any:
        """What the tool calls a format; raises `ExportError` where it has no word for it."""

    @abstractmethod
    def format_of(self, arguments: Any) -> str:
        """Undo `arguments`; raises `ExportError` for what no format stands for."""

    @abstractmethod
    def document(self, formats: Mapping[str, str]) -> Any:
        """The file's content for the format of each module."""

    @abstractmethod
    def formats(self, document: Any) -> dict[str, str]:
        """Undo `document`."""

    def refuse(self, export: Export) -> None:
        """See `Target.refuse`."""
        _formats(export)

    def write(self, export: Export, folder: Path) -> None:
        """See `Target.write`."""
        text = yaml.safe_dump(self.document(_formats(export)), sort_keys=False)
        (folder / self.file).write_text(text)
        NeutralMap().write(export, folder)

    def check(self, export: Export, folder: Path) -> dict[str, Any]:
        """Read the file back: every module must have its format."""
        wanted = {name: canonical(format) for name, format in _formats(export).items()}
        found = self.formats(yaml.safe_load((folder / self.file).read_text()))
        differs = [name for name, format in wanted.items() if found.get(name) != format]
        if differs or len(found) != len(wanted):
            raise ExportError(
                f"{self.file} reads back otherwise, as at {differs[:1]}; this is a bug"
            )
        return {"modules": len(found), "serve": self.command}


def canonical(format: str) -> str:
    """A format without the type of its scales, which the tool decides."""
    return format.removesuffix(BF16_SCALES) if format in FORMATS else format


def matched(arguments: Mapping[str, Any], names: Mapping[str, Mapping[str, Any]]) -> str:
    """The name whose arguments these are.

    Raises:
        ExportError: none is.
    """
    for name, own in names.items():
        if own == {key: arguments.get(key) for key in own}:
            return name
    raise ExportError(f"no format here stands for {dict(arguments)}")


def _formats(export: Export) -> dict[str, str]:
    """Of each module that is multiplied."""
    quantized = {n: f for n, f in export.precision_map.caches.items() if f != FULL_PRECISION}
    if quantized:
        raise ExportError(
            f"this target can't be told of KV caches, as {next(iter(quantized))}; export to map, or to "
            "an engine that keeps them"
        )
    units = export.precision_map.weights
    if wrong := [u.name for u in units if u.scheme.activation != FULL_PRECISION]:
        raise ExportError(f"this target can't be told of activations, as of {wrong[0]}")
    found = {site: unit.scheme.weight for unit in units for site in unit.sites}
    looked_up = [name for name in found if name.endswith(EMBEDDINGS)]
    if wrong := [name for name in looked_up if found[name] != FULL_PRECISION]:
        raise ExportError(f"this target leaves embeddings alone, and {wrong[0]} is quantized")
    if wrong := [name for name in found if "experts" in name.split(".")]:
        raise ExportError(f"this target wants each expert by itself, and {wrong[0]} is all of them")
    kept = {entry.name: FULL_PRECISION for entry in export.precision_map.kept}
    return kept | {name: format for name, format in found.items() if name not in looked_up}

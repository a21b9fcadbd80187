"""The neutral precision map as JSON: what every other tool can be told. Template for a target."""

from pathlib import Path
from typing import Any

from engines.base import Export, Target
from quantization.errors import ExportError
from quantization.precision_map import PrecisionMap

FILE_NAME = "precision_map.json"


class NeutralMap(Target):
    """Writes `precision_map.json`."""

    name = "map"
    needs_model = False

    def write(self, export: Export, folder: Path) -> None:
        """See `Target.write`."""
        (folder / FILE_NAME).write_text(export.precision_map.to_json())

    def check(self, export: Export, folder: Path) -> dict[str, Any]:
        """Read the file back: schema, content hash and every entry must be the same."""
        if PrecisionMap.read(folder / FILE_NAME) != export.precision_map:
            raise ExportError(f"{folder / FILE_NAME} reads back differently; this is a bug")
        return {"map_hash": export.precision_map.map_hash}

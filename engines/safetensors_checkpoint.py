"""A safetensors checkpoint of the dequantized weights, for transformers and all that read it.

It holds the candidate's exact values in the arithmetic type they were measured in, so whatever
loads it computes what was measured. It doesn't save space: that is what packed targets are for.
"""

from pathlib import Path
from typing import Any

from engines.base import Export, Target
from engines.neutral_map import NeutralMap
from engines.reload import check_losses, reload
from quantization.checkpoints import load_tokenizer, readable


class SafetensorsCheckpoint(Target):
    """Writes model, configuration, tokenizer and the precision map that made them."""

    name = "safetensors"
    needs_model = True

    def write(self, export: Export, folder: Path) -> None:
        """See `Target.write`."""
        evaluator = export.evaluator
        assert evaluator is not None
        units = range(len(evaluator.bank.layout.units))
        evaluator.model.reload(units, export.precision_map.schemes)  # never packed
        module = evaluator.model.module
        module.config.dtype = evaluator.bank.dtype
        with readable(str(folder)):
            module.save_pretrained(folder)
        load_tokenizer(evaluator.bank.checkpoint).save_pretrained(folder)
        NeutralMap().write(export, folder)

    def check(self, export: Export, folder: Path) -> dict[str, Any]:
        """Load with transformers and repeat the measurement."""
        return check_losses(export, reload(export, folder))

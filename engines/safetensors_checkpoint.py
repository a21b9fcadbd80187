"""A safetensors checkpoint of the dequantized weights, for transformers and all that read it.

It holds the candidate's exact values in the arithmetic type they were measured in, so whatever
loads it computes what was measured. It doesn't save space: that is what packed targets are for.
"""

from pathlib import Path
from typing import Any

from engines.base import Export, Target
from engines.neutral_map import NeutralMap
from quantization.checkpoints import Checkpoint, load_model, load_tokenizer, readable
from quantization.errors import ExportError

TOLERANCE = 0.02  # of the KL; thread counts alone change sums in the last digits
NOISE_NATS = 2e-4


class SafetensorsCheckpoint(Target):
    """Writes model, configuration, tokenizer and the precision map that made them."""

    name = "safetensors"
    needs_model = True

    def write(self, export: Export, folder: Path) -> None:
        """See `Target.write`."""
        evaluator = export.evaluator
        assert evaluator is not None
        evaluator.model.assign(export.precision_map.schemes)
        module = evaluator.model.module
        module.config.dtype = evaluator.bank.dtype
        with readable(str(folder)):
            module.save_pretrained(folder)
        load_tokenizer(evaluator.bank.checkpoint).save_pretrained(folder)
        NeutralMap().write(export, folder)

    def check(self, export: Export, folder: Path) -> dict[str, Any]:
        """Load with transformers and repeat the measurement."""
        evaluator, chunks, measured = export.evaluator, export.chunks, export.measured_kl
        assert evaluator is not None
        assert chunks is not None
        assert measured is not None
        checkpoint = evaluator.bank.checkpoint
        reloaded = load_model(
            Checkpoint("reload", str(folder), "", None, checkpoint.trust_remote_code),
            evaluator.bank.dtype,
        ).to(evaluator.model.device)
        head = reloaded.get_output_embeddings().weight.data
        if head.equal(evaluator.head.weight):
            head = evaluator.head.weight  # the same values: differences of logits stay exact
        losses = [
            evaluator.compare(evaluator.reference(ids), evaluator.hidden(reloaded, ids), ids, head)
            for ids in chunks
        ]
        kl = sum(loss.kl_sum for loss in losses) / sum(loss.tokens for loss in losses)
        if not abs(kl - measured) <= TOLERANCE * measured + NOISE_NATS:
            raise ExportError(
                f"the reloaded checkpoint has a KL of {kl:.5f} nats per token where "
                f"{measured:.5f} was measured; nothing was exported"
            )
        return {"measured_kl": measured, "reloaded_kl": kl, "chunks": len(chunks)}

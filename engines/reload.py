"""Whether what was written is what was measured: rules before, bytes and losses after."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from engines.base import Export, Rules
from engines.checkpoint_files import tensor_bytes
from evaluation.activations import Activations
from evaluation.caches import Caches
from quantization.adapter import describe
from quantization.checkpoints import Checkpoint, load_config, load_model
from quantization.errors import ExportError
from quantization.schemes import FULL_PRECISION, Scheme
from quantization.units import Layout, Unit, cache_slot

TOLERANCE = 0.02
"""Of the KL."""
NOISE_NATS = 2e-4
"""Thread counts alone change sums in the last digits."""
FEW = 2


def check_served(
    rules: Rules, checkpoint: Checkpoint, layout: Layout, schemes: Sequence[Scheme]
) -> None:
    """Refuse a map that a runtime doesn't serve.

    Args:
        rules: the runtime's.
        checkpoint: the model, which says what is fused.
        layout: the map's units.
        schemes: one for each of them.

    Raises:
        ExportError: with units and reasons.
    """
    rules.check(load_config(checkpoint))
    wrong = [
        f"{unit.name}: {why}"
        for unit, scheme in zip(layout.units, schemes, strict=True)
        if (why := rules.unit_refusal(unit, scheme))
    ]
    if rules.fuses:
        wrong += _divided(describe(checkpoint).units, layout, schemes)
    if wrong:
        more = f" (and {len(wrong) - FEW} more)" if len(wrong) > FEW else ""
        raise ExportError(
            f"{rules.name} can't serve {len(wrong)} units: {'; '.join(wrong[:FEW])}{more}; "
            f"search with --engine {rules.name} for maps that it can"
        )


def _divided(fused: Sequence[Unit], layout: Layout, schemes: Sequence[Scheme]) -> Iterator[str]:
    """Units whose sites have different schemes."""
    of = {
        site.name: scheme.name
        for unit, scheme in zip(layout.units, schemes, strict=True)
        for site in unit.sites
    }
    for unit in fused:
        found = sorted({of[site.name] for site in unit.sites if site.name in of})
        if len(found) > 1:
            yield f"{unit.name}: one matrix, which can't be in {' and '.join(found)}"


def predicted_bytes(
    rules: Rules, checkpoint: Checkpoint, layout: Layout, schemes: Sequence[Scheme]
) -> int:
    """Bytes of all tensors that a runtime loads."""
    return rules.other_bytes(layout, load_config(checkpoint)) + sum(
        rules.site_nbytes(scheme, site)
        for unit, scheme in zip(layout.units, schemes, strict=True)
        for site in unit.stored
    )


def check_bytes(export: Export, rules: Rules, folder: Path) -> int:
    """Bytes of the tensors of a folder's safetensors files.

    Raises:
        ExportError: they aren't as many as predicted.
    """
    assert export.evaluator is not None
    bank = export.evaluator.bank
    expected = predicted_bytes(rules, bank.checkpoint, bank.layout, export.precision_map.schemes)
    written = tensor_bytes(folder)
    if written != expected:
        raise ExportError(f"the files hold {written:,} bytes of tensors, not {expected:,}")
    return written


def check_losses(
    export: Export, reloaded: Any, *, quantizes_inputs: bool = False
) -> dict[str, Any]:
    """Repeat the measurement with what a target's own loader made of the files.

    Args:
        export: what was written.
        reloaded: a causal language model of transformers.
        quantizes_inputs: whether its layers quantize their activations by themselves.

    Raises:
        ExportError: another loss.
    """
    formats_in = {
        site: unit.scheme.activation
        for unit in export.precision_map.weights
        for site in unit.sites
        if unit.scheme.activation != FULL_PRECISION
    }
    evaluator, chunks, measured = export.evaluator, export.chunks, export.measured_kl
    assert evaluator is not None
    assert chunks is not None
    assert measured is not None
    reloaded = reloaded.to(evaluator.model.device).eval()
    if formats := export.precision_map.caches:
        caches = Caches(reloaded)  # the runtime's, which no loader of checkpoints has
        layout = evaluator.bank.layout
        sites = (site for unit in layout.units if unit.kind == "cache" for site in unit.sites)
        caches.formats = {cache_slot(site): formats[site.name] for site in sites}
    if formats_in and not quantizes_inputs:
        Activations(reloaded, evaluator.bank.layout).formats = formats_in
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
            f"{measured:.5f} was measured, more than {TOLERANCE:.0%} off; nothing was exported"
        )
    return {"measured_kl": measured, "reloaded_kl": kl, "chunks": len(chunks)}


def reload(export: Export, folder: Path, dtype: Any = None) -> Any:
    """The folder in transformers, by default in the arithmetic type of the measurement."""
    assert export.evaluator is not None
    bank = export.evaluator.bank
    place = Checkpoint("reload", str(folder), "", None, bank.checkpoint.trust_remote_code)
    return load_model(place, dtype or bank.dtype)

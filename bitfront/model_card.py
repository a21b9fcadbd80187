"""The README of an export: what it is, what it costs, how well it was measured, how to make it again."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from bitfront import latency
from bitfront.fronts import GIVEN, Front, Point
from bitfront.sizes import show_bytes, show_seconds
from cost_models.memory import PHASES
from quantization.precision_map import PrecisionMap
from quantization.schemes import Scheme

FILE_NAME = "README.md"
CHUNK = 2**20


def write_card(
    folder: Path,
    front: Front,
    point: Point,
    precision_map: PrecisionMap,
    target: str,
    found: dict[str, Any],
) -> None:
    """Write the card beside the files of an export.

    Args:
        folder: the export's, complete.
        front: whose point it is.
        point: what was exported.
        precision_map: the same, unit by unit.
        target: what it was written for.
        found: what the reload told.
    """
    parts = [
        _front_matter(front, target, found),
        _summary(front, point, found),
        _formats(precision_map),
        _costs(front, point, found),
        _again(front, point, target),
        _hashes(sorted(p for p in folder.iterdir() if p.is_file() and p.name != FILE_NAME)),
    ]
    (folder / FILE_NAME).write_text("\n".join(parts))


def _front_matter(front: Front, target: str, found: dict[str, Any]) -> str:
    """What model hubs read."""
    kind = "recipe" if "modules" in found else "quantized"
    data = {"base_model": front.model.name, "tags": ["bitfront", kind, target]}
    return f"---\n{yaml.safe_dump(data, sort_keys=False)}---\n"


def _summary(front: Front, point: Point, found: dict[str, Any]) -> str:
    model, reference = front.model, front.reference_perplexity
    revision = f" at revision {model.revision}" if model.revision else ""
    lines = [
        f"# {Path(model.name).name}, {point.average_bits:.3f} bits a weight\n",
        (
            f"Made from `{model.name}`{revision} (weights SHA-256 `{model.weights_hash}`), one precision "
            "a layer.\n"
        ),
        (
            f"- KL to the unquantized model: {point.kl:.5f} nats a token ({point.kl_low:.5f} to "
            f"{point.kl_high:.5f}, 95 %), on held-out text"
        ),
        f"- perplexity there: {point.perplexity:.3f}"
        + (f" (unquantized: {reference:.3f})" if reference else ""),
    ]
    if "reloaded_kl" in found:
        lines.append(
            f"- read back by its own loader: KL {found['reloaded_kl']:.5f} on {found['chunks']} "
            f"chunks, where {found['measured_kl']:.5f} was measured"
        )
    if "top1_agreement" in found:
        lines.append(
            f"- perplexity there {found['reloaded_perplexity']:.3f} "
            f"({found['measured_perplexity']:.3f} as measured), the same likeliest token in "
            f"{found['top1_agreement']:.1%}; {found['generated_tokens_per_s']:.0f} tokens a second on "
            "the machine that wrote it"
        )
    if "modules" in found:
        lines.append(
            "- these figures are of the weights as Bitfront rounded them: this is a recipe, and the "
            "tool rounds by itself"
        )
    lines += [f"- {line}" for line in vllm_says(found)]
    if refused := found.get("not_in_vllm"):
        lines.append(f"- vLLM has no kernel for {len(refused)} units, such as `{refused[0]}`")
    if found.get("serve"):
        lines += ["", "```", found["serve"], "```"]
    return "\n".join(lines) + "\n"


def vllm_says(found: Mapping[str, Any]) -> Iterator[str]:
    """What came of loading an export in vLLM."""
    vllm = found.get("vllm")
    if vllm and "refused" in vllm:
        yield f"vLLM doesn't load it on this machine: {vllm['refused']}"
    elif vllm:
        yield (
            f"vLLM {vllm['version']} on this machine: perplexity {vllm['perplexity']:.4g} "
            f"({vllm['measured_perplexity']:.4g} as measured), the same likeliest token in "
            f"{vllm['top1_agreement']:.1%}, {vllm['generated_tokens_per_s']:.1f} tokens a second"
        )


def _formats(precision_map: PrecisionMap) -> str:
    own = (unit.scheme for unit in precision_map.weights)
    weights = Counter(Scheme(scheme.weight, scheme.activation).name for scheme in own)
    caches = Counter(precision_map.caches.values())  # keys or values of a layer
    rows = [f"| {name} | {count} |" for name, count in weights.most_common()]
    rows += [f"| {name}, KV cache | {count} |" for name, count in caches.most_common()]
    return "\n".join([
        "## Map\n",
        f"`precision_map.json` lists every unit (hash `{precision_map.map_hash}`).\n",
        "| format | units |", "| --- | --- |", *rows, "",
    ])  # fmt: skip


def _costs(front: Front, point: Point, found: dict[str, Any]) -> str:
    rows = [
        (
            f"- tensors: {point.weight_bytes:,} bytes ({show_bytes(point.weight_bytes)}) as the search "
            "counted them"
        )
    ]
    if point.cache_bytes is not None:
        load = front.job.facts["memory"]["workload"]
        rows.append(
            f"- KV cache of {load['batch']} x {load['context']} tokens: {point.cache_bytes:,} bytes"
        )
    if "weight_bytes" in found:
        rows.append(f"- tensors as written: {found['weight_bytes']:,} bytes")
    facts = front.job.facts.get("times") or {}
    own = facts.get("maps", {}).get(point.map_hash, {})
    for phase in PHASES:
        if phase in own.get("predicted", {}):
            measured = own.get("measured")
            rows.append(
                f"- {latency.WORDS[phase]} with {facts['engine']} on {facts['device']}: predicted "
                f"{show_seconds(own['predicted'][phase])}"
                + (f", measured {show_seconds(measured[phase])}" if measured else "")
            )
    return "\n".join(["## Costs\n", *rows, ""])


def _again(front: Front, point: Point, target: str) -> str:
    """The job as it was asked for."""
    config = {k: v for k, v in front.job.config.items() if k != "model"}
    model = front.job.config["model"]
    given = point.control == GIVEN  # somebody else's map: no search finds it
    return "\n".join([
        "## Again\n",
        "```",
        f"bitfront search {model} --config job.yaml",
        *([f"bitfront apply precision_map.json {model}"] if given else []),
        f"bitfront export --point {point.id} --to {target} -o DIR",
        "```\n",
        "`job.yaml`:\n",
        "```yaml",
        yaml.safe_dump(config, sort_keys=False).rstrip(),
        "```",
        "",
    ])  # fmt: skip


def _hashes(files: Sequence[Path]) -> str:
    rows = [f"{_sha256(file)}  {file.name}" for file in files]
    return "\n".join(["## SHA-256\n", "```", *rows, "```", ""])


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()

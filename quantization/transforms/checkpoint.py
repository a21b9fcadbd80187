"""A folded checkpoint: another model on disk that computes the same, made once into the cache.

It is kept in float32, because scaled weights have more digits than the original's type holds. All
that works on checkpoints works on it: bank, evaluator, estimators and exports know no transforms.
"""

import hashlib
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantization.cache import cache_dir, write_folder
from quantization.checkpoints import HUB_PATTERNS, Checkpoint, load_model, readable
from quantization.errors import ModelError
from quantization.formats import FORMATS
from quantization.statistics import Statistics
from quantization.transforms import TRANSFORMS
from quantization.transforms.finding import find_folds, sample_ids
from quantization.transforms.folds import Fold
from quantization.units import Layout, Site

TOLERANCE = 1e-3  # of the logits: rounding in float32 stays far below, a mistake doesn't


@dataclass(frozen=True)
class Folding:
    """How a folded checkpoint is made; small and picklable.

    Args:
        original: the model that is transformed.
        transform: a name in `TRANSFORMS`.
        format: what a tuned transform's scales are tuned to.
        statistics: the identity of what calibration tells of the original.
    """

    original: Checkpoint
    transform: str
    format: str | None
    statistics: str

    @property
    def identity(self) -> str:
        """The transform with what it is tuned to: `awq-20@int4-g64`."""
        name = TRANSFORMS[self.transform].identity
        return f"{name}@{self.format}" if self.format else name

    @property
    def checkpoint(self) -> Checkpoint:
        """The folded model in this node's cache, whether it is there yet or not."""
        parts = self.original.weights_hash, self.identity, self.statistics
        digest = hashlib.sha256("|".join(parts).encode()).hexdigest()
        folder = cache_dir() / "models" / digest[:32]
        return replace(self.original, folder=str(folder), weights_hash=digest)

    @property
    def ready(self) -> bool:
        """Whether the folded model is on this node."""
        return Path(self.checkpoint.folder).exists()


def folded_sites(layout: Layout) -> list[Site]:
    """The sites whose second moments a transform may ask for."""
    return [site for unit in layout.units if unit.layer is not None for site in unit.stored]


def write_folded(
    folding: Folding, original: Checkpoint, layout: Layout, device: torch.device
) -> None:
    """Make the folded checkpoint from the original on this node and its collected statistics.

    Args:
        folding: what to make.
        original: the original's files on this node.
        layout: of the original, and so of the result.
        device: where scales are searched for; the model stays on the CPU.

    Raises:
        ModelError: nothing in the model can be folded, the result computes something else, or it
            can't be written.
    """
    folder = Path(folding.checkpoint.folder)

    def write(work: Path) -> None:
        before = _write_model(folding, original, layout, device, work)
        after = _logits(load_model(replace(folding.checkpoint, folder=str(work)), torch.float32))
        error = float((after - before).norm() / before.norm())
        if not error <= TOLERANCE:
            raise ModelError(
                f"'{original.name}' isn't the same model once it is folded (its logits differ by "
                f"{error:.2g} of their size); search without --transform {folding.transform}"
            )

    try:
        write_folder(folder, write)
    except OSError as error:
        raise ModelError(
            f"can't write the folded model to '{folder}' ({error}); "
            "free some space or set BITFRONT_CACHE"
        ) from error


def _write_model(
    folding: Folding, original: Checkpoint, layout: Layout, device: torch.device, work: Path
) -> Tensor:
    """Write the folded model with what else lies beside the original; the original's logits.

    Every scale is chosen on the weights as they were. Scaling a matrix's rows changes neither what
    rounding within a row does to it nor its error relative to what reads the row, so that folds
    needn't wait for one another.
    """
    model = load_model(original, torch.float32)
    logits = _logits(model)
    folds = find_folds(model, layout)
    if not folds:
        raise ModelError(
            f"nothing in '{folding.original.name}' can be folded; search without "
            f"--transform {folding.transform}"
        )
    parameters = {name: p.data for name, p in model.named_parameters()}
    statistics = Statistics(folding.statistics)
    scales = [_scale(fold, folding, parameters, statistics, device) for fold in folds]
    for fold, scale in zip(folds, scales, strict=True):
        fold.apply(parameters, scale)
    for pattern in HUB_PATTERNS:
        for file in Path(original.folder).glob(pattern):
            if not file.name.endswith((".safetensors", ".index.json")):
                shutil.copy(file, work)
    with readable(original.name):
        model.save_pretrained(work)
    return logits


def _scale(
    fold: Fold,
    folding: Folding,
    parameters: dict[str, Tensor],
    statistics: Statistics,
    device: torch.device,
) -> Tensor:
    """What the transform chooses for a fold, on the CPU."""
    weights = [
        parameters[site.parameter].mT if site.transposed else parameters[site.parameter]
        for site in fold.sites
    ]
    known = [statistics.of(site, ["second-moment"]).to(device) for site in fold.sites]
    format = FORMATS[folding.format] if folding.format else None
    transform = TRANSFORMS[folding.transform]
    return transform.scale(fold, [w.to(device) for w in weights], known, format).cpu()


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    logits: Tensor = model(input_ids=sample_ids(model), use_cache=False).logits
    return logits

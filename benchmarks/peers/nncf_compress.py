"""OpenVINO NNCF's mixed-precision weight compression as an allocator: maps in Track A's form.

Four bits and eight as a backup, by its own criterion. It sorts linears by their scores and gives
four bits to the first ones up to a ratio: it scores once, and each budget gets the least ratio that
fits, with linears that engines load as one at the wider of their widths. In an environment of its
own:

    python -m venv NN && NN/bin/pip install nncf transformers accelerate torch
    NN/bin/python benchmarks/peers/nncf_compress.py MODEL_DIR TEXT OUT_DIR
"""

from typing import Any
from unittest.mock import patch

from maps import GROUP, SCALE_BITS, arguments, fits, fused, linears, load, tokens, write

# isort: split

import nncf
import torch
from nncf.quantization.algorithms.weight_compression.mixed_precision import MeanVarianceCriterion

LOW, HIGH = 4, 8


def scored(model: torch.nn.Module, batches: list[torch.Tensor]) -> dict[str, float]:
    """Its sensitivity of each linear, kept while it compresses."""
    found: dict[str, float] = {}
    own = MeanVarianceCriterion._calc_score_per_node

    def kept(criterion: Any, weight: Any, *rest: Any) -> float:
        score = own(criterion, weight, *rest)
        found[weight.weight_name.removesuffix(".weight")] = float(score)
        return score

    model.config.use_cache = False
    with patch.object(MeanVarianceCriterion, "_calc_score_per_node", kept):
        nncf.compress_weights(
            model, mode=nncf.CompressWeightsMode.INT4_SYM, ratio=0.5, group_size=GROUP,
            dataset=nncf.Dataset(batches, lambda ids: {"input_ids": ids}),
            sensitivity_metric=nncf.SensitivityMetric.MEAN_ACTIVATION_VARIANCE,
            subset_size=len(batches), backup_mode=nncf.BackupMode.INT8_SYM,
        )  # fmt: skip
    return found


def main() -> None:
    given = arguments(__doc__, chunks=16, length=512)
    model = load(given.model)
    sizes = linears(model)
    scores = scored(model, [chunk[None] for chunk in tokens(given)])
    ascending = sorted(sizes, key=scores.__getitem__)
    for bits in (b for b in given.bits if b >= LOW + SCALE_BITS / GROUP):
        for narrow in range(len(ascending) + 1):
            widths = dict.fromkeys(sizes, HIGH) | dict.fromkeys(ascending[:narrow], LOW)
            chosen = {}
            for names in fused(sizes):
                chosen |= dict.fromkeys(names, max(widths[n] for n in names))
            if fits(sizes, chosen, bits):
                break
        write(given.out, "nncf", bits, sizes, chosen)


if __name__ == "__main__":
    main()

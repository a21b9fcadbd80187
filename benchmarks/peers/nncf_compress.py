"""OpenVINO NNCF's mixed-precision weight compression as an allocator: maps in Track A's form.

Four bits and eight as a backup, by its own criterion; the ratio of four bits is bisected for each
budget, with linears that engines load as one at the wider of their widths. In an environment of its own:

    python -m venv NN && NN/bin/pip install nncf transformers accelerate torch
    NN/bin/python benchmarks/peers/nncf_compress.py MODEL_DIR TEXT OUT_DIR
"""

from maps import GROUP, arguments, exact_bits, fused, linears, load, tokens, write  # isort: split

import nncf
import torch

LOW, HIGH, STEPS = 4, 8, 7


def compressed(path: str, batches: list[torch.Tensor], ratio: float) -> dict[str, int]:
    """The width of each linear that it compressed."""
    model = load(path)
    model.config.use_cache = False
    data = nncf.Dataset(batches, lambda ids: {"input_ids": ids})
    result = nncf.compress_weights(
        model, mode=nncf.CompressWeightsMode.INT4_SYM, ratio=ratio, group_size=GROUP,
        dataset=data, sensitivity_metric=nncf.SensitivityMetric.MEAN_ACTIVATION_VARIANCE,
        backup_mode=nncf.BackupMode.INT8_SYM,
    )  # fmt: skip
    found = {}
    for name, module in result.named_modules():
        kind = type(module).__name__
        if "Decompressor" in kind:
            linear = name.split("post_hooks.")[-1].split("__")[0].replace(":", ".")
            found[linear.removesuffix(".weight")] = LOW if kind.startswith("INT4") else HIGH
    return found


def main() -> None:
    given = arguments(__doc__, chunks=16, length=512)
    sizes = linears(load(given.model))
    batches = [chunk[None] for chunk in tokens(given)]
    for bits in (b for b in given.bits if b >= LOW + 16 / GROUP):
        least, most, best = 0.0, 1.0, dict.fromkeys(sizes, LOW)
        for _ in range(STEPS):
            ratio = (least + most) / 2
            widths = compressed(given.model, batches, ratio)
            chosen = {}
            for names in fused(sizes):
                chosen |= dict.fromkeys(names, max(widths[n] for n in names))
            if exact_bits(sizes, chosen) <= bits:
                best, most = chosen, ratio
            else:
                least = ratio
        write(given.out, "nncf", bits, sizes, best)


if __name__ == "__main__":
    main()

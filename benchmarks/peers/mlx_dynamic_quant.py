"""mlx-lm's dynamic_quant as an allocator: maps in Track A's form, by its own sensitivities.

It knows two widths at a time and no fused linears: those that engines load as one get the mean of
their sensitivities, which are per weight. In an environment of its own:

    python -m venv MLX && MLX/bin/pip install 'mlx[cpu]' mlx-lm transformers accelerate torch
    MLX/bin/python benchmarks/peers/mlx_dynamic_quant.py MODEL_DIR TEXT OUT_DIR
"""

from maps import GROUP, arguments, fits, fused, linears, load, tokens, write  # isort: split

import mlx.core as mx
import numpy as np
from mlx_lm.quant.dynamic_quant import estimate_sensitivities
from mlx_lm.utils import load as load_mlx

WIDTHS = ((4.25, 3, 4), (6.25, 4, 6))  # up to so many bits, low and high


def mean(own: dict[str, float], sizes: dict[str, int], names: list[str]) -> float:
    """The sensitivity of several linears, each by its weights."""
    return sum(own[n] * sizes[n] for n in names) / sum(sizes[n] for n in names)


def main() -> None:
    given = arguments(__doc__, chunks=16, length=512)
    sizes = linears(load(given.model))
    data = mx.array(tokens(given).numpy().astype(np.int32))
    scores: dict[tuple[int, int], dict[str, float]] = {}
    for bits in given.bits:
        low, high = next((low, high) for most, low, high in WIDTHS if bits <= most)
        if (low, high) not in scores:
            model, _ = load_mlx(given.model)
            found = estimate_sensitivities(model, data, low, GROUP, high, GROUP)
            scores[low, high] = dict(found)
        own = scores[low, high]
        groups = sorted(fused(sizes), key=lambda names: -mean(own, sizes, names))
        chosen = dict.fromkeys(sizes, low)
        for names in groups:
            wider = {**chosen, **dict.fromkeys(names, high)}
            if not fits(sizes, wider, bits):
                break  # all that are more sensitive than a threshold, as it does
            chosen = wider
        write(given.out, "mlx", bits, sizes, chosen)


if __name__ == "__main__":
    main()

"""NVIDIA Model-Optimizer's AutoQuantize as an allocator: maps in Track A's form.

By its own scoring, of gradients or (`--method kl_div`) of KL divergences. In an environment of its
own:

    python -m venv MO && MO/bin/pip install nvidia-modelopt transformers accelerate torch
    MO/bin/python benchmarks/peers/modelopt_autoquantize.py MODEL_DIR TEXT OUT_DIR
"""

from typing import Any

from maps import BITS, GROUP, SCALE_BITS, arguments, fits, linears, load, tokens, write

# isort: split

import modelopt.torch.quantization as mtq
import torch

BATCH, STEP = 8, 0.005  # each batch quantizes all weights anew, twice
METHOD = {"default": "gradient", "choices": ["gradient", "kl_div"]}


def scheme(bits: int) -> dict[str, Any]:
    """Symmetric integers in groups, the head kept."""
    return {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "enable": True,
             "cfg": {"num_bits": bits, "block_sizes": {-1: GROUP}}},
            {"quantizer_name": "*lm_head*", "enable": False},
        ],
        "algorithm": "max",
    }  # fmt: skip


def loss(output: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What its gradients are of: the text's likelihood, whose size its solver's tolerances need."""
    logits, labels = output.logits[:, :-1].float(), batch["input_ids"][:, 1:]
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum"
    )


def widths(state: dict[str, Any], wanted: float) -> dict[str, int]:
    """What it chooses for so many of its bits: linear -> bits."""
    config = mtq.get_auto_quantize_config(state, {"effective_bits": wanted})
    end = ".weight_quantizer"
    return {
        entry["quantizer_name"].removesuffix(end): entry["cfg"]["num_bits"]
        for entry in config["quant_cfg"]
        if entry["quantizer_name"].endswith(end) and entry["enable"]
    }


def main() -> None:
    given = arguments(__doc__, chunks=16, length=512, method=METHOD)
    batches = [{"input_ids": chunks} for chunks in tokens(given).split(BATCH)]

    def forward(model: Any, batch: dict[str, torch.Tensor]) -> Any:
        output = model(**batch, use_cache=False)
        return output if given.method == "gradient" else output.logits

    model = load(given.model)
    sizes = linears(model)
    # its bits count no scales, and its sizes count the head, which stays at 16
    head, body = model.lm_head.weight.numel(), sum(sizes.values())
    wanted = {
        bits: ((bits - SCALE_BITS / GROUP) * body + 16 * head) / (body + head)
        for bits in given.bits
    }
    menu = [scheme(b) for b in BITS]
    _, state = mtq.auto_quantize(
        model,
        constraints={"effective_bits": max(wanted.values())},
        quantization_formats=menu,
        module_search_spaces=[
            {"module_name_patterns": [*sizes], "quantization_formats": menu,
             "allow_no_quant": False},
        ],
        data_loader=batches,
        forward_step=forward,
        loss_func=loss if given.method == "gradient" else None,
        num_calib_steps=1,
        num_score_steps=len(batches),
        disabled_layers=["*lm_head*"],
        method=given.method,
    )  # fmt: skip
    for bits in given.bits:  # scored once, solved for each budget
        found = widths(state, wanted[bits])
        while not fits(sizes, found, bits):  # its threshold search ends either side of the budget
            wanted[bits] -= STEP
            found = widths(state, wanted[bits])
        write(given.out, f"modelopt-{given.method.replace('_', '-')}", bits, sizes, found)


if __name__ == "__main__":
    main()

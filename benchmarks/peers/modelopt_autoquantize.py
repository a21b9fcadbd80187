"""NVIDIA Model-Optimizer's AutoQuantize as an allocator: maps in Track A's form, by its own scoring.

In an environment of its own:

    python -m venv MO && MO/bin/pip install nvidia-modelopt transformers accelerate torch
    MO/bin/python benchmarks/peers/modelopt_autoquantize.py MODEL_DIR TEXT OUT_DIR [--method gradient|kl_div]
"""

from typing import Any

from maps import BITS, GROUP, SCALE_BITS, arguments, linears, load, tokens, write  # isort: split

import modelopt.torch.quantization as mtq
import torch

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
    """What its gradients are of: the text's likelihood."""
    logits, labels = output.logits[0, :-1].float(), batch["input_ids"][0, 1:]
    return torch.nn.functional.cross_entropy(logits, labels)


def main() -> None:
    given = arguments(__doc__, chunks=16, length=512, method=METHOD)
    batches = [{"input_ids": chunk[None]} for chunk in tokens(given)]

    def forward(model: Any, batch: dict[str, torch.Tensor]) -> Any:
        output = model(**batch, use_cache=False)
        return output if given.method == "gradient" else output.logits

    checkpoint = given.out / f"scores-{given.method}.pth"
    for bits in given.bits:
        model = load(given.model)
        sizes = linears(model)
        # its bits count no scales, and its sizes count the head, which stays at 16
        head, body = model.lm_head.weight.numel(), sum(sizes.values())
        wanted = ((bits - SCALE_BITS / GROUP) * body + 16 * head) / (body + head)
        model, _ = mtq.auto_quantize(
            model,
            constraints={"effective_bits": wanted},
            quantization_formats=[scheme(b) for b in BITS],
            data_loader=batches,
            forward_step=forward,
            loss_func=loss if given.method == "gradient" else None,
            num_calib_steps=1,
            num_score_steps=len(batches),
            disabled_layers=["*lm_head*"],
            method=given.method,
            checkpoint=str(checkpoint),  # scored once, solved for each budget
            verbose=True,
        )
        found = {}
        for name in sizes:
            quantizer = model.get_submodule(name).weight_quantizer
            found[name] = quantizer.num_bits if quantizer.is_enabled else 16
        write(given.out, f"modelopt-{given.method.replace('_', '-')}", bits, sizes, found)


if __name__ == "__main__":
    main()

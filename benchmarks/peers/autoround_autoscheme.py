"""Intel AutoRound's AutoScheme as an allocator: maps in Track A's form.

A draft: it runs, but the widths that it reads afterwards aren't those that AutoScheme chose (all are the
smallest). In an environment of its own:

    python -m venv AR && AR/bin/pip install auto-round transformers accelerate torch
    AR/bin/python benchmarks/peers/autoround_autoscheme.py MODEL_DIR TEXT OUT_DIR
"""

import json

from maps import BITS, GROUP, SHARED, arguments, linears, load, tokens, write  # isort: split

from auto_round import AutoRound, AutoScheme
from auto_round.schemes import QuantizationScheme
from transformers import AutoTokenizer


def main() -> None:
    given = arguments(__doc__, chunks=16, length=256)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    options = [
        QuantizationScheme(bits=b, group_size=GROUP, sym=True, data_type="int") for b in BITS
    ]
    text = given.out / "text.json"  # it takes files of texts, and no ids
    texts = [{"text": tokenizer.decode(chunk)} for chunk in tokens(given)]
    text.write_text(json.dumps(texts))
    for bits in given.bits:
        model = load(given.model)
        sizes = linears(model)
        scheme = AutoScheme(avg_bits=bits, options=options, shared_layers=[*map(list, SHARED)])
        tuner = AutoRound(
            model, tokenizer, scheme=scheme, dataset=str(text), iters=0,
            nsamples=given.chunks, seqlen=given.length, batch_size=1, disable_opt_rtn=True,
        )  # fmt: skip
        tuner.quantize()
        found = {name: int(tuner.layer_config[name]["bits"]) for name in sizes}
        write(given.out, "autoround", bits, sizes, found)


if __name__ == "__main__":
    main()

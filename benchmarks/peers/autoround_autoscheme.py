"""Intel AutoRound's AutoScheme as an allocator: maps in Track A's form.

Nothing is quantized: what AutoScheme chose lies in `layer_config` as soon as the model is prepared.
In an environment of its own:

    python -m venv AR && AR/bin/pip install auto-round transformers accelerate torch
    AR/bin/python benchmarks/peers/autoround_autoscheme.py MODEL_DIR TEXT OUT_DIR
"""

import json
import os
import tempfile
from pathlib import Path

from maps import BITS, GROUP, SCALE_BITS, SHARED, arguments, linears, load, tokens, write

# isort: split

from auto_round import AutoRound, AutoScheme
from auto_round.schemes import QuantizationScheme
from transformers import AutoTokenizer

BATCH, SLACK = 8, 8


def main() -> None:
    given = arguments(__doc__, chunks=16, length=256)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    options = [
        QuantizationScheme(bits=b, group_size=GROUP, sym=True, data_type="int", act_bits=16)
        for b in BITS
    ]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["AR_AUTO_SCHEME_CACHE"] = folder  # scored once, solved for each budget
        text = Path(folder) / "text.jsonl"  # it takes files of texts, and no ids
        texts = [json.dumps({"text": tokenizer.decode(chunk)}) for chunk in tokens(given)]
        text.write_text("\n".join(texts))
        for bits in given.bits:
            model = load(given.model)
            sizes = linears(model)
            scheme = AutoScheme(
                # it counts zero points even where there are none
                avg_bits=bits - SCALE_BITS / GROUP, ignore_scale_zp_bits=True, options=options,
                shared_layers=[*map(list, SHARED)], nsamples=given.chunks,
                # it drops texts that are shorter once they are tokens again
                seqlen=given.length - SLACK, batch_size=min(BATCH, given.chunks),
            )  # fmt: skip
            tuner = AutoRound(
                model, tokenizer, scheme=scheme, dataset=str(text), iters=0, disable_opt_rtn=True,
                nsamples=given.chunks, seqlen=given.length - SLACK,
            )  # fmt: skip
            tuner.post_init()
            found = {name: int(tuner.layer_config[name]["bits"]) for name in sizes}
            write(given.out, "autoround", bits, sizes, found)


if __name__ == "__main__":
    main()

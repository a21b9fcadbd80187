"""`benchmarks/track_a.py` on a tiny model: legal maps within their bits, whatever the time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "track_a.py"
TEXT = " ".join(
    f"The {n}th sentence says that {n} and {n + 1} make {2 * n + 1}." for n in range(4000)
)
BITS = (3.25, 4.25)


@pytest.fixture(scope="module")
def maps(tiny_folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("track-a")
    (folder / "text.txt").write_text(TEXT)
    subprocess.run(
        [sys.executable, SCRIPT, "--model", tiny_folders("llama"), "--text", folder / "text.txt",
         "--minutes", "1", "--out", folder, "--bits", ",".join(map(str, BITS))],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder, {
        bits: json.loads((folder / f"bitfront-{bits}.json").read_text()) for bits in BITS
    }


def test_maps_are_within_their_bits_and_load_fused(maps, tiny_folders):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folders("llama"))
    sizes = {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, model.lm_head.__class__) and name != "lm_head"
    }
    _, found = maps
    for budget, bits in found.items():
        assert bits.keys() == sizes.keys()
        assert set(bits.values()) <= {2, 3, 4, 6, 8}
        for layer in range(model.config.num_hidden_layers):
            at = f"model.layers.{layer}"
            assert len({bits[f"{at}.self_attn.{n}_proj"] for n in "qkv"}) == 1
            assert bits[f"{at}.mlp.gate_proj"] == bits[f"{at}.mlp.up_proj"]
        numel = sum(weight.numel() for weight in sizes.values())
        used = sum(weight.numel() * (bits[name] + 16 / 64) for name, weight in sizes.items())
        assert used / numel <= budget


def test_what_the_search_cost_is_told(maps):
    folder, _ = maps
    log = json.loads((folder / "log.json").read_text())
    assert log["seconds"]["all"] < 60
    assert log["gradients"] > 0
    assert log["tokens"] == 512 * (log["gradients"] + log["measurements"])

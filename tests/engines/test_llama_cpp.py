"""llama.cpp: files that its own loader reads, with the bank's bytes, the model's tokens and logits."""

import gguf
import numpy as np
import pytest
import torch
import transformers

from engines import Export, load_engine, load_target
from engines.base import Cell, Exercise
from engines.gguf_file import tensor_bytes
from engines.gguf_tokenizer import add_tokenizer, agrees
from engines.llama_blocks import blocks
from engines.llama_cells import time_products
from engines.llama_cpp import FILE_NAME
from engines.llama_library import LlamaModel, LlamaVocab
from evaluation.evaluator import Evaluator
from quantization.adapter import describe
from quantization.bank import Bank
from quantization.checkpoints import load_config, load_tokenizer, resolve
from quantization.errors import EngineError, ExportError, KernelError, UnknownNameError
from quantization.formats import FORMATS
from quantization.precision_map import ModelEntry, build_map
from quantization.quantizers import QUANTIZERS
from quantization.schemes import Scheme
from quantization.units import Layout, Site, Unit
from tests.conftest import choices_of, save_tiny

LLAMA = load_engine("llama.cpp")
CHUNKS = np.random.default_rng(0).integers(2, 300, (2, 48))
TYPES = ["gguf-q4_0", "gguf-q8_0", "gguf-q4_K", "gguf-iq4_nl", "bf16"]
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
MODELS = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama 3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "qwen3": ("qwen3", {}),
    "qwen2": ("qwen2", {}),
    "mistral": ("mistral", {}),
    "mixtral": ("mixtral", {}),
    "qwen2, experts": ("qwen2_moe", {"shared_expert_intermediate_size": 64}),
    "qwen3, experts": ("qwen3_moe", {}),
}


def export_of(family, folder, more, dtype=torch.float32):
    """A tiny model's export of a map that mixes types."""
    checkpoint = resolve(str(save_tiny(family, folder, **more)))
    layout = describe(checkpoint)
    menu = [Scheme(name) for name in TYPES]
    bank = Bank(checkpoint, layout, QUANTIZERS["rtn"], dtype)
    bank.build(choices_of(layout, menu))
    evaluator = Evaluator(bank, torch.device("cpu"))
    schemes = [
        Scheme("bf16") if unit.layer is None else menu[i % len(menu)]
        for i, unit in enumerate(layout.units)
    ]
    pairs = [(s.weight, s.activation) for s in schemes]
    names = build_map(layout, pairs, ModelEntry(name="tiny", weights_hash="0" * 64), {})
    losses = [evaluator.measure(schemes, ids) for ids in CHUNKS]
    kl = sum(loss.kl_sum for loss in losses) / sum(loss.tokens for loss in losses)
    return Export(names, evaluator, CHUNKS, kl)


@pytest.fixture(scope="module", params=MODELS)
def written(request, tmp_path_factory):
    family, more = MODELS[request.param]
    export = export_of(family, tmp_path_factory.mktemp("model"), more)
    folder = tmp_path_factory.mktemp("export")
    load_target("gguf").write(export, folder)
    return export, folder


def test_llama_cpp_computes_what_was_measured(written):
    """Rotary halves, grouped queries, norms of queries, tied heads: any slip costs nats."""
    export, folder = written
    found = load_target("gguf").check(export, folder)
    layout = export.evaluator.bank.layout
    mixture = any(unit.kind == "experts" for unit in layout.units)
    # activations of 8 bits send a token to another expert now and then
    noise = 0.01 if mixture else 0.003
    assert found["reloaded_kl"] == pytest.approx(export.measured_kl, rel=0.02, abs=noise)
    assert found["reloaded_perplexity"] == pytest.approx(found["measured_perplexity"], rel=0.02)
    assert found["top1_agreement"] > (0.75 if mixture else 0.85)
    assert found["generated_tokens_per_s"] > 0
    assert found["prompt_tokens_per_s"] > 0


def test_the_bytes_are_the_banks_and_their_number_is_predicted(written):
    export, folder = written
    engine, bank = load_engine("llama.cpp"), export.evaluator.bank
    reader = gguf.GGUFReader(folder / FILE_NAME)
    types = {tensor.name: tensor.tensor_type.name.lower() for tensor in reader.tensors}
    predicted = engine.other_bytes(bank.layout, load_config(bank.checkpoint))
    for unit, scheme in zip(bank.layout.units, export.precision_map.schemes, strict=True):
        predicted += sum(engine.nbytes(scheme, site.shape) for site in unit.stored)
    assert tensor_bytes(folder / FILE_NAME) == predicted
    down = next(u for u in bank.layout.units if u.name.endswith("down_proj"))
    scheme = export.precision_map.schemes[bank.layout.units.index(down)]
    name = "blk.0.ffn_down_exps.weight" if down.kind == "experts" else "blk.0.ffn_down.weight"
    (tensor,) = (t for t in reader.tensors if t.name == name)
    site = down.sites[-1]
    (packed,) = bank.packed_parameters(down, scheme, site.parameter).tensors.values()
    assert types[name] == engine.kernel(scheme, site.shape).lower()
    assert np.array_equal(tensor.data.view(np.uint8), packed.view(torch.uint8).numpy())


def test_llama_cpp_splits_text_as_the_model_does(written):
    export, folder = written
    tokenizer = load_tokenizer(export.evaluator.bank.checkpoint)
    text = "def f(x):\n    return 'It isn’t 1234', \"été\"\n"
    with LlamaModel(folder / FILE_NAME, threads=1) as model:
        assert model.tokenize(text) == tokenizer.encode(text, add_special_tokens=False)


def test_a_file_that_computes_something_else_is_refused(written):
    export, folder = written
    wrong = Export(export.precision_map, export.evaluator, CHUNKS, 2 * export.measured_kl + 1)
    with pytest.raises(ExportError, match="llama.cpp computes a KL of"):
        load_target("gguf").check(wrong, folder)


def test_maps_that_it_cant_serve_are_refused_with_their_units(make_bank, tmp_path):
    bank = make_bank("llama")
    schemes = [
        ("bf16", "bf16") if u.layer is None else ("int2-g32", "bf16") for u in bank.layout.units
    ]
    names = build_map(bank.layout, schemes, ModelEntry(name="tiny", weights_hash="0" * 64), {})
    export = Export(names, Evaluator(bank, torch.device("cpu")), CHUNKS, 1.0)
    with pytest.raises(
        ExportError, match=r"can't serve 8 units: .*q_proj.*has no kernel for int2-g32"
    ):
        load_target("gguf").write(export, tmp_path)


def test_models_that_gguf_files_dont_know_are_refused(make_bank, tmp_path):
    bank = make_bank("gpt_neox")
    schemes = [("bf16", "bf16")] * len(bank.layout.units)
    names = build_map(bank.layout, schemes, ModelEntry(name="tiny", weights_hash="0" * 64), {})
    export = Export(names, Evaluator(bank, torch.device("cpu")), CHUNKS, 0.0)
    with pytest.raises(UnknownNameError, match="kind of model for GGUF files 'gpt_neox'"):
        load_target("gguf").write(export, tmp_path)
    with pytest.raises(UnknownNameError, match="kind of model for GGUF files 'gpt_neox'"):
        load_engine("llama.cpp").check(load_config(bank.checkpoint))


def test_rotary_embeddings_that_arent_written_are_refused_first():
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0}
    config = transformers.LlamaConfig(rope_parameters=rope)
    with pytest.raises(ExportError, match="scaled by 'yarn'.*default, linear, llama3"):
        load_engine("llama.cpp").check(config)


def test_rules():
    engine, site = load_engine("llama.cpp"), Site("q", "q.weight", (64, 96))
    assert engine.refusal(site, Scheme("gguf-q4_K")) is None
    assert engine.refusal(site, Scheme("bf16")) is None
    assert "no kernel for int4-g64; it has gguf-*" in engine.refusal(site, Scheme("int4-g64"))
    assert engine.kernel(Scheme("gguf-q4_K"), (64, 96)) == "q5_0"  # 256 doesn't divide 96
    assert engine.kernel(Scheme("gguf-q4_K"), (64, 512)) == "q4_K"


def test_a_damaged_file_is_one_line(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(EngineError, match="can't load"):
        LlamaModel(tmp_path / "model.gguf", 1)


def test_products_are_timed_with_their_spread():
    """A product of many rows takes longer than one of a row; an unknown type is refused."""
    beside = load_engine("llama.cpp").reference_cell
    cells = [Cell((256, 256), "q8_0", 1), Cell((256, 256), "q8_0", 64)]
    one, many = time_products(cells, beside, 1)
    assert 0 < one.median_s < many.median_s
    assert one.spread_s >= 0
    with pytest.raises(KernelError, match="no type 'q9'"):
        time_products([Cell((256, 256), "q9", 1)], beside, 1)


def test_times_are_told_in_terms_of_the_reference():
    """Were the reference usually twice as slow as now, so would be everything."""
    beside = load_engine("llama.cpp").reference_cell
    (now,) = time_products([beside], beside, 1)
    (usually,) = time_products([beside], beside, 1, 2 * now.median_s)
    assert usually.median_s == pytest.approx(2 * now.median_s, rel=0.2)


def spm_tokenizer(folder):
    """A tokenizer of Llama 2's kind: pieces with a mark for spaces, and bytes for the rest."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:;'()=_"]
    pairs = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("i", "n"), ("e", "r"), ("▁", "s")]
    vocab = {piece: i for i, piece in enumerate([*pieces, *letters, *(a + b for a, b in pairs)])}
    made = transformers.LlamaTokenizer(vocab=vocab, merges=pairs)
    made.save_pretrained(folder)
    return len(vocab)


def test_a_batch_has_a_cache_for_each_sequence(written):
    """Each computes what it would alone, wherever its cache ends."""
    *_, folder = written
    path = folder / FILE_NAME

    def last(model, place):
        row = model._llama.llama_get_logits_ith(model._context, place)
        return np.ctypeslib.as_array(row, (model.vocab,)).copy()

    with LlamaModel(path, 1, 32) as alone, LlamaModel(path, 1, 32, sequences=3) as three:
        for model in (alone, three):
            model.fill(9)
            model.restore(model.state())
        for _ in range(2):
            assert alone.step_s() > 0
            assert three.step_s() > 0
            for sequence in range(3):
                np.testing.assert_allclose(last(three, sequence), last(alone, 0), atol=1e-3)
        assert three.prefill_s(7)[0] > 0
        prompt = alone.logits(np.arange(10, 17))[-1]
        for sequence in range(3):
            np.testing.assert_allclose(last(three, 7 * sequence + 6), prompt, atol=1e-3)


def test_one_sequence_has_the_key_that_it_had_before_there_were_batches():
    one, two = (Exercise(512, 4096, 8, 2, batch) for batch in (1, 2))
    assert one.key == (("prompt", 512), ("past", 4096), ("generated", 8), ("threads", 2))
    assert two.key == (*one.key, ("batch", 2))


def test_tokenizers_of_sentencepiece_are_written(tmp_path):
    """llama.cpp merges by score; ranks of merges as scores give the same tokens."""
    folder = save_tiny("llama", tmp_path / "model")
    size = spm_tokenizer(folder)
    path = tmp_path / "vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    checkpoint = resolve(str(folder))
    add_tokenizer(writer, checkpoint, size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with LlamaVocab(path) as vocabulary:
        assert agrees(vocabulary, checkpoint)
        wanted = load_tokenizer(checkpoint).encode("the inner", add_special_tokens=False)
        assert vocabulary.tokenize("the inner") == wanted


@pytest.mark.parametrize("name", ["int4-g32", "int8-g32"])
def test_our_integers_are_ggmls_blocks(name):
    """What ggml reads out of the blocks is what our format decodes, to the bit."""
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(0))
    format, site = FORMATS[name], Site("q", "q.weight", (8, 96))
    made = format.pack(*format.nearest(weight))
    found = blocks(made)
    own = FORMATS[f"gguf-{LLAMA.kernel(Scheme(name), (8, 96))}"]
    read = own.decode(found, {"columns": torch.tensor(96)})
    assert torch.equal(read, format.decode(*format.unpack(made)))
    assert LLAMA.refusal(site, Scheme(name)) is None
    assert LLAMA.nbytes(Scheme(name), (8, 96)) == found.numel() == own.nbytes((8, 96))
    assert "don't divide" in LLAMA.refusal(Site("q", "q", (8, 100)), Scheme(name))


def test_presets_are_llama_quantizes(llama):
    """Q4_K_M of a model of 30 blocks, as llama-quantize's log has it."""
    config = load_config(llama)
    config.num_hidden_layers = 30
    sites = [
        Site(name, f"{name}.weight", (64, 64))
        for i in range(30)
        for name in (f"model.layers.{i}.self_attn.v_proj", f"model.layers.{i}.mlp.up_proj")
    ]
    units = tuple(Unit(s.name, "linear", (s,), int(s.name.split(".")[2])) for s in sites)
    found = LLAMA.presets(config, Layout(units, (), 0))["Q4_K_M"]
    finer = [i for i in range(30) if found[sites[2 * i].parameter] == "gguf-q6_K"]
    assert finer == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]
    assert {found[site.parameter] for site in sites[1::2]} == {"gguf-q4_K"}


CACHES = ["bf16", "int8-g32", "gguf-q4_0", "gguf-q5_1", "gguf-iq4_nl"]


@pytest.mark.parametrize(("keys", "values"), [("int8-g32", "gguf-q4_0"), ("gguf-q5_1", "bf16")])
def test_llama_cpp_keeps_its_cache_as_it_was_measured(tmp_path, keys, values):
    """Keys and values in their own types, by llama.cpp's own kernels; the loss is the candidate's."""
    sizes = {"head_dim": 32, "hidden_size": 128, "num_key_value_heads": 2}
    checkpoint = resolve(str(save_tiny("llama", tmp_path / "model", **sizes)))
    layout = describe(checkpoint).split().with_caches(LLAMA.cache_sharing)
    assert [u.name for u in layout.units if u.kind == "cache"] == ["k_cache", "v_cache"]
    choices = [
        [Scheme(n) for n in (CACHES if u.kind == "cache" else ["bf16"])] for u in layout.units
    ]
    bank = Bank(checkpoint, layout, QUANTIZERS["rtn"], torch.float32)
    bank.build(choices)
    evaluator = Evaluator(bank, torch.device("cpu"))
    chosen = {"k_cache": keys, "v_cache": values}
    schemes = [Scheme(chosen.get(unit.name, "bf16")) for unit in layout.units]
    losses = [evaluator.measure(schemes, ids) for ids in CHUNKS]
    kl = sum(loss.kl_sum for loss in losses) / sum(loss.tokens for loss in losses)
    pairs = [(s.weight, s.activation) for s in schemes]
    names = build_map(layout, pairs, ModelEntry(name="tiny", weights_hash="0" * 64), {})
    export, folder = Export(names, evaluator, CHUNKS, kl), tmp_path / "out"
    folder.mkdir()
    load_target("gguf").write(export, folder)
    found = load_target("gguf").check(export, folder)
    assert found["reloaded_kl"] == pytest.approx(kl, rel=0.03, abs=0.0005)
    assert kl > 0.005
    kinds = LLAMA.cache_types(layout, schemes)
    assert f"--cache-type-k {kinds[0]}" in found["serve"]
    assert found["top1_agreement"] > 0.9
    assert ("--flash-attn on" in found["serve"]) == (values != "bf16")


def test_llama_cpp_refuses_caches_that_it_has_no_type_for():
    unit = Unit("k_cache", "cache", (Site("model.layers.0.k_cache", "", (2, 32)),))
    assert LLAMA.unit_refusal(unit, Scheme("gguf-q8_0")) is None
    assert LLAMA.unit_refusal(unit, Scheme("int8-g32")) is None
    assert "keeps no KV cache in int3-g32" in LLAMA.unit_refusal(unit, Scheme("int3-g32"))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_mixtures_of_experts_are_computed_alike(tmp_path, family):
    """Gates above ups, routers, shared experts: in full precision nothing else is left to differ."""
    checkpoint = resolve(str(save_tiny(family, tmp_path / "model")))
    layout = describe(checkpoint).split()
    bank = Bank(checkpoint, layout, QUANTIZERS["rtn"], torch.float32)
    schemes = [Scheme("bf16")] * len(layout.units)
    bank.build([[scheme] for scheme in schemes])
    evaluator = Evaluator(bank, torch.device("cpu"))
    losses = [evaluator.measure(schemes, ids) for ids in CHUNKS]
    kl = sum(loss.kl_sum for loss in losses) / sum(loss.tokens for loss in losses)
    names = build_map(
        layout, [("bf16", "bf16")] * len(layout.units), ModelEntry(name="t", weights_hash="0"), {}
    )
    folder = tmp_path / "out"
    folder.mkdir()
    export = Export(names, evaluator, CHUNKS, kl)
    load_target("gguf").write(export, folder)
    found = load_target("gguf").check(export, folder)
    assert found["reloaded_kl"] == pytest.approx(kl, abs=0.003)
    with LlamaModel(folder / FILE_NAME, 1, context=48, batch=48) as model:
        logits = torch.from_numpy(model.logits(CHUNKS[0]))
    exact = evaluator.reference_logits(CHUNKS[0])
    assert torch.corrcoef(torch.stack([logits.flatten(), exact.flatten()]))[0, 1] > 0.995


def test_mixtures_that_llama_cpp_computes_otherwise_are_refused(tmp_path):
    for more, why in (
        ({"norm_topk_prob": False}, "norm_topk_prob=False"),
        ({"mlp_only_layers": [0]}, "experts in every layer"),
    ):
        folder = save_tiny("qwen3_moe", tmp_path / next(iter(more)), **more)
        with pytest.raises(ExportError, match=why):
            LLAMA.check(load_config(resolve(str(folder))))
    narrow = Unit("k_cache", "cache", (Site("model.layers.0.k_cache", "", (2, 80)),))
    assert "don't divide into blocks of 32" in LLAMA.unit_refusal(narrow, Scheme("int8-g32"))
    assert LLAMA.unit_refusal(narrow, Scheme("bf16")) is None


def test_caches_of_layers_are_one_type_or_refused(llama):
    """A job without an engine decides them apart."""
    layout = describe(llama).with_caches("apart")
    schemes = [
        Scheme("gguf-q8_0" if unit.name.endswith("k_cache") else "bf16") for unit in layout.units
    ]
    assert LLAMA.cache_types(layout, schemes) == ("q8_0", "f16")
    schemes[-2] = Scheme("gguf-q4_0")
    with pytest.raises(ExportError, match="all keys in one type"):
        LLAMA.cache_types(layout, schemes)

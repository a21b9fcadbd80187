"""Importance matrices: both of llama.cpp's file formats, by our names and shapes, or one clear line."""

import struct
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch

from quantization.adapter import describe
from quantization.checkpoints import load_config, resolve
from quantization.errors import QuantizationError
from quantization.imatrix import read_imatrix, tensor_names, write_imatrix
from quantization.units import Layout

FAMILIES = ["llama", "qwen3", "gemma2", "gpt_neox", "mixtral", "qwen2_moe", "gpt_oss", "cohere"]


def model(tiny_folders, family):
    checkpoint = resolve(str(tiny_folders(family)))
    return describe(checkpoint), load_config(checkpoint).model_type


@pytest.fixture(scope="module")
def llama_model(tiny_folders):
    return model(tiny_folders, "llama")


def importance_of(layout):
    """A different matrix for each linear and each unit of experts; no embeddings, as llama-imatrix."""
    generator = torch.Generator().manual_seed(0)
    return {
        site.parameter: torch.rand((*site.shape[:-2], site.shape[-1]), generator=generator)
        for unit in layout.units
        for site in unit.stored
        if unit.kind != "embedding"
    }


def binary(entries, calls=7):
    """The older format, from llama-imatrix's writer: sums over calls, then what is optional."""
    data = struct.pack("<i", len(entries))
    for name, values in entries.items():
        data += (
            struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, values.size)
        )
        data += (values.astype("<f4") * calls).tobytes()
    return data + struct.pack("<ii", calls, 4) + b"text"


def write_gguf(path, tensors, type="imatrix"):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(type)
    for name, values in tensors.items():
        writer.add_tensor(name, np.asarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_of_every_family_has_a_name_in_gguf(tiny_folders, family):
    layout, architecture = model(tiny_folders, family)
    names = tensor_names(layout, architecture)
    assert all(names.values()), names
    flat = [name for entry in names.values() for name in entry]
    assert len(set(flat)) == len(flat)
    assert all(name.endswith(".weight") for name in flat)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_reads_back(tiny_folders, family, tmp_path):
    layout, architecture = model(tiny_folders, family)
    importance = importance_of(layout)
    path = tmp_path / "imatrix.gguf"
    write_imatrix(path, importance, layout, architecture, "text", chunks=3, length=512)
    found = read_imatrix(path, layout, architecture)
    assert found.keys() == importance.keys()
    for name, values in importance.items():
        assert found[name].shape == values.shape
        torch.testing.assert_close(found[name], values)


def test_what_is_written_has_what_llama_quantize_insists_on(llama_model, tmp_path):
    layout, architecture = llama_model
    path = tmp_path / "imatrix.gguf"
    write_imatrix(path, importance_of(layout), layout, architecture, "text", chunks=3, length=512)
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "imatrix"
    assert fields["imatrix.datasets"] == ["text"]
    assert (fields["imatrix.chunk_count"], fields["imatrix.chunk_size"]) == (3, 512)
    assert "general.architecture" not in fields
    shapes = {tensor.name: list(tensor.shape) for tensor in reader.tensors}
    assert shapes["blk.0.attn_q.weight.in_sum2"] == [64, 1]
    assert shapes["blk.0.attn_q.weight.counts"] == [1, 1]


def test_packed_gate_and_up_are_two_tensors_of_the_same_inputs(tiny_folders, tmp_path):
    layout, architecture = model(tiny_folders, "qwen2_moe")
    names = tensor_names(layout, architecture)["model.layers.1.mlp.experts.gate_up_proj"]
    assert names == ("blk.1.ffn_gate_exps.weight", "blk.1.ffn_up_exps.weight")
    sums = np.arange(4 * 64).reshape(4, 64)
    tensors = {f"{names[1]}.in_sum2": sums, f"{names[1]}.counts": [[2], [4], [1], [0]]}
    found = read_imatrix(write_gguf(tmp_path / "i.gguf", tensors), layout, architecture)
    (values,) = found.values()
    expected = torch.tensor(sums[:3] / [[2], [4], [1]], dtype=torch.float32)
    assert torch.equal(values[:3], expected)
    assert torch.equal(values[3], torch.ones(64))  # no token reached it


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_older_binary_format_is_read_too(tiny_folders, family, tmp_path):
    layout, architecture = model(tiny_folders, family)
    importance, names = importance_of(layout), tensor_names(layout, architecture)
    entries = {names[key][0]: values.numpy().flatten() for key, values in importance.items()}
    path = tmp_path / "imatrix.dat"
    path.write_bytes(binary(entries))
    found = read_imatrix(path, layout, architecture)
    assert found.keys() == importance.keys()
    for name, values in importance.items():
        torch.testing.assert_close(found[name], values)


def test_an_architecture_goes_by_either_of_its_names(llama_model):
    layout, _ = llama_model
    assert tensor_names(layout, "llama") == tensor_names(layout, "mistral")
    assert tensor_names(layout, "qwen2_moe") == tensor_names(layout, "qwen2moe")
    with pytest.raises(QuantizationError, match="no architecture 'nonesuch'"):
        tensor_names(layout, "nonesuch")


def test_a_file_cut_anywhere_is_refused_in_one_line(llama_model, tmp_path):
    layout, architecture = llama_model
    whole, path = tmp_path / "whole.gguf", tmp_path / "cut"
    write_imatrix(whole, importance_of(layout), layout, architecture, "text", chunks=1, length=9)
    entries = {"blk.0.attn_q.weight": np.ones(64), "blk.1.attn_q.weight": np.ones(64)}
    old = binary(entries)[:-12]
    for data in (whole.read_bytes(), old):
        for end in [0, 2, 3, 5, 11, *range(20, len(data) - 8, len(data) // 9)]:
            path.write_bytes(data[:end])
            with pytest.raises(QuantizationError, match="no importance matrix that") as caught:
                read_imatrix(path, layout, architecture)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "type", "message"),
    [
        ({"blk.0.attn_q.weight.in_sum2": np.ones((1, 64))}, "imatrix", "blk.0.attn_q.weight.counts"),
        ({"blk.0.attn_q.weight": np.ones((1, 64))}, "model", "GGUF file of another type"),
        ({"blk.7.attn_q.weight.in_sum2": [[1]], "blk.7.attn_q.weight.counts": [[1]]}, "imatrix",
         "no entry for any layer of this llama model"),
        ({"blk.0.attn_q.weight.in_sum2": np.ones((1, 96)), "blk.0.attn_q.weight.counts": [[1]]},
         "imatrix", "another model: 96 values for .*q_proj.weight, which has 64 inputs"),
        ({"blk.0.attn_q.weight.in_sum2": -np.ones((1, 64)), "blk.0.attn_q.weight.counts": [[1]]},
         "imatrix", "negative or non-finite values for blk.0.attn_q"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_say_why(llama_model, tmp_path, tensors, type, message):
    layout, architecture = llama_model
    with pytest.raises(QuantizationError, match=message):
        read_imatrix(write_gguf(tmp_path / "i.gguf", tensors, type), layout, architecture)


def test_a_file_that_is_not_there_says_so(llama_model, tmp_path):
    with pytest.raises(QuantizationError, match="there is no file"):
        read_imatrix(tmp_path / "none.gguf", *llama_model)


def test_a_layout_without_the_layers_of_a_file_finds_nothing(llama_model, tmp_path):
    layout, architecture = llama_model
    path = tmp_path / "imatrix.gguf"
    write_imatrix(path, importance_of(layout), layout, architecture, "text", chunks=1, length=9)
    outside: Layout = replace(layout, units=layout.units[:1])
    with pytest.raises(QuantizationError, match="no entry for any layer"):
        read_imatrix(path, outside, architecture)

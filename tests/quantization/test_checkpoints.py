"""From what a user types to a model, or to one line that says why not."""

import pytest

from quantization.checkpoints import load_model, load_tokenizer, resolve
from quantization.errors import ModelError


def test_a_missing_path_is_one_line():
    with pytest.raises(ModelError, match="no model at './nowhere'"):
        resolve("./nowhere")


def test_a_hub_id_without_a_network_says_both(monkeypatch):
    with pytest.raises(ModelError, match="neither a local path nor a model that the hub gives"):
        resolve("nobody/nothing-of-the-kind")


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no config.json with .safetensors weights"):
        resolve(str(tmp_path))


def test_several_gguf_files_must_be_chosen_from(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="holds 2 GGUF files; name one"):
        resolve(str(tmp_path))


def test_a_damaged_gguf_is_one_line(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"not a model")
    with pytest.raises(ModelError, match="can't load"):
        resolve(str(tmp_path / "x.gguf"))


def test_the_hash_follows_the_weights(tiny_folders, tmp_path):
    source = tiny_folders("llama")
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    first = resolve(str(source)).weights_hash
    assert resolve(str(tmp_path)).weights_hash == first
    weights = tmp_path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert resolve(str(tmp_path)).weights_hash != first


@pytest.mark.demo
def test_the_demo_model_is_imported_from_its_gguf():
    import torch

    from bitfront.demo import demo_model

    checkpoint = resolve(demo_model())
    assert load_tokenizer(checkpoint)("hello")["input_ids"] == [28120]
    assert load_model(checkpoint, torch.bfloat16).config.num_hidden_layers == 30
    assert resolve(demo_model()) == checkpoint

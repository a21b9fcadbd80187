"""A tokenizer in a GGUF file: copied where the model came as GGUF, else made from transformers'.

llama.cpp splits text by regular expressions that it knows by name (`tokenizer.ggml.pre`). Which of
them a tokenizer wants isn't written anywhere, so it is found by trying: the first whose tokens
equal transformers' on a text full of the differences. A tokenizer that none fits is refused.
"""

import json
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from engines.llama_library import LlamaVocab
from quantization.checkpoints import Checkpoint, load_tokenizer
from quantization.errors import ExportError

PREFIX = "tokenizer."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPLITTERS = (
    "llama-bpe", "qwen2", "smollm", "gpt-2", "tekken", "deepseek-v3", "deepseek-llm", "gpt-4o",
    "starcoder", "command-r", "qwen35", "dbrx", "stablelm2", "olmo", "refact", "falcon3", "exaone",
    "llama4", "kimi-k2", "glm4", "chatglm-bpe", "bloom", "deepseek-coder", "falcon", "mpt", "viking",
    "poro-chat", "superbpe", "seed-coder", "hunyuan", "minerva-7b", "trillion", "default",
)  # fmt: skip
"""Names that llama.cpp knows (`llama_vocab::impl::load` in src/llama-vocab.cpp), common ones first."""
PROBE = (
    "Hello, world! It's 2026; they'll pay $1234567.89 (or 12 345,67 €) -- won't they?\n\n\n"
    "def f(x_1):\n\tif x_1 >= 10**3:  # done\n        return 'ÀÉÎ ß'\n\r\n"
    "   three spaces, trailing   \nСлово, 漢字かな交じり文、한국어 문장 ๑๒๓ ١٢٣ 🙂👩‍💻 İ NO-BREAK\u00a0SPACE "
    "CamelCaseWORD mixed123abc 0x1F 3.14e-10 I'D 'Twas don’t :-) //// ==== <<EOF"
)  # fmt: skip
"""Digits, contractions, white space, scripts: where splitters differ. All of it is in composed form,
which some tokenizers bring text into and llama.cpp does not."""


def agrees(vocabulary: Any, checkpoint: Checkpoint) -> bool:
    """Whether a file in llama.cpp's hands splits the probe as transformers' tokenizer does."""
    wanted = load_tokenizer(checkpoint).encode(PROBE, add_special_tokens=False)
    return np.array_equal(vocabulary.tokenize(PROBE), wanted)


def add_tokenizer(writer: gguf.GGUFWriter, checkpoint: Checkpoint, vocab: int) -> None:
    """Write all that llama.cpp must know of a tokenizer, chat template included.

    Args:
        writer: of the file.
        checkpoint: whose tokenizer it is.
        vocab: rows of the embedding; there may be more than tokens.

    Raises:
        ExportError: a kind of tokenizer that this doesn't write, or that no splitter fits.
    """
    source = Path(checkpoint.name).expanduser()
    if source.suffix == ".gguf" and source.is_file():
        for name, value, kind, of in _fields_of(source):
            writer.add_key_value(name, value, kind, of)
        return
    fields = _made(checkpoint, vocab)
    _write(writer, fields)
    if fields["template"]:
        writer.add_chat_template(fields["template"])


@lru_cache(maxsize=4)
def _made(checkpoint: Checkpoint, vocab: int) -> dict[str, Any]:
    """The fields of transformers' tokenizer, once llama.cpp is seen to split text alike."""
    tokenizer = load_tokenizer(checkpoint)
    fields = _fields(tokenizer, vocab)
    fields["template"] = getattr(tokenizer, "chat_template", None)
    if fields["model"] == "gpt2":
        fields["pre"] = _splitter(tokenizer, fields)
        return fields
    for prefix in (True, False):
        fields["prefix"] = prefix
        if _agrees(tokenizer, fields):
            return fields
    raise ExportError(
        "llama.cpp splits text otherwise than this model's tokenizer, whatever it is told; "
        "this export can't be made"
    )


@lru_cache(maxsize=1)
def _fields_of(source: Path) -> list[tuple[str, Any, Any, Any]]:
    """The tokenizer's fields as they are; transformers would have lost some."""
    return [
        (name, field.contents(), field.types[0], field.types[-1] if field.types[1:] else None)
        for name, field in gguf.GGUFReader(source).fields.items()
        if name.startswith(PREFIX)
    ]


def _fields(tokenizer: Any, vocab: int) -> dict[str, Any]:
    """What goes into `tokenizer.ggml.*`."""
    if not getattr(tokenizer, "is_fast", False):
        raise ExportError(
            "the model has no tokenizer.json, from which its GGUF tokenizer would be made; "
            "save its tokenizer with transformers first"
        )
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model["type"] != "BPE":
        raise ExportError(
            f"the model's tokenizer is a {model['type']} one; exports to GGUF know BPE tokenizers"
        )
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens = [names.get(i, f"[PAD{i}]") for i in range(vocab)]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    spm = bool(model.get("byte_fallback"))
    kinds = [_kind(i, names, added, tokens, spm) for i in range(vocab)]
    fields: dict[str, Any] = {"model": "llama" if spm else "gpt2", "tokens": tokens, "kinds": kinds}
    if spm:
        rank = {merge.replace(" ", ""): -float(i) for i, merge in enumerate(merges)}
        fields["scores"] = [rank.get(token, 0.0) for token in tokens]
    else:
        fields["merges"] = merges
    ids = ("bos", "eos", "unk", "pad")
    special = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ids}
    fields["special"] = {name: number for name, number in special.items() if number is not None}
    encoded = tokenizer("a")["input_ids"]
    fields["bos_first"] = bool(encoded) and encoded[0] == special["bos"]
    return fields


def _kind(
    i: int, names: dict[int, str], added: dict[int, Any], tokens: list[str], spm: bool
) -> int:
    if i not in names:
        return UNUSED
    if i in added:
        return CONTROL if added[i].special else USER_DEFINED
    if spm and tokens[i].startswith("<0x") and len(tokens[i]) == 6:
        return BYTE
    return UNKNOWN if spm and tokens[i] == "<unk>" else NORMAL


def _write(writer: gguf.GGUFWriter, fields: dict[str, Any]) -> None:
    writer.add_tokenizer_model(fields["model"])
    if "pre" in fields:
        writer.add_tokenizer_pre(fields["pre"])
    writer.add_token_list(fields["tokens"])
    writer.add_token_types(fields["kinds"])
    if "scores" in fields:
        writer.add_token_scores(fields["scores"])
        writer.add_add_space_prefix(fields["prefix"])
    else:
        writer.add_token_merges(fields["merges"])
    for name, number in fields["special"].items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(fields["bos_first"])


def _splitter(tokenizer: Any, fields: dict[str, Any]) -> str:
    """The name of the splitter with which llama.cpp's tokens equal transformers'."""
    for name in SPLITTERS:
        if _agrees(tokenizer, {**fields, "pre": name}):
            return name
    raise ExportError(
        "none of the text splitters that llama.cpp knows gives this model's tokens; "
        "this export can't be made with this build of llama.cpp"
    )


def _agrees(tokenizer: Any, fields: dict[str, Any]) -> bool:
    """Whether llama.cpp, told these fields, splits the probe as transformers does."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "vocabulary.gguf")
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(1)
        _write(writer, fields)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with LlamaVocab(path) as vocabulary:
            found = vocabulary.tokenize(PROBE)
    return np.array_equal(found, tokenizer.encode(PROBE, add_special_tokens=False))

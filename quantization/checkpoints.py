"""From what a user types to a folder that transformers loads, with a hash of its weights.

A model is named by a hub id (`org/model`), a file of a hub repository (`org/repo/file.gguf`), a
local folder or a local GGUF file. GGUF files are dequantized once into the cache, because
transformers parses their metadata anew at each use (about 20 s for a 135M model) and because
workers then map the weights instead of holding a copy each.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from quantization.cache import cache_dir, write_folder
from quantization.errors import ModelError

WEIGHT_SUFFIXES = (".safetensors", ".gguf")
for _name in ("torchao", "torch.utils._pytree"):
    # transformers imports torchao, which warns of its libraries for other machines
    logging.getLogger(_name).setLevel(logging.ERROR)
HUB_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py"]


@dataclass(frozen=True)
class Checkpoint:
    """A model on this node's disk.

    Args:
        name: what the user typed.
        folder: what transformers loads, config and tokenizer included.
        weights_hash: SHA-256 of the configuration and the original weight files.
        revision: the hub's commit, where there is one.
        trust_remote_code: whether the folder's own Python code may run.
    """

    name: str
    folder: str
    weights_hash: str
    revision: str | None = None
    trust_remote_code: bool = False


def resolve(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Checkpoint:
    """Find (download, import) a model.

    Raises:
        ModelError: nothing there, no weights in it, or a GGUF that transformers can't read.
    """
    path, commit = _locate(name, revision)
    weights = _weight_files(path)
    digest = _hash_files(weights)
    folder = path
    if weights[-1].suffix == ".gguf":
        folder = _import_gguf(weights[-1], digest)
    return Checkpoint(name, str(folder), digest, commit, trust_remote_code)


def load_config(checkpoint: Checkpoint) -> Any:
    """The transformers configuration."""
    from transformers import AutoConfig

    with readable(checkpoint.name):
        return AutoConfig.from_pretrained(
            checkpoint.folder, trust_remote_code=checkpoint.trust_remote_code
        )


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer that belongs to the model."""
    from transformers import AutoTokenizer

    with readable(checkpoint.name):
        return AutoTokenizer.from_pretrained(
            checkpoint.folder, trust_remote_code=checkpoint.trust_remote_code
        )


def load_model(checkpoint: Checkpoint, dtype: Any) -> Any:
    """The causal language model with its weights, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    with readable(checkpoint.name):
        return AutoModelForCausalLM.from_pretrained(
            checkpoint.folder, dtype=dtype, trust_remote_code=checkpoint.trust_remote_code
        ).eval()


def _locate(name: str, revision: str | None) -> tuple[Path, str | None]:
    path = Path(name).expanduser()
    if path.exists():
        return path.resolve(), None
    parts = name.split("/")
    if name.startswith((".", "/", "~")) or len(parts) not in (2, 3):
        raise ModelError(
            f"no model at '{name}': give a folder, a .gguf file or a hub id such as "
            "'org/model' (or 'demo' after `make demo`)"
        )
    return _download(name, parts, revision)


def _download(name: str, parts: list[str], revision: str | None) -> tuple[Path, str | None]:
    import huggingface_hub

    try:
        if name.endswith(".gguf"):
            file = huggingface_hub.hf_hub_download(
                "/".join(parts[:2]), "/".join(parts[2:]), revision=revision
            )
            return Path(file), Path(file).parent.name
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            allow_patterns=HUB_PATTERNS,
            ignore_patterns=["consolidated*", "original/*", "onnx/*"],
        )
    except Exception as error:  # the hub client raises a dozen types for the same few facts
        raise ModelError(
            f"'{name}' is neither a local path nor a model that the hub gives "
            f"({type(error).__name__}: {_first_line(error)})"
        ) from error
    return Path(folder), Path(folder).name


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"'{path}' is not a GGUF file; give the model's folder instead")
        return [path]
    config = path / "config.json"
    tensors = sorted(path.glob("*.safetensors"))
    if tensors and config.exists():
        return [config, *tensors]
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return ggufs
    if ggufs:
        raise ModelError(f"'{path}' holds {len(ggufs)} GGUF files; name one, such as '{ggufs[0]}'")
    raise ModelError(f"'{path}' holds no config.json with .safetensors weights, and no GGUF file")


def _hash_files(files: list[Path]) -> str:
    """SHA-256 over names and contents; remembered by path, size and time of change."""
    stamp = json.dumps([(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files])
    memory = cache_dir() / "hashes" / hashlib.sha256(stamp.encode()).hexdigest()
    if memory.exists() and len(known := memory.read_text()) == 64:
        return known
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    memory.parent.mkdir(parents=True, exist_ok=True)
    memory.write_text(digest.hexdigest())
    return digest.hexdigest()


def _import_gguf(file: Path, digest: str) -> Path:
    """Dequantize a GGUF file into the cache as a float32 safetensors checkpoint."""
    folder = cache_dir() / "models" / digest[:32]
    if folder.exists():
        return folder

    def write(work: Path) -> None:
        with readable(str(file)), redirect_stderr(StringIO()):  # its bars ignore the setting
            _write_snapshot(file, work)

    try:
        write_folder(folder, write)
    except OSError as error:
        raise ModelError(
            f"can't write the imported model to '{folder}' ({error}); "
            "free some space or set BITFRONT_CACHE"
        ) from error
    return folder


def _write_snapshot(file: Path, work: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers marks the model as quantized although it has just been dequantized
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(work)
    AutoTokenizer.from_pretrained(**source).save_pretrained(work)


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Turn what transformers raises about a bad model into a `ModelError`; silence its bars."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ModelError(f"can't load '{name}': {_first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[0][:300]

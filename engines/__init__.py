"""Other people's runtimes, and what each of them loads; one runtime or export target a file.

Targets are named here and imported when they are used: the neutral map needs no torch.
"""

from importlib import import_module
from typing import Any

from engines.base import Engine, Export, Rules, Target
from quantization.errors import EngineError
from quantization.registry import Registry

TARGETS: Registry[str] = Registry("export target")
TARGETS.add("map", "engines.neutral_map:NeutralMap")
TARGETS.add("safetensors", "engines.safetensors_checkpoint:SafetensorsCheckpoint")
TARGETS.add("packed", "engines.packed_checkpoint:PackedCheckpoint")
TARGETS.add("gguf", "engines.llama_cpp:GGUFFile")
TARGETS.add("compressed-tensors", "engines.compressed_tensors:CompressedTensorsFiles")
TARGETS.add("torchao", "engines.torchao:TorchAOCheckpoint")
TARGETS.add("gptq", "engines.gptq:GPTQCheckpoint")
TARGETS.add("mlx", "engines.mlx:MLXCheckpoint")
TARGETS.add("auto-round", "engines.auto_round:AutoRound")
TARGETS.add("modelopt", "engines.model_optimizer:ModelOptimizer")
TARGETS.add("llm-compressor", "engines.llm_compressor:LLMCompressor")

ENGINES: Registry[str] = Registry("engine")
ENGINES.add("llama.cpp", "engines.llama_cpp:LlamaCpp")
ENGINES.add("torch", "engines.torch_kernels:TorchKernels")
ENGINES.add("vllm", "engines.compressed_tensors:VLLM")
ENGINES.add("compressed-tensors", "engines.compressed_tensors:Library")
ENGINES.add("torchao", "engines.torchao:TorchAO")
ENGINES.add("gptq", "engines.gptq:GPTQ")
ENGINES.add("mlx", "engines.mlx:MLX")
ENGINES.add("packed", "engines.packed_checkpoint:PackedFiles")


LOADS = {
    "llama.cpp": "gguf",
    "torch": "packed",
    "vllm": "compressed-tensors",
    "compressed-tensors": "compressed-tensors",
    "torchao": "torchao",
    "gptq": "gptq",
    "mlx": "mlx",
    "packed": "packed",
}
"""What an engine loads: the target that writes it."""


def target_of(engine: str | None) -> str:
    """The target to export a map for an engine to; the neutral map without one."""
    return LOADS.get(engine or "", "map")


def load_target(name: str) -> Target:
    """The target of that name, or what an engine of that name loads.

    Raises:
        UnknownNameError: neither, with the nearest ones.
    """
    target: Target = _load(TARGETS[LOADS.get(name, name)])
    return target


def load_engine(name: str) -> Rules:
    """The engine of that name; raises `UnknownNameError` with the nearest ones."""
    engine: Rules = _load(ENGINES[name])
    return engine


def load_timed(name: str) -> Engine:
    """An engine whose kernels are timed on this machine.

    Raises:
        UnknownNameError: there is none of that name.
        EngineError: it is only known by its rules.
    """
    found = load_engine(name)
    if not isinstance(found, Engine):
        raise EngineError(f"{name} can't be timed on this machine; llama.cpp and torch can")
    return found


def _load(place: str) -> Any:
    module, _, attribute = place.partition(":")
    return getattr(import_module(module), attribute)()


__all__ = [
    "ENGINES",
    "TARGETS",
    "Engine",
    "Export",
    "Rules",
    "Target",
    "load_engine",
    "load_target",
    "load_timed",
    "target_of",
]

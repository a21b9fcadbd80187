"""Other people's runtimes, and what each of them loads; one runtime or export target a file.

Targets are named here and imported when they are used: the neutral map needs no torch.
"""

from importlib import import_module
from typing import Any

from engines.base import Engine, Export, Target
from quantization.registry import Registry

TARGETS: Registry[str] = Registry("export target")
TARGETS.add("map", "engines.neutral_map:NeutralMap")
TARGETS.add("safetensors", "engines.safetensors_checkpoint:SafetensorsCheckpoint")
TARGETS.add("gguf", "engines.llama_cpp:GGUFFile")

ENGINES: Registry[str] = Registry("engine")
ENGINES.add("llama.cpp", "engines.llama_cpp:LlamaCpp")
ENGINES.add("torch", "engines.torch_kernels:TorchKernels")


def load_target(name: str) -> Target:
    """The target of that name; raises `UnknownNameError` with the nearest ones."""
    target: Target = _load(TARGETS[name])
    return target


def load_engine(name: str) -> Engine:
    """The engine of that name; raises `UnknownNameError` with the nearest ones."""
    engine: Engine = _load(ENGINES[name])
    return engine


def _load(place: str) -> Any:
    module, _, attribute = place.partition(":")
    return getattr(import_module(module), attribute)()


__all__ = ["ENGINES", "TARGETS", "Engine", "Export", "Target", "load_engine", "load_target"]

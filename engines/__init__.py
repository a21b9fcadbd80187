"""Other people's runtimes, and what each of them loads; one export target a file.

Targets are named here and imported when they are used: the neutral map needs no torch.
"""

from importlib import import_module

from engines.base import Export, Target
from quantization.registry import Registry

TARGETS: Registry[str] = Registry("export target")
TARGETS.add("map", "engines.neutral_map:NeutralMap")
TARGETS.add("safetensors", "engines.safetensors_checkpoint:SafetensorsCheckpoint")


def load_target(name: str) -> Target:
    """The target of that name; raises `UnknownNameError` with the nearest ones."""
    module, _, attribute = TARGETS[name].partition(":")
    target: Target = getattr(import_module(module), attribute)()
    return target


__all__ = ["TARGETS", "Export", "Target", "load_target"]

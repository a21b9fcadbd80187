"""Joules, where this machine lets us read them: RAPL of its processors, NVML of its GPU.

A counter counts everything on its chip, other programs included; what was idle is not taken off.
"""

from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class Counter(ABC):
    """A counter of energy that only rises."""

    @abstractmethod
    def read_j(self) -> float:
        """Joules since some moment."""


@dataclass
class Rapl(Counter):
    """The packages of Intel's and AMD's processors; their counters start again at a maximum."""

    packages: tuple[Path, ...]

    def __post_init__(self) -> None:
        self._latest = [self._microjoules(package) for package in self.packages]
        self._whole = 0.0

    def read_j(self) -> float:
        """See `Counter.read_j`."""
        for place, package in enumerate(self.packages):
            now, before = self._microjoules(package), self._latest[place]
            if now < before:
                now_and_a_turn = now + int((package / "max_energy_range_uj").read_text())
                self._whole += now_and_a_turn - before
            else:
                self._whole += now - before
            self._latest[place] = now
        return self._whole * 1e-6

    @staticmethod
    def _microjoules(package: Path) -> int:
        return int((package / "energy_uj").read_text())


class Nvml(Counter):
    """The first NVIDIA GPU, Volta or newer."""

    def __init__(self) -> None:
        import pynvml

        pynvml.nvmlInit()
        self._read = pynvml.nvmlDeviceGetTotalEnergyConsumption
        self._device = pynvml.nvmlDeviceGetHandleByIndex(0)
        self.read_j()

    def read_j(self) -> float:
        """See `Counter.read_j`."""
        return float(self._read(self._device)) * 1e-3


def processor_counter(root: Path = POWERCAP) -> tuple[Counter | None, str]:
    """The processors' counter, and where it is or why there is none."""
    packages = tuple(sorted(p for p in root.glob("intel-rapl:*") if p.name.count(":") == 1))
    if not packages:
        return None, f"{root} has no RAPL counters (not an Intel or AMD machine, or a virtual one)"
    try:
        return Rapl(packages), f"RAPL of {len(packages)} packages"
    except PermissionError:
        return None, f"{packages[0]}/energy_uj may only be read by root: sudo chmod a+r it"
    except (OSError, ValueError) as error:
        return None, f"{packages[0]}/energy_uj can't be read ({error})"


def gpu_counter() -> tuple[Counter | None, str]:
    """The GPU's counter, or why there is none."""
    with suppress(ImportError):
        try:
            return Nvml(), "NVML"
        except ImportError:
            raise
        except Exception as error:  # pynvml has an error type for each code, made at import
            return None, f"NVML doesn't tell ({error})"
    return None, "NVML is read through nvidia-ml-py: pip install nvidia-ml-py"

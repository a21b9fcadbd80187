"""The contract of an export target: write what an engine loads, then load it back and compare."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantization.precision_map import PrecisionMap

if TYPE_CHECKING:
    from evaluation.evaluator import Evaluator


@dataclass(frozen=True)
class Export:
    """What a target is given.

    Args:
        precision_map: what is stored how.
        evaluator: a replica with the bank; None for targets that don't need one.
        chunks: held-out chunks (chunks x tokens) on which the reload is compared.
        measured_kl: the candidate's mean KL on those chunks, nats per token.
    """

    precision_map: PrecisionMap
    evaluator: "Evaluator | None" = None
    chunks: NDArray[np.int64] | None = None
    measured_kl: float | None = None


class Target(ABC):
    """Writes an export into an empty folder and checks it with the engine's own loader."""

    name: str
    needs_model: bool

    @abstractmethod
    def write(self, export: Export, folder: Path) -> None:
        """Write all files. The caller moves the folder to its place once `check` has passed."""

    @abstractmethod
    def check(self, export: Export, folder: Path) -> dict[str, Any]:
        """Load the files back and compare; what was found, for the user.

        Raises:
            ExportError: the reload differs from the measured candidate.
        """

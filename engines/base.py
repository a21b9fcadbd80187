"""The contracts of the room: an engine serves maps, an export target writes what an engine loads."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engines.power import Counter, gpu_counter, processor_counter
from quantization.checkpoints import Checkpoint
from quantization.precision_map import PrecisionMap
from quantization.schemes import FULL_PRECISION, Scheme
from quantization.units import CacheSharing, Layout, Site, Unit, UnitKind

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
    """Writes an export into an empty folder and checks it with the engine's own loader.

    Attributes:
        engine: the engine whose rules its maps must keep; None where any map can be written.
    """

    name: str
    needs_model: bool
    engine: str | None = None

    def refuse(self, export: Export) -> None:  # noqa: B027 -- some take any map
        """Refuse a map that can't be written, before anything is.

        Raises:
            ExportError: with units and reasons.
        """

    @abstractmethod
    def write(self, export: Export, folder: Path) -> None:
        """Write all files. The caller moves the folder to its place once `check` has passed."""

    @abstractmethod
    def check(self, export: Export, folder: Path) -> dict[str, Any]:
        """Load the files back and compare; what was found, for the user.

        Raises:
            ExportError: the reload differs from the measured candidate.
        """


@dataclass(frozen=True)
class Cell:
    """A matrix product whose time is measured once for a device and kernel.

    Args:
        shape: rows x columns of the weight (outputs x inputs).
        kernel: how the engine stores it, in the engine's own word.
        batch: rows of activations.
    """

    shape: tuple[int, int]
    kernel: str
    batch: int


@dataclass(frozen=True)
class Timing:
    """Seconds of one product: the median of repeats and half their interquartile range."""

    median_s: float
    spread_s: float


@dataclass(frozen=True)
class Exercise:
    """What a whole model is timed at.

    Args:
        prompt: tokens that are processed at once.
        past: tokens in the KV cache when tokens are generated.
        generated: how many are.
        threads: of the CPU.
        batch: sequences side by side, each with such a prompt and cache.
    """

    prompt: int
    past: int
    generated: int
    threads: int
    batch: int = 1

    @property
    def key(self) -> tuple[tuple[str, int], ...]:
        """What tells it apart; one sequence goes without saying, as when there was no batch."""
        every = vars(self).items()
        return tuple((name, value) for name, value in every if (name, value) != ("batch", 1))


@dataclass(frozen=True)
class Run:
    """A whole model: seconds of each repeat of a prompt and of each generated token.

    And the joules of one, as the chip counts them, where this machine lets us read that.
    """

    prefill_s: tuple[float, ...]
    decode_s: tuple[float, ...]
    prefill_j: float | None = None
    decode_j: float | None = None


class Rules(ABC):
    """What a runtime loads: the maps that it serves, and the bytes of what it keeps.

    Stateless: instances may be shared and pickled.
    """

    name: str
    fuses: bool
    """Whether the sites of a unit are one matrix to it, and must have one scheme."""
    kept: Mapping[UnitKind, str] = {}
    """Kinds of units that stay in full precision, and why."""

    cache_sharing: CacheSharing = "all"
    """What of its KV cache has one format."""
    cache_formats: Collection[str] = (FULL_PRECISION,)
    """What its KV cache can be kept in."""

    def check(self, config: Any) -> None:  # noqa: B027 -- most serve whatever transformers does
        """Refuse kinds of models that the runtime doesn't know.

        Args:
            config: the model's transformers configuration.

        Raises:
            BitfrontError: with what it knows.
        """

    def unit_refusal(self, unit: Unit, scheme: Scheme) -> str | None:
        """Why it can't serve a unit under a scheme, or None."""
        if unit.kind == "cache":
            return self.cache_refusal(scheme)
        if unit.kind in self.kept and scheme != Scheme(FULL_PRECISION):
            return self.kept[unit.kind]
        reasons = (self.refusal(site, scheme) for site in unit.stored)
        return next((why for why in reasons if why), None)

    def cache_refusal(self, scheme: Scheme) -> str | None:
        """Why it can't keep a KV cache in a format, or None."""
        if scheme.weight in self.cache_formats:
            return None
        offered = ", ".join(self.cache_formats)
        return f"{self.name} keeps no KV cache in {scheme.name}; it has {offered}"

    @abstractmethod
    def refusal(self, site: Site, scheme: Scheme) -> str | None:
        """Why it can't serve a site under a scheme, or None."""

    def variant(self, scheme: Scheme) -> Scheme:
        """A scheme that it serves of the same bits and groups, whatever the type of the scales."""
        return scheme

    def presets(self, config: Any, layout: Layout) -> Mapping[str, Mapping[str, str]]:
        """The vendor's own mixes: the weight format of each parameter that they speak of, by name.

        Args:
            config: the model's transformers configuration.
            layout: its units.
        """
        return {}

    def nbytes(self, scheme: Scheme, shape: tuple[int, ...]) -> int:
        """Bytes of the tensors that it loads."""
        from quantization.formats import FORMATS

        return FORMATS[scheme.weight].nbytes(shape)

    def site_nbytes(self, scheme: Scheme, site: Site) -> int:
        """Bytes of the tensors that it loads for a site; by default one of the site's shape."""
        return self.nbytes(scheme, site.shape)

    def other_bytes(self, layout: Layout, config: Any = None) -> int:
        """Bytes of everything outside the units; by default in bfloat16.

        Args:
            layout: the model's.
            config: its transformers configuration; without one, what only that tells isn't counted.
        """
        from quantization.formats import FORMATS

        return FORMATS[FULL_PRECISION].nbytes((layout.other_numel,)) if layout.other_numel else 0


class Engine(Rules):
    """A runtime whose kernels are timed on this machine."""

    reference_cell: Cell
    """A product that all others are timed beside."""
    accelerated: bool = False
    """Whether it runs on this machine's accelerator, and not on its processor."""
    most_batch: int = 1
    """With how many sequences side by side whole models can be timed."""
    reference: Scheme
    """What a model is stored as that others are timed in turns with."""

    def counter(self) -> tuple[Counter | None, str]:
        """What watches the energy of the chip that it runs on, and where that is, or why nothing does."""
        return gpu_counter() if self.accelerated else processor_counter()

    @abstractmethod
    def kernel(self, scheme: Scheme, shape: tuple[int, ...]) -> str:
        """What the engine stores a weight of that shape as: one kernel, one word."""

    @abstractmethod
    def kernel_version(self) -> str:
        """What times depend on beside the machine.

        Raises:
            EngineError: the engine isn't installed.
        """

    @abstractmethod
    def time_cells(
        self, cells: Sequence[Cell], threads: int, usual_s: float | None
    ) -> list[Timing]:
        """Time products with the kernels that would serve them, each beside `reference_cell`.

        Args:
            cells: what to time.
            threads: of the CPU, where it is one.
            usual_s: what the reference usually takes here, in whose terms times are told; by
                default what it takes now.

        Raises:
            KernelError: no such kernel.
            EngineError: no memory for it.
        """

    @abstractmethod
    def time_map(
        self,
        checkpoint: Checkpoint,
        layout: Layout,
        schemes: Sequence[Scheme],
        reference: Sequence[Scheme],
        exercise: Exercise,
    ) -> tuple[Run, Run]:
        """Time a whole model, and another in turns with it: the machine's drift slows both.

        Args:
            checkpoint: whose shapes they have; values don't matter.
            layout: its units.
            schemes: one for each unit.
            reference: those of the model beside it.
            exercise: what they do.

        Returns:
            The model's seconds and the reference's.

        Raises:
            EngineError: the engine refuses, or has no memory for it.
            ExportError: a kind of model that it doesn't know.
        """

"""What a worker does: a model replica, built when first needed, and the tasks it answers."""

import fcntl
import os
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import inf
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray

from cost_models.probing import local_name
from engines import Engine, load_timed
from engines.base import Cell, Exercise, Run, Timing
from evaluation.arithmetic import DTYPES, default_device
from evaluation.calibration import calibrating, passes
from evaluation.evaluator import Evaluator, Measurement
from quantization.bank import Bank
from quantization.cache import cache_dir
from quantization.checkpoints import Checkpoint, resolve
from quantization.errors import ModelError, WorkerError
from quantization.memory import return_memory
from quantization.quantizers import QUANTIZERS
from quantization.schemes import Scheme
from quantization.statistics import Imported, Statistic, Statistics
from quantization.transforms.checkpoint import Folding, folded_sites, write_folded
from quantization.units import Layout, Site
from sensitivity import ESTIMATORS, RawTable, Share
from sensitivity.interactions import Interactions, measure_interactions
from sensitivity.slopes import LocalSlopes, measure_slopes

Ids = NDArray[np.int64]
POLL_S = 0.2


@dataclass(frozen=True)
class SessionSpec:
    """What a worker needs to know; small, picklable, the same for all workers of a job.

    Args:
        choices: the schemes of each unit, by name.
        calibration: text for quantizers and formats that need statistics, chunks x tokens of ids.
        statistics: the identity of what that text tells of the model.
        dtype: name of the arithmetic type.
        threads: of the CPU, for each worker.
        cache: the driver's `$BITFRONT_CACHE`, where it has one.
        folding: how `checkpoint` is made from another, where it is.
        packed: whether the bank holds packed bytes instead of values.
    """

    checkpoint: Checkpoint
    layout: Layout
    quantizer: str
    choices: tuple[tuple[str, ...], ...]
    dtype: str
    threads: int
    cache: str | None
    calibration: Ids
    statistics: str
    folding: Folding | None = None
    imatrix: Imported | None = None
    packed: bool = False


class Session:
    """Answers tasks one at a time."""

    def __init__(self, spec: SessionSpec) -> None:
        self._spec = spec
        if spec.cache:
            os.environ.setdefault("BITFRONT_CACHE", spec.cache)  # a node may have its own
        torch.set_num_threads(spec.threads)
        self._schemes = {name: Scheme.parse(name) for row in spec.choices for name in row}
        self._choices = [[self._schemes[name] for name in row] for row in spec.choices]
        self._preparing: Generator[tuple[int, int]] | None = None

    def prepare(self, seconds: float = inf) -> tuple[int, int]:
        """Make sure that this node has the whole bank, or go on with it for some seconds.

        A folded model is made in one go. One worker of a node builds, until the bank
        is whole: others wait, so that their cores are free, and disk space that was checked is there.

        Returns:
            How much there was to do when it was begun, and is now: files that the bank lacks, and
            passes of a chunk of text for statistics; one and one as long as another worker builds.
        """
        end = time.monotonic() + seconds
        threads = torch.get_num_threads()
        torch.set_num_threads(os.cpu_count() or 1)
        try:
            self._preparing = self._preparing or self._prepared()
            for whole, passes_left in self._preparing:
                if time.monotonic() >= end:
                    if not whole:
                        return 1, 1
                    if not (left := passes_left + len(self._bank.missing(self._choices))):
                        break  # nobody would come again and let the lock go
                    return max(whole, left), left
            self.close()
        except BaseException:
            self.close()
            raise
        finally:
            torch.set_num_threads(threads)
        return_memory()
        return 1, 0

    def close(self) -> None:
        """Let others build, where this one has begun to."""
        if self._preparing:
            self._preparing.close()
        self._preparing = None

    def _prepared(self) -> Generator[tuple[int, int]]:
        """Steps towards the whole bank: what there was to do (zero: unknown yet), and passes left."""
        lock = cache_dir() / "banks" / "building.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as handle:
            while not _taken(handle):
                yield 0, 0
                time.sleep(POLL_S)
            self._fold()
            wanted = self._bank.wanted(self._choices)
            left = passes(wanted, self._spec.calibration)
            whole = left + len(self._bank.missing(self._choices))
            for _ in self._calibrating(wanted):
                left -= 1
                yield whole, left
            for _ in self._bank.building(self._choices):
                yield whole, 0

    def estimate(self, estimator: str, chunks: Ids, share: Share) -> tuple[RawTable, float]:
        """A share of a raw sensitivity table, and the seconds it took."""
        start = time.perf_counter()
        table = ESTIMATORS[estimator].score(self._evaluator.model, chunks, self._choices, share)
        return_memory()
        return table, time.perf_counter() - start

    def interactions(
        self, units: tuple[int, ...], schemes: tuple[str, ...], chunks: Ids
    ) -> Interactions:
        """Pairwise terms of some units under some schemes."""
        wanted = [self.scheme(name) for name in schemes]
        return measure_interactions(self._evaluator.model, chunks, units, wanted)

    def measure(self, schemes: tuple[str | None, ...] | None, ids: Ids) -> Measurement:
        """One candidate on one chunk; None stands for the reference, of all or of a unit."""
        wanted = (
            None
            if schemes is None
            else [None if name is None else self.scheme(name) for name in schemes]
        )
        return self._evaluator.measure(wanted, ids)

    def slopes(self, schemes: tuple[str, ...], ids: Ids) -> LocalSlopes:
        """One candidate on one chunk, with its slopes."""
        wanted = [self.scheme(name) for name in schemes]
        return measure_slopes(self._evaluator, wanted, ids, self._choices)

    def noise_floor(self, ids: Ids) -> float | None:
        """KL between float32 and the session's arithmetic type on one chunk."""
        floor = self._evaluator.noise_floor(ids)
        return_memory()
        return floor

    def time_cells(
        self,
        engine: str,
        device: str,
        cells: Sequence[Cell],
        threads: int,
        usual_s: float | None,
    ) -> list[Timing]:
        """Products with an engine's kernels on this machine, which must be that device."""
        found = load_timed(engine)
        with _alone(found, device), _pinned(found, threads):
            return found.time_cells(cells, threads, usual_s)

    def time_map(
        self,
        engine: str,
        device: str,
        schemes: tuple[str, ...],
        reference: tuple[str, ...],
        exercise: Exercise,
    ) -> tuple[Run, Run]:
        """A whole model in an engine on this machine, and a reference beside it."""
        own, beside = ([Scheme.parse(name) for name in names] for names in (schemes, reference))
        folding, layout, found = self._spec.folding, self._spec.layout, load_timed(engine)
        # what a transform makes has the original's shapes, and may not be there yet
        checkpoint = _on_this_node(folding.original if folding else self._spec.checkpoint)
        with _alone(found, device), _pinned(found, exercise.threads):
            return found.time_map(checkpoint, layout, own, beside, exercise)

    def scheme(self, name: str) -> Scheme:
        """The scheme of that name, among those of the session."""
        return self._schemes[name]

    @property
    def evaluator(self) -> Evaluator:
        """The replica; builds bank and model if need be."""
        return self._evaluator

    def _fold(self) -> None:
        """Make the folded checkpoint, from the original's statistics on the same text."""
        folding = self._spec.folding
        if folding is None or folding.ready:
            return
        original = _on_this_node(folding.original)
        statistics, layout = Statistics(folding.statistics), self._spec.layout
        sites = [
            s for s in folded_sites(layout) if not statistics.path(s, "second-moment").exists()
        ]
        for _ in calibrating(
            original,
            {"second-moment": sites} if sites else {},
            self._spec.calibration,
            statistics,
            default_device(),
            DTYPES[self._spec.dtype],
        ):
            pass
        write_folded(folding, original, layout, default_device())

    def _calibrating(self, wanted: dict[Statistic, list[Site]]) -> Iterator[None]:
        """Collect the statistics that the bank's missing entries are made with."""
        assert self._bank.statistics is not None
        return calibrating(
            self._bank.checkpoint,
            wanted,
            self._spec.calibration,
            self._bank.statistics,
            default_device(),
            self._bank.dtype,
        )

    @cached_property
    def _bank(self) -> Bank:
        spec = self._spec
        return Bank(
            self._local_checkpoint(),
            spec.layout,
            QUANTIZERS[spec.quantizer],
            DTYPES[spec.dtype],
            statistics=Statistics(spec.statistics, spec.imatrix),
            packed=spec.packed,
        )

    @cached_property
    def _evaluator(self) -> Evaluator:
        self.prepare()
        return Evaluator(self._bank, default_device())

    def _local_checkpoint(self) -> Checkpoint:
        """The checkpoint on this node; a folded one is there once `prepare` has made it."""
        folding = self._spec.folding
        return folding.checkpoint if folding else _on_this_node(self._spec.checkpoint)


def _taken(handle: IO[str]) -> bool:
    """Whether nobody else has the lock."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _alone(engine: Engine, device: str) -> Iterator[None]:
    """While one worker of this machine, which must be that device, times something.

    Raises:
        WorkerError: this is another kind of machine than the driver's.
    """
    if (here := local_name(accelerated=engine.accelerated)) != device:
        raise WorkerError(
            f"times for '{device}' were asked of a worker on '{here}'; "
            "run this command on the machine that is to serve, without --address"
        )
    lock = cache_dir() / "timing.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def _pinned(engine: Engine, threads: int) -> Iterator[None]:
    """On as many cores as the engine has threads, where it runs on cores and the system lets us."""
    if engine.accelerated or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _on_this_node(wanted: Checkpoint) -> Checkpoint:
    """The driver's folder, or the same model found anew."""
    if Path(wanted.folder).is_relative_to(cache_dir()) and Path(wanted.folder).exists():
        return wanted  # an import, named by the hash of what it was made from
    found = resolve(wanted.name, wanted.revision, wanted.trust_remote_code)
    if found.weights_hash != wanted.weights_hash:
        raise ModelError(
            f"'{wanted.name}' on this node hashes to {found.weights_hash[:12]}, on the driver "
            f"to {wanted.weights_hash[:12]}; give all nodes the same files"
        )
    return found

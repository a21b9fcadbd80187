"""How well an engine's speed on this machine is predicted, for mixes that the model never saw.

Products are timed, a dozen mixes are run to fit the model, and then others, stratified over the
whole range of sizes, are run end to end twice. Beside the model's error stand those of a constant
and of a line through the bytes, fitted on the same mixes.

    python benchmarks/latency_model.py [--model demo] [--engine torch] [--mixes 32] [--json]
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace

import numpy as np
from scipy.stats import spearmanr

from bitfront.config import DEMO, load_config
from bitfront.console import errors
from bitfront.profile_views import prepared
from bitfront.profiling import Profile, Subject, profile, time_maps
from bitfront.progress import Lines
from cost_models import weight_bytes
from cost_models.memory import PHASES, Phase
from search.problem import Choice
from store.database import Store
from workers.pool import InProcessPool

MENUS = {
    "llama.cpp": (
        "gguf-q2_K", "gguf-q3_K", "gguf-q4_0", "gguf-iq4_nl", "gguf-mxfp4", "gguf-q4_K",
        "gguf-q5_0", "gguf-q5_1", "gguf-q5_K", "gguf-q6_K", "gguf-q8_0", "bf16",
    ),
    "torch": ("int3-g64", "int4-g64", "int8-channel", "fp8-e4m3", "bf16"),
}  # fmt: skip
SEED, WIDTH = 20261125, 0.3


class Mixes:
    """Maps of given sizes: each tensor's scheme is drawn around one place in its order of bytes."""

    def __init__(self, subject: Subject) -> None:
        self.bytes_table = weight_bytes.table(subject.layout, subject.menu, subject.engine)
        self._generator = np.random.default_rng(SEED)
        self._order = np.argsort(self.bytes_table, axis=1, kind="stable")

    def nbytes(self, choice: Choice) -> int:
        """Of a map's units."""
        return int(self.bytes_table[np.arange(len(choice)), choice].sum())

    def stratified(self, count: int) -> list[Choice]:
        """As many, their sizes evenly between the smallest and the largest."""
        sizes = np.linspace(self.bytes_table.min(1).sum(), self.bytes_table.max(1).sum(), count + 2)
        return [self._of(float(size)) for size in sizes[1:-1]]

    def _of(self, size: float) -> Choice:
        drawn = self._generator.normal(0, WIDTH, len(self._order))
        low, high = -1.0, 2.0
        for _ in range(40):  # the size rises with the place
            middle = (low + high) / 2
            choice = self._at(middle + drawn)
            low, high = (middle, high) if self.nbytes(choice) < size else (low, middle)
        return choice

    def _at(self, places: np.ndarray) -> Choice:
        last = self._order.shape[1] - 1
        ranks = np.round(np.clip(places, 0, 1) * last).astype(int)
        return self._order[np.arange(len(ranks)), ranks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEMO)
    parser.add_argument("--engine", choices=MENUS, default="llama.cpp")
    parser.add_argument("--mixes", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--store", help="SQLAlchemy URL; what it has is not timed again")
    parser.add_argument("--json", action="store_true", help="print one object on stdout")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(arguments.store or f"sqlite:///{folder}/times.sqlite").open()
        found = run(arguments, store)
    if arguments.json:
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        for name, value in found.items():
            print(f"{name:20} {value if isinstance(value, (str, int)) else f'{value:.4f}'}")


def run(arguments: argparse.Namespace, store: Store) -> dict[str, object]:
    overrides = {
        "menu": {"schemes": list(MENUS[arguments.engine])}, "serving.engine": arguments.engine,
        "serving.prompt": arguments.prompt, "serving.context": arguments.context,
        "serving.threads": arguments.threads,
    }  # fmt: skip
    subject, spec = prepared(load_config(arguments.model, None, overrides))
    mixes = Mixes(subject)
    tested = mixes.stratified(arguments.mixes)
    seen = {subject.map_of(subject.schemes(anchor)) for anchor in subject.anchors}
    assert seen.isdisjoint(subject.map_of(subject.schemes(choice)) for choice in tested)
    with Lines(errors) as progress, InProcessPool(spec) as pool:
        known = profile(subject, store, pool, progress)
        first = time_maps(subject, store, pool, progress, tested)
        kernels = f"again: {subject.place.kernels}"  # the store would answer for the second run
        again = replace(subject, place=replace(subject.place, kernels=kernels))
        second = time_maps(again, store, pool, progress, tested)
    return {
        "engine": subject.engine.name,
        "device": subject.place.device,
        "mixes": len(tested),
        **_judged(known, mixes, tested, first, second),
    }


def _judged(known: Profile, mixes: Mixes, tested: list[Choice], first: list, second: list) -> dict:
    found: dict[str, float] = {}
    noise = []
    for phase in PHASES:
        one = np.array([known.measured_s(row, phase) for row in first])
        two = np.array([known.measured_s(row, phase) for row in second])
        took = (one + two) / 2
        predicted = np.array([known.predict(choice, phase)[0] for choice in tested])
        floor = float(np.abs(one / two - 1).mean())
        noise.append(floor)
        found[f"{phase}_mape"] = _mape(predicted, took)
        found[f"{phase}_spearman"] = float(spearmanr(predicted, took)[0])
        found[f"{phase}_noise_floor"] = floor
        found |= _controls(known, mixes, tested, took, phase)
    order = ("decode_mape", "prefill_mape", "decode_spearman")
    pinned = {name: found.pop(name) for name in order}
    pinned["noise_floor"] = found.pop("decode_noise_floor")
    pinned["bytes_only_mape"] = found.pop("decode_bytes_only_mape")
    sizes = [mixes.nbytes(choice) for choice in tested]
    return {**pinned, **found, "smallest_bytes": min(sizes), "largest_bytes": max(sizes)}


def _controls(
    known: Profile, mixes: Mixes, tested: list[Choice], took: np.ndarray, phase: Phase
) -> dict[str, float]:
    """Errors of a constant and of a line through the bytes, on the mixes that the model is fitted on."""
    seconds = np.array([known.measured_s(row, phase) for _, row in known.maps])
    sizes = np.array([mixes.nbytes(choice) for choice, _ in known.maps])
    line = np.polyfit(sizes, seconds, 1)
    by_bytes = np.polyval(line, [mixes.nbytes(choice) for choice in tested])
    return {
        f"{phase}_bytes_only_mape": _mape(by_bytes, took),
        f"{phase}_constant_mape": _mape(np.full(len(took), np.median(seconds)), took),
    }


def _mape(predicted: np.ndarray, took: np.ndarray) -> float:
    return float(np.abs(predicted / took - 1).mean())


if __name__ == "__main__":
    main()

"""The bank: a model's units quantized once under every scheme, mapped from disk, never copied.

One safetensors file a unit and scheme holds the dequantized tensors in the arithmetic type of the
measurements, or the packed bytes that are multiplied as they are (`packed`: slower without a
kernel, but only as large as the menu's formats); one more holds what isn't in any unit. Files are named by what they contain (weights,
quantizer, type, scheme, unit), written beside their place and renamed, so a bank may be shared by
all workers of a node, grows by what a new menu adds, and survives a kill at any moment. Reading
maps the file: processes share its pages, and switching a model to another scheme only moves
pointers.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from quantization.bank_files import codes_path, is_joint, read_entry
from quantization.cache import cache_dir, write_whole
from quantization.checkpoints import Checkpoint
from quantization.errors import BankError, QuantizationError
from quantization.formats import FORMATS, Packed, Rotated, ScalarFormat
from quantization.kernels.packed_weight import PackedWeight
from quantization.quantizers import QUANTIZERS, Quantized, Quantizer, needs, rendering
from quantization.schemes import FULL_PRECISION, Scheme
from quantization.statistics import NOTHING_KNOWN, SiteStatistics, Statistic, Statistics
from quantization.units import Layout, Site, Unit
from quantization.weights import open_weights

Choices = Sequence[Sequence[Scheme]]
"""The schemes that each unit may get, in the layout's order."""

Tensors = dict[str, Tensor]
"""Parameters by their name in the state dict."""

REFERENCE, REST = "reference", "rest"
TOGETHER_BYTES = 2**27


class Bank:
    """The bank of one model, quantizer and arithmetic type.

    With `packed`, units inside the decoder blocks are kept as packed bytes; embedding and head, whose
    values are looked at directly, never are.

    Instances are cheap; a process may hold several. Tensors that it returns are read-only by
    agreement: they are views of shared pages.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: Layout,
        quantizer: Quantizer,
        dtype: torch.dtype,
        root: Path | None = None,
        statistics: Statistics | None = None,
        packed: bool = False,
    ) -> None:
        self.checkpoint, self.layout = checkpoint, layout
        self.quantizer, self.dtype = quantizer, dtype
        self.statistics, self.packed = statistics, packed
        identity = f"{checkpoint.weights_hash}|{rendering(quantizer)}|{dtype}"
        name = hashlib.sha256(identity.encode()).hexdigest()[:32]
        self.folder = (root or cache_dir() / "banks") / name
        self._maps: dict[Path, Tensors] = {}

    def missing(self, choices: Choices) -> list[Path]:
        """The files that `build` would write."""
        files = [self._path(unit, scheme) for unit, scheme in self._entries(choices)]
        return [file for file in dict.fromkeys([*files, self._rest_path()]) if not file.exists()]

    def wanted(self, choices: Choices) -> dict[Statistic, list[Site]]:
        """The statistics that `build` would read and that aren't there yet."""
        found: dict[Statistic, dict[Site, None]] = {}
        if self.statistics is None:
            return {}
        for unit, scheme in self._entries(choices):
            if unit.kind != "embedding" and not self._path(unit, scheme).exists():
                for kind in sorted(self._needs(scheme)):
                    found.setdefault(kind, {}).update(dict.fromkeys(unit.stored))
        missing = {
            kind: [site for site in sites if not self.statistics.path(site, kind).exists()]
            for kind, sites in found.items()
        }
        return {kind: sites for kind, sites in missing.items() if sites}

    def build(self, choices: Choices) -> None:
        """Write the files that are missing: `building` to its end."""
        for _ in self.building(choices):
            pass

    def building(self, choices: Choices) -> Iterator[None]:
        """Write the files that are missing, reading the weights of few layers at a time.

        Statistics that were never written are done without. Yields after each scheme of some units.

        Args:
            choices: the schemes of each unit, in the layout's order; the reference comes along.

        Raises:
            BankError: the disk is full or the folder can't be written.
            QuantizationError: a tensor that a format can't hold, with its unit's name.
        """
        if not self.missing(choices):
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check_space(choices)
            weights = open_weights(self.checkpoint)
            for units, schemes in _alike(self.layout, choices):
                yield from self._build_units(units, schemes, weights)
            if not self._rest_path().exists():
                placed = {site.parameter for unit in self.layout.units for site in unit.stored}
                rest = [name for name in weights if name not in placed]
                self._write(self._rest_path(), {n: _as(weights[n], self.dtype) for n in rest})
        except (OSError, SafetensorError) as error:
            raise BankError(
                f"can't write the bank to '{self.folder}' ({error}); what is complete stays: "
                "free some space or set BITFRONT_CACHE, then run the same command again"
            ) from error

    def tensors(self, unit: Unit, scheme: Scheme) -> Tensors:
        """The unit's parameters as `scheme` stores them, without copying; stays mapped."""
        return self._read(self._path(unit, scheme)) if unit.stored else {}

    def borrow(self, unit: Unit, scheme: Scheme, parameter: str) -> Tensor:
        """One of them for one look: unmapped with its last tensor, and never packed.

        A pass over all schemes would otherwise hold the whole bank in memory.
        """
        path = self._path(unit, scheme)
        tensors = self._maps[path] if path in self._maps else read_entry(path, self.dtype)
        tensor = tensors[parameter]
        return tensor.dequantize() if isinstance(tensor, PackedWeight) else tensor

    def packed_parameters(self, unit: Unit, scheme: Scheme, parameter: str) -> Packed:
        """The bytes of a parameter, which stand for the values that `tensors` gives.

        A bank of values has no bytes: they are made again, from the same weights and statistics, and
        compared with the values. Sums in another order (another number of threads) tip some values
        over where errors feed back; the grid stays, and what was measured is encoded on it.

        Raises:
            BankError: they differ, since weights or statistics have changed.
        """
        values = self.tensors(unit, scheme)[parameter]
        if isinstance(values, PackedWeight):
            return values.packed
        site = next(site for site in unit.stored if site.parameter == parameter)
        for made in self._made_again(unit, site, scheme, values):
            if torch.equal(self._values(made, site.transposed), values):
                return made.pack()
        raise BankError(
            f"{parameter} in {scheme.name} is quantized otherwise than it was measured; "
            "the model or the calibration has changed: search again"
        )

    def reference(self, unit: Unit) -> Tensors:
        """The unit's unquantized parameters."""
        return self._read(self._path(unit, REFERENCE)) if unit.stored else {}

    def forget(self, unit: Unit) -> list[Tensor]:
        """Unmap what was read of a unit, once nobody else holds it; returns what that was."""
        mark = _short(_members(unit)) + "-"
        maps = [path for path in self._maps if path.name.startswith(mark)]
        return [tensor for path in maps for tensor in self._maps.pop(path).values()]

    def rest(self) -> Tensors:
        """All parameters and persistent buffers outside units."""
        return self._read(self._rest_path())

    @cached_property
    def _weights(self) -> Mapping[str, Tensor]:
        return open_weights(self.checkpoint)

    def _build_units(
        self, units: Sequence[Unit], schemes: Sequence[Scheme], weights: Mapping[str, Tensor]
    ) -> Iterator[None]:
        """The missing entries of units that have the same shapes, a scheme at a time."""
        wanted: list[Scheme | str] = [REFERENCE, *schemes]
        if all(self._path(unit, scheme).exists() for unit in units for scheme in wanted):
            return
        parameters = {s.parameter: weights[s.parameter] for unit in units for s in unit.stored}
        known: dict[tuple[str, frozenset[Statistic]], SiteStatistics] = {}
        for scheme in wanted:
            missing = [unit for unit in units if not self._path(unit, scheme).exists()]
            if not missing:
                continue
            columns = zip(*(unit.stored for unit in missing), strict=True)
            quantized = [self._quantized(parameters, sites, scheme, known) for sites in columns]
            for unit, row in zip(missing, zip(*quantized, strict=True), strict=True):
                self._write_entry(unit, scheme, row)
            yield

    def _made_again(
        self, unit: Unit, site: Site, scheme: Scheme, values: Tensor
    ) -> Iterator[Quantized]:
        """What a parameter's values could be codes of, the cheapest to make first."""
        if scheme.weight == FULL_PRECISION:
            weight = self.reference(unit)[site.parameter].float()
            weight = weight.mT if site.transposed else weight
            yield QUANTIZERS["rtn"].quantize(weight, FORMATS[FULL_PRECISION], NOTHING_KNOWN)
            return
        codes = codes_path(self._path(unit, scheme))
        if codes.exists():
            kept = read_entry(codes, self.dtype)[site.parameter]
            assert isinstance(kept, PackedWeight)
            own_format = FORMATS[kept.packed.format]
            yield Quantized(own_format, *own_format.unpack(kept.packed))
        weights = {site.parameter: self._weights[site.parameter]}
        rows = (values.mT if site.transposed else values).float().contiguous()
        known: dict[tuple[str, frozenset[Statistic]], SiteStatistics] = {}
        format = FORMATS[scheme.weight]
        (weight,), (own,) = self._weights_and_statistics(weights, [site], scheme, known)
        grid = self.quantizer.grid(weight, format, own)
        if grid is not None and isinstance(format, (ScalarFormat, Rotated)):
            yield Quantized(format, format.encode(rows, grid), grid)
        (found,) = self._quantized(weights, [site], scheme, known)
        assert isinstance(found, Quantized)
        yield found
        if isinstance(format, (ScalarFormat, Rotated)):
            yield replace(found, codes=format.encode(rows, found.grid))

    def _quantized(
        self,
        parameters: Tensors,
        sites: Sequence[Site],
        scheme: Scheme | str,
        known: dict[tuple[str, frozenset[Statistic]], SiteStatistics],
    ) -> Sequence[Tensor | Quantized]:
        """Sites of one shape under a scheme, rows x columns; the reference as it is."""
        if isinstance(scheme, str) or scheme.weight == self._exact_format():
            return [parameters[site.parameter] for site in sites]
        weights, statistics = self._weights_and_statistics(parameters, sites, scheme, known)
        try:
            return self.quantizer.quantize_alike(weights, FORMATS[scheme.weight], statistics)
        except QuantizationError as error:
            names = ", ".join(site.name for site in sites)
            raise QuantizationError(f"{names} in {scheme.name}: {error}") from error

    def _weights_and_statistics(
        self,
        parameters: Tensors,
        sites: Sequence[Site],
        scheme: Scheme,
        known: dict[tuple[str, frozenset[Statistic]], SiteStatistics],
    ) -> tuple[list[Tensor], list[SiteStatistics]]:
        """What a quantizer gets; `known` keeps what was read."""
        kinds = self._needs(scheme)
        for site in sites:
            if (site.parameter, kinds) not in known:
                own = self.statistics.of(site, kinds) if self.statistics else NOTHING_KNOWN
                known[site.parameter, kinds] = own
        weights = [
            parameters[s.parameter].mT if s.transposed else parameters[s.parameter] for s in sites
        ]
        return weights, [known[site.parameter, kinds] for site in sites]

    def _write_entry(
        self, unit: Unit, scheme: Scheme | str, quantized: Sequence[Tensor | Quantized]
    ) -> None:
        path = self._path(unit, scheme)
        named = {s.parameter: q for s, q in zip(unit.stored, quantized, strict=True)}
        transposed = {site.parameter: site.transposed for site in unit.stored}
        if self._is_packed(unit, scheme):
            self._write_packed(path, named, transposed)
        else:
            if any(isinstance(q, Quantized) and is_joint(q.format) for q in quantized):
                self._write_packed(codes_path(path), named, transposed)
            values = {name: self._values(q, transposed[name]) for name, q in named.items()}
            self._write(path, values)

    def _values(self, quantized: Tensor | Quantized, transposed: bool) -> Tensor:
        """What the model multiplies by, in the arithmetic type."""
        if isinstance(quantized, Tensor):
            return _as(quantized, self.dtype)
        values = quantized.dequantize()
        return _as(values.mT if transposed else values, self.dtype)

    def _is_packed(self, unit: Unit, scheme: Scheme | str) -> bool:
        exact = isinstance(scheme, str) or scheme.weight == self._exact_format()
        return self.packed and unit.layer is not None and not exact

    def _needs(self, scheme: Scheme | str) -> frozenset[Statistic]:
        """The statistics that an entry is made with; full precision is only rounded."""
        if isinstance(scheme, str) or scheme.weight == FULL_PRECISION:
            return frozenset()
        return needs(self.quantizer, FORMATS[scheme.weight])

    def _exact_format(self) -> str | None:
        """The format that the arithmetic type itself is, so that its file is the reference."""
        return FULL_PRECISION if self.dtype == torch.bfloat16 else None

    def _path(self, unit: Unit, scheme: Scheme | str) -> Path:
        name = scheme if isinstance(scheme, str) else scheme.weight
        if name == self._exact_format():
            name = REFERENCE
        known = f"@{self.statistics.short}" if self.statistics and self._needs(scheme) else ""
        form = "-packed" if self._is_packed(unit, scheme) else ""
        return (
            self.folder
            / f"{_short(_members(unit))}-{name.replace('/', '_')}{known}{form}.safetensors"
        )

    def _rest_path(self) -> Path:
        units = "|".join(site.parameter for unit in self.layout.weights for site in unit.sites)
        return self.folder / f"{REST}-{_short(units)}.safetensors"

    def _entries(self, choices: Choices) -> list[tuple[Unit, Scheme | str]]:
        entries: list[tuple[Unit, Scheme | str]] = []
        for unit, schemes in zip(self.layout.units, choices, strict=True):
            if unit.stored:
                entries += [(unit, REFERENCE), *((unit, scheme) for scheme in schemes)]
        return entries

    def _check_space(self, choices: Choices) -> None:
        """Refuse before the first byte what the disk can't hold."""
        missing = set(self.missing(choices))
        files = {
            self._path(unit, scheme): self._entry_bytes(unit, scheme)
            for unit, scheme in self._entries(choices)
        }
        needed = sum(nbytes for path, nbytes in files.items() if path in missing)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(f"it needs {needed / 2**20:.0f} MiB and {free / 2**20:.0f} MiB are free")

    def _entry_bytes(self, unit: Unit, scheme: Scheme | str) -> int:
        values = unit.numel * self.dtype.itemsize
        if isinstance(scheme, str) or not (
            self._is_packed(unit, scheme) or is_joint(FORMATS[scheme.weight])
        ):
            return values
        codes = sum(FORMATS[scheme.weight].nbytes(site.shape) for site in unit.stored)
        return codes if self._is_packed(unit, scheme) else values + codes

    def _write_packed(
        self, path: Path, quantized: Mapping[str, Tensor | Quantized], transposed: dict[str, bool]
    ) -> None:
        tensors: Tensors = {}
        described = {}
        for parameter, entry in quantized.items():
            assert isinstance(entry, Quantized)
            packed = entry.pack()
            tensors |= {f"{parameter}|{n}": t.contiguous() for n, t in packed.tensors.items()}
            described[parameter] = [packed.format, packed.shape, transposed[parameter]]
        metadata = {"packed": json.dumps(described)}
        write_whole(path, partial(save_file, tensors, metadata=metadata))

    def _write(self, path: Path, tensors: Tensors) -> None:
        write_whole(path, partial(save_file, tensors))

    def _read(self, path: Path) -> Tensors:
        if path not in self._maps:
            self._maps[path] = read_entry(path, self.dtype)
        return self._maps[path]


def _alike(layout: Layout, choices: Choices) -> Iterator[tuple[list[Unit], Sequence[Scheme]]]:
    """Units of equal shapes and schemes, as many together as are small beside a model.

    What is small counts weights and second moments, which are as wide as the weights.
    """
    alike: dict[tuple[object, ...], list[Unit]] = {}
    schemes_of = dict(zip((unit.name for unit in layout.units), choices, strict=True))
    for unit in layout.weights:
        shapes = tuple((site.shape, site.transposed) for site in unit.stored)
        alike.setdefault((shapes, *schemes_of[unit.name]), []).append(unit)
    for units in alike.values():
        nbytes = 4 * sum(s.numel + s.numel // s.shape[-2] * s.shape[-1] for s in units[0].stored)
        together = max(1, TOGETHER_BYTES // nbytes)
        for start in range(0, len(units), together):
            yield units[start : start + together], schemes_of[units[0].name]


def _members(unit: Unit) -> str:
    return "|".join(site.parameter for site in unit.sites)


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype if tensor.is_floating_point() else tensor.dtype).contiguous()


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]

"""What calibration knows of a site: statistics of its inputs and of the loss's gradients."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from hashlib import sha256
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantization.cache import cache_dir, write_whole
from quantization.units import Site

Statistic = Literal["second-moment", "fisher", "curvature"]

OUTPUTS = 1024
"""Most rows whose gradients' products are kept together: all squared would be more than the weights."""


def output_blocks(rows: int) -> tuple[int, int]:
    """How many blocks of neighbouring rows keep their products, and of how many rows each."""
    blocks = -(-rows // OUTPUTS)
    return blocks, -(-rows // blocks)


@dataclass(frozen=True)
class SiteStatistics:
    """A site's statistics; what is None isn't known.

    Args:
        second_moment: E[x^T x] of the inputs, `... x columns x columns`, one an expert.
        importance: E[x^2] of the inputs, `... x columns`: its diagonal, or an imported imatrix.
        fisher: E[g^2] of the loss's gradient by each weight, `... x rows x columns`.
        input_curvature: E[|g|^2 x^T x], `... x columns x columns`, g the loss's gradient by the outputs.
        output_curvature: E[g^T g] between neighbouring rows, in blocks (`output_blocks`),
            `... x blocks x block x block`.
        remembered: what quantizers derived from them, by their identity.
    """

    second_moment: Tensor | None = None
    importance: Tensor | None = None
    fisher: Tensor | None = None
    input_curvature: Tensor | None = None
    output_curvature: Tensor | None = None
    remembered: dict[str, Any] = field(init=False, default_factory=dict, compare=False, repr=False)

    def each(self, count: int) -> list["SiteStatistics"]:
        """Those of each expert."""
        return [self._with(itemgetter(i)) for i in range(count)]

    def to(self, device: torch.device) -> "SiteStatistics":
        """The same on a device."""
        return self._with(lambda tensor: tensor.to(device))

    def _with(self, change: Callable[[Tensor], Tensor]) -> "SiteStatistics":
        known = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        return SiteStatistics(**{n: None if t is None else change(t) for n, t in known.items()})


NOTHING_KNOWN = SiteStatistics()


@dataclass(frozen=True)
class Imported:
    """An importance matrix from elsewhere: by parameter, and a hash of it all."""

    importance: Mapping[str, Tensor]
    identity: str

    @classmethod
    def of(cls, importance: Mapping[str, Tensor]) -> "Imported":
        """With the hash of what it says."""
        digest = sha256()
        for name, values in sorted(importance.items()):
            digest.update(name.encode() + values.contiguous().numpy().tobytes())
        return cls(importance, digest.hexdigest())


@dataclass(frozen=True)
class Statistics:
    """The statistics of one model on one calibration text: a folder, a file a site and kind.

    Args:
        identity: names model, text and arithmetic; enters the keys of what is made with them.
        imported: importance that replaces the calibrated one.
    """

    identity: str
    imported: Imported | None = None

    @property
    def folder(self) -> Path:
        """Where they lie."""
        return cache_dir() / "statistics" / _short(self.identity)

    @property
    def short(self) -> str:
        """The identity as a part of a file name."""
        imported = self.imported.identity if self.imported else ""
        return _short(self.identity + imported)[:8]

    def of(self, site: Site, kinds: Iterable[Statistic]) -> SiteStatistics:
        """The statistics of these kinds; those that calibration couldn't see stay None."""
        found: dict[str, Tensor] = {}
        for kind in kinds:
            path = self.path(site, kind)
            if path.exists():
                with safe_open(path, framework="pt") as file:
                    found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        statistics = SiteStatistics(**found)
        if self.imported and site.parameter in self.imported.importance:
            own = self.imported.importance[site.parameter]
            statistics = replace(statistics, importance=own)
        return statistics

    def path(self, site: Site, kind: Statistic) -> Path:
        """The file of a site and kind."""
        return self.folder / f"{_short(site.parameter)}-{kind}.safetensors"

    def save(self, site: Site, kind: Statistic, tensors: dict[str, Tensor]) -> None:
        """Write a site's file, whole or not at all."""
        write_whole(self.path(site, kind), partial(save_file, tensors))

    def share(self, site: Site, other: Site, kind: Statistic) -> None:
        """Give `site` the file of `other`, stored once."""
        path = self.path(site, kind)
        path.unlink(missing_ok=True)
        path.hardlink_to(self.path(other, kind))


def _short(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:32]

"""What calibration knows of a site: statistics of its inputs and of the loss's gradients."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Literal

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantization.cache import cache_dir, write_whole
from quantization.units import Site

Statistic = Literal["second-moment", "fisher"]


@dataclass(frozen=True)
class SiteStatistics:
    """A site's statistics; what is None isn't known.

    Args:
        second_moment: E[x^T x] of the inputs, `... x columns x columns`, one an expert.
        importance: E[x^2] of the inputs, `... x columns`: its diagonal, or an imported imatrix.
        fisher: E[g^2] of the loss's gradient by each weight, `... x rows x columns`.
    """

    second_moment: Tensor | None = None
    importance: Tensor | None = None
    fisher: Tensor | None = None


NOTHING_KNOWN = SiteStatistics()


@dataclass(frozen=True)
class Statistics:
    """The statistics of one model on one calibration text: a folder, a file a site and kind.

    Args:
        identity: names model, text and arithmetic; enters the keys of what is made with them.
        imported: importance by parameter, which replaces the calibrated one.
    """

    identity: str
    imported: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where they lie."""
        return cache_dir() / "statistics" / _short(self.identity)

    @property
    def short(self) -> str:
        """The identity as a part of a file name."""
        return _short(self.identity)[:8]

    def of(self, site: Site, kinds: Iterable[Statistic]) -> SiteStatistics:
        """The statistics of these kinds; those that calibration couldn't see stay None."""
        found: dict[str, Tensor] = {}
        for kind in kinds:
            path = self.path(site, kind)
            if path.exists():
                with safe_open(path, framework="pt") as file:
                    found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        statistics = SiteStatistics(**found)
        if site.parameter in self.imported:
            statistics = replace(statistics, importance=self.imported[site.parameter])
        return statistics

    def path(self, site: Site, kind: Statistic) -> Path:
        """The file of a site and kind."""
        return self.folder / f"{_short(site.parameter)}-{kind}.safetensors"

    def save(self, site: Site, kind: Statistic, tensors: dict[str, Tensor]) -> None:
        """Write a site's file, whole or not at all."""
        write_whole(self.path(site, kind), partial(save_file, tensors))


def _short(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:32]

"""What other people's runtimes load, as data: `configs/engines/*.yaml`, checked.

The search, the cost models and the exporters all ask the same rules. A runtime that no file of
this room times is nothing but its YAML and the bytes of what is written for it.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engines.base import Rules
from quantization.errors import BitfrontError
from quantization.schemes import FULL_PRECISION, Scheme
from quantization.units import CacheSharing, Site, UnitKind

BF16_SCALES = "-bf16"
"""How names of formats end whose scales are in bfloat16 instead of float16."""
Divisor = Annotated[int, Field(ge=1)]


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Served(_Closed):
    """Formats that a runtime has kernels for.

    Args:
        formats: a pattern of weight formats, or `weights/activations`.
        rows: what the outputs of a matrix must divide by.
        columns: what the inputs must divide by.
        remark: which kernel, or what it costs.
    """

    formats: str
    rows: Divisor = 1
    columns: Divisor = 1
    remark: str | None = None

    def matches(self, scheme: Scheme) -> bool:
        """Whether it speaks of the scheme."""
        weights, _, activations = self.formats.partition("/")
        return fnmatchcase(scheme.weight, weights) and fnmatchcase(
            scheme.activation, activations or FULL_PRECISION
        )

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """Why a matrix of that shape has no such kernel, or None."""
        rows, columns = shape[-2:]
        for count, divisor, what in ((rows, self.rows, "rows"), (columns, self.columns, "columns")):
            if count % divisor:
                return f"{count} {what} don't divide by {divisor}"
        return None


class Runtime(_Closed):
    """A runtime's rules.

    Args:
        version: of which the rules were read.
        fuses: whether the sites of a unit are one matrix to it.
        formats: what it serves beside full precision; of several that match, any will do.
        kept: kinds of units that stay in full precision, and why.
        experts: what it serves of packed experts.
        cache: formats that its KV cache can be kept in.
        cache_sharing: what of it has one format.
        sources: where the rules come from.
    """

    name: str
    title: str
    version: str
    fuses: bool
    formats: tuple[Served, ...]
    kept: dict[UnitKind, str] = {}
    experts: tuple[Served, ...] = ()
    cache: tuple[str, ...] = (FULL_PRECISION,)
    cache_sharing: CacheSharing = "all"
    sources: Annotated[tuple[str, ...], Field(min_length=1)]


@cache
def load_runtime(name: str) -> Runtime:
    """The rules of `configs/engines/NAME.yaml`.

    Raises:
        BitfrontError: the file is not there, or wrong.
    """
    file = files("configs").joinpath("engines", f"{name}.yaml")
    try:
        return Runtime.model_validate(yaml.safe_load(file.read_text()))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise BitfrontError(f"configs/engines/{name}.yaml can't be used: {error}") from error


def _matrices(site: Site) -> tuple[int, tuple[int, int]]:
    """How many matrices of which shape files hold for a site: of experts, gates and ups apart."""
    *experts, rows, columns = site.shape
    if not experts:
        return 1, (rows, columns)
    halves = 2 if site.parameter.endswith("gate_up_proj") else 1
    return halves * experts[0], (rows // halves, columns)


class Declared(Rules):
    """The rules of a runtime that is declared in a file of its name."""

    def __init__(self, name: str) -> None:
        self.runtime = load_runtime(name)
        self.name = name

    @property
    def fuses(self) -> bool:  # type: ignore[override]
        """See `Rules.fuses`."""
        return self.runtime.fuses

    @property
    def kept(self) -> Mapping[UnitKind, str]:  # type: ignore[override]
        """See `Rules.kept`."""
        return self.runtime.kept

    @property
    def cache_formats(self) -> tuple[str, ...]:  # type: ignore[override]
        """See `Rules.cache_formats`."""
        return self.runtime.cache

    @property
    def cache_sharing(self) -> CacheSharing:  # type: ignore[override]
        """See `Rules.cache_sharing`."""
        return self.runtime.cache_sharing

    def variant(self, scheme: Scheme) -> Scheme:
        """See `Rules.variant`."""
        from quantization.formats import FORMATS

        plain = scheme.weight.removesuffix(BF16_SCALES)
        named = (scheme.weight, plain, plain + BF16_SCALES)
        for weight in (name for name in named if name in FORMATS):
            found = Scheme(weight, scheme.activation)
            if any(served.matches(found) for served in self.runtime.formats):
                return found
        return scheme

    def site_nbytes(self, scheme: Scheme, site: Site) -> int:
        """See `Rules.site_nbytes`: files hold experts one by one, their gates apart from their ups."""
        count, shape = _matrices(site)
        return count * self.nbytes(scheme, shape)

    def refusal(self, site: Site, scheme: Scheme) -> str | None:
        """See `Rules.refusal`."""
        from quantization.formats import FORMATS

        if scheme == Scheme(FULL_PRECISION):
            return None
        _, shape = _matrices(site)
        packed = len(site.shape) > len(shape)
        offered = self.runtime.experts if packed else self.runtime.formats
        if site.transposed or not offered:
            return "packed experts and transposed weights aren't written for it yet"
        known = [served for served in offered if served.matches(scheme)]
        if not known:
            near = self.variant(scheme)
            named = (
                ", ".join(served.formats for served in offered)
                if near == scheme
                else f"{near.name}, which differs in the type of its scales"
            )
            what = " of experts" if packed else ""
            return f"{self.runtime.title} has no kernel for {scheme.name}{what}; it has {named}"
        reasons = [served.refusal(shape) for served in known]
        if None not in reasons:
            return f"{scheme.name}: {reasons[0]}, as {self.runtime.title}'s kernel needs"
        return FORMATS[scheme.weight].refusal(shape)

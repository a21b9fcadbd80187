"""Schemes: what is chosen for a unit, and the menus that a search chooses from."""

from dataclasses import dataclass

FULL_PRECISION = "bf16"


@dataclass(frozen=True, order=True)
class Scheme:
    """A weight format with an activation format, both by name."""

    weight: str
    activation: str = FULL_PRECISION

    @property
    def name(self) -> str:
        """`int4-g32`, or `int8-channel/int8-token` when activations are quantized too."""
        if self.activation == FULL_PRECISION:
            return self.weight
        return f"{self.weight}/{self.activation}"

    @classmethod
    def stored(cls, name: str) -> "Scheme":
        """Undo `name` where it was ours: nothing is looked up, and nothing imported."""
        weight, _, activation = name.partition("/")
        return cls(weight, activation or FULL_PRECISION)

    @classmethod
    def parse(cls, name: str) -> "Scheme":
        """Undo `name`; raises `UnknownNameError` for formats that don't exist."""
        from quantization.activations import ACTIVATIONS  # torch: only once a format is needed
        from quantization.formats import FORMATS

        weight, _, activation = name.partition("/")
        FORMATS[weight]
        if activation in ("", FULL_PRECISION):
            return cls(weight)
        ACTIVATIONS[activation]
        return cls(weight, activation)

    @property
    def exact(self) -> bool:
        """Whether nothing is quantized."""
        return self == Scheme(FULL_PRECISION)

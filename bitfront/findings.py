"""Sentences of a front about how its maps were found: sums that don't add up, experts seldom seen."""

from collections.abc import Sequence
from math import exp
from typing import Any


def additive(interactions: dict[str, Any] | None) -> list[str]:
    """Whether pairs were measured, and how far sums were off."""
    if not interactions or interactions["residual"] is None:
        return []
    off = f"Predictions by sums are off by {exp(interactions['residual']) - 1:.0%}"
    if "units" not in interactions:
        return [f"{off}: no pairs of units were measured."]
    excess = ", ".join(
        f"{scheme} {share:+.0%}"
        for scheme, share in zip(interactions["schemes"], interactions["excess"], strict=True)
    )
    told = (
        f"{off}, so the pairs of {len(interactions['units'])} units were measured: what two cost "
        f"beyond their sum is {excess}; {interactions['maps']} maps came of it."
    )
    return [told]


def few_tokens(experts: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for each unit some of whose experts saw little of the calibration text."""
    return [
        f"{entry['unit']}: {entry['few']} of {len(entry['tokens'])} experts saw few tokens "
        f"(least {min(entry['tokens']):.0f}); their estimates lean on their siblings'."
        for entry in experts
        if entry["few"]
    ]

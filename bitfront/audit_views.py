"""An audit for people and programs: table, remarks, JSON and the calibration plot.

From what the store keeps alone; no torch.
"""

from typing import Any

import plotly.graph_objects as go
from rich.table import Table

from bitfront.config import UNPROVEN
from bitfront.findings import few_tokens

KEYS = ("name", "spearman", "kendall", "spearman_equal_bits", "seconds")
"""Of each estimator in the pinned document."""


def audit_json(audit: dict[str, Any]) -> dict[str, Any]:
    """The pinned document of `bitfront audit --json`, and all that is known under `details`."""
    return {
        "estimators": [{key: entry[key] for key in KEYS} for entry in ranked(audit)],
        "default": audit["default"],
        "details": audit,
    }


def ranked(audit: dict[str, Any]) -> list[dict[str, Any]]:
    """The estimators, best first: at equal size where that was asked, else at all sizes."""

    def merit(entry: dict[str, Any]) -> float:
        equal, all_sizes = entry["spearman_equal_bits"], entry["spearman"]
        value = all_sizes if equal is None else equal
        return -2.0 if value is None else float(value)

    return sorted(audit["estimators"], key=merit, reverse=True)


def audit_table(job_id: int, audit: dict[str, Any]) -> Table:
    """Estimators and how well they rank maps."""
    sizes = [group.removeprefix("equal ") for group in audit["maps"] if group.startswith("equal")]
    table = Table(
        title=f"Audit of job {job_id}: rank correlation of predicted with measured KL",
        caption=f"On {audit['tokens']} tokens of {audit['text']}: "
        + ", ".join(f"{count} {group}" for group, count in audit["maps"].items())
        + ". 95 % intervals by resampling maps.",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("estimator")
    table.add_column("Spearman, all sizes", justify="right")
    table.add_column("Kendall", justify="right")
    for size in sizes:
        table.add_column(f"Spearman at {size} bits", justify="right")
    table.add_column("single flips", justify="right")
    table.add_column("off by", justify="right")
    table.add_column("seconds", justify="right")
    for entry in ranked(audit):
        table.add_row(
            ("* " if entry["name"] == audit["default"] else "  ") + entry["name"],
            _interval(entry["spearman_interval"]),
            _number(entry["kendall"]),
            *(_interval(entry["equal_bits"].get(size)) for size in sizes),
            _number((entry["flips"] or [None])[0]),
            _factor(entry["calibration"]["residual"]),
            f"{entry['seconds']:.0f}",
        )
    return table


def audit_remarks(audit: dict[str, Any]) -> list[str]:
    """What else one should know."""
    null, default = audit["null_arms"], audit["default"]
    judged = {entry["name"] for entry in audit["estimators"]}
    becomes = (
        "is the default of searches of this model from now on"
        if judged.issuperset(UNPROVEN)
        else f"is the best of these; without {' and '.join(UNPROVEN)} beside it no default"
    )
    null_arms = (
        f"* {default} {becomes}. Its table with units "
        f"shuffled ranks with {_number(null['shuffled'])}, with their order turned round with "
        f"{_number(null['inverse'])}, one that knows sizes and bits alone with "
        f"{_number(null['bits alone'])}, the weights' squared error with "
        f"{_number(null.get('weight error alone'))}."
    )
    own = next(e for e in audit["estimators"] if e["name"] == default)
    merit = own["spearman_equal_bits"] if audit_has_equal(audit) else own["spearman"]
    beaten = [
        arm
        for arm, value in null.items()
        if value is not None
        and merit is not None
        and value >= merit
        and not (arm == "weight error alone" and default == "weight-error")
    ]
    warning = f"That is no better than a null arm ({', '.join(beaten)}): on these maps nothing was learned."
    floor = (
        f"Flips that measure below twice the arithmetic's noise ({audit['noise_floor']:.2g} nats) "
        "are left out."
    )
    lines = [
        null_arms,
        *([warning] if beaten else []),
        *([floor] if audit["noise_floor"] else []),
        *audit["unable"].values(),
    ]
    residuals = next(e for e in audit["estimators"] if e["name"] == default)["residual_by_bits"]
    if residuals:
        lines.append(
            f"Measured over predicted by {default}, once its gain is fitted: "
            + ", ".join(
                f"{_factor(value, signed=True)} at {b} bits" for b, value in residuals.items()
            )
            + "."
        )
    if pairs := audit.get("interactions"):
        lines += [
            f"Two of the {len(pairs['units'])} most sensitive units at {scheme} cost "
            f"{abs(excess):.0%} {'more' if excess > 0 else 'less'} than the sum of both."
            for scheme, excess in zip(pairs["schemes"], pairs["excess"], strict=True)
        ]
    return lines + few_tokens(audit["experts"])


def audit_has_equal(audit: dict[str, Any]) -> bool:
    """Whether maps of equal size were measured."""
    return any(group.startswith("equal") for group in audit["measured"]["group"])


def calibration_figure(audit: dict[str, Any], ink: str, accents: list[str]) -> go.Figure:
    """Predicted (in nats, after the gain) against measured KL of all maps, default first."""
    figure = go.Figure()
    measured = audit["measured"]
    top = max(measured["kl"], default=1.0)
    low = min((kl for kl in measured["kl"] if kl > 0), default=top)
    for index, entry in enumerate(ranked(audit)):
        gain = entry["calibration"]["gain"] or 1.0
        pairs = [
            (gain * p, kl, group, bits)
            for p, kl, group, bits in zip(
                audit["predicted"][entry["name"]],
                measured["kl"],
                measured["group"],
                measured["bits"],
                strict=True,
            )
            if p > 0
        ]
        if not pairs:
            continue
        predicted, kl, groups, bits = zip(*pairs, strict=True)
        figure.add_trace(go.Scatter(
            x=predicted, y=kl, name=entry["name"], mode="markers",
            visible=True if entry["name"] == audit["default"] else "legendonly",
            marker={"size": 7, "color": accents[index % len(accents)], "opacity": 0.75},
            text=[f"{g}, {b:.3g} bits" for g, b in zip(groups, bits, strict=True)],
            hovertemplate="%{text}<br>predicted %{x:.3g}, measured %{y:.3g}<extra></extra>",
        ))  # fmt: skip
    figure.add_trace(go.Scatter(
        x=[low, top], y=[low, top], mode="lines", name="as predicted", hoverinfo="skip",
        line={"color": ink, "width": 1, "dash": "dot"},
    ))  # fmt: skip
    figure.update_layout(
        template="plotly_white", height=460, margin={"l": 60, "r": 20, "t": 20, "b": 50},
        xaxis={"title": "predicted KL, nats per token", "type": "log"},
        yaxis={"title": "measured KL, nats per token", "type": "log"},
    )  # fmt: skip
    return figure


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _interval(values: list[float | None] | None) -> str:
    if not values or values[0] is None:
        return ""
    mean, low, high = values
    return f"{mean:.3f} ({_number(low)} to {_number(high)})"


def _factor(log: float | None, *, signed: bool = False) -> str:
    """A logarithm as a factor."""
    if log is None:
        return ""
    factor = 2.718281828459045**log
    return f"{factor:.2f} x" if signed else f"x {factor:.2f}"

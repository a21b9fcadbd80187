"""Figures of fronts, for the report, for notebooks, and for whoever has the API's document."""

from collections.abc import Mapping, Sequence
from math import log10
from typing import Any

import plotly.graph_objects as go

from bitfront.fronts import GIVEN, PRESET

Document = Mapping[str, Any]

INK, MUTED, ACCENT, CONTROL, RANDOM = "#1b1f24", "#6e7781", "#0b62d6", "#c2410c", "#9aa4af"
CONTROLS = (
    ("uniform", CONTROL, "square"), ("random", RANDOM, "x"), (PRESET, "#15803d", "diamond"),
    (GIVEN, "#7c3aed", "star"),
)  # fmt: skip


def front_figure(front: Document) -> go.Figure:
    """KL over size: front with intervals, prediction, controls, noise floor.

    Args:
        front: as `documents.front_document` gives it, and the API.
    """
    figure = go.Figure()
    chosen = [p for p in front["points"] if p["on_front"]]
    figure.add_trace(_trace(
        chosen, "front, measured (95 % interval)", ACCENT,
        mode="lines+markers", intervals=True,
    ))  # fmt: skip
    predicted = [p for p in chosen if p["predicted_kl"]]
    figure.add_trace(go.Scatter(
        x=[_size(p) / 1e6 for p in predicted], y=[p["predicted_kl"] for p in predicted],
        name="the same maps, predicted", mode="markers",
        marker={"symbol": "line-ew-open", "size": 15, "color": ACCENT, "line": {"width": 2}},
        hovertemplate="predicted KL %{y:.4f}<extra></extra>",
    ))  # fmt: skip
    for control, color, symbol in CONTROLS:
        points = [p for p in front["points"] if p["control"] == control]
        if points:
            figure.add_trace(_trace(
                points, f"{control} (control)", color, mode="markers", symbol=symbol,
                intervals=True,
            ))  # fmt: skip
    floor = front["noise_floor"]
    if floor:
        figure.add_hline(y=floor, line={"dash": "dot", "color": MUTED, "width": 1})
        figure.add_annotation(  # on a logarithmic axis annotations count in decades
            x=0, xref="paper", xanchor="left", y=log10(floor), yanchor="bottom", showarrow=False,
            text=f"noise of {front['dtype']} arithmetic", font={"color": MUTED},
        )  # fmt: skip
    figure.update_yaxes(
        type="log",
        title="KL from the unquantized model, nats per token",
        dtick=1,
        gridcolor="#eceff2",
    )
    cached = any("cache_bytes" in p for p in front["points"])
    what = "weights and KV cache" if cached else "model weights"
    more = "at the job's workload" if cached else "everything that the file holds"
    figure.update_xaxes(title=f"{what}, MB ({more})", gridcolor="#eceff2")
    figure.update_layout(
        template="plotly_white", height=520, margin={"l": 70, "r": 20, "t": 10, "b": 55},
        legend={"x": 0.99, "xanchor": "right", "y": 0.99}, font={"color": INK, "size": 14},
    )  # fmt: skip
    return figure


def _size(point: Document) -> float:
    """What budgets count."""
    return float(point["size_bytes"])


def _trace(
    points: Sequence[Document],
    name: str,
    color: str,
    mode: str,
    symbol: str = "circle",
    intervals: bool = False,
) -> go.Scatter:
    error = {
        "type": "data", "symmetric": False, "thickness": 1.2, "width": 4, "color": color,
        "array": [p["kl_high"] - p["kl"] for p in points],
        "arrayminus": [min(p["kl"] - p["kl_low"], 0.999 * p["kl"]) for p in points],
    }  # fmt: skip
    return go.Scatter(
        x=[_size(p) / 1e6 for p in points],
        y=[p["kl"] for p in points],
        error_y=error if intervals else None,
        name=name,
        mode=mode,
        line={"color": color, "width": 1.5},
        marker={"symbol": symbol, "size": 9, "color": color},
        customdata=[[p["id"], p["average_bits"], p["perplexity"], p["origin"]] for p in points],
        hovertemplate="point %{customdata[0]}: %{customdata[3]}<br>%{x:.1f} MB, "
        "%{customdata[1]:.3f} bits<br>KL %{y:.4f}, perplexity %{customdata[2]:.2f}<extra></extra>",
    )

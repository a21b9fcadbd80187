"""The report of a job as one self-contained HTML page: the front, and which layer got what."""

from collections import Counter
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from bitfront import caching
from bitfront.audit_views import audit_remarks, calibration_figure, ranked
from bitfront.documents import front_document, method_of, row_of, rows_of
from bitfront.figures import ACCENT, CONTROL, INK, MUTED, front_figure
from bitfront.fronts import Front, Point, layout_of
from bitfront.sizes import show_bytes
from quantization.errors import ExportError
from quantization.units import Layout

STYLE = f"""
body {{ font: 16px/1.5 system-ui, sans-serif; color: {INK}; max-width: 1080px;
       margin: 2.5rem auto; padding: 0 1.25rem; }}
h1 {{ font-size: 1.6rem; margin: 0; }} h2 {{ font-size: 1.15rem; margin: 2.2rem 0 .3rem; }}
p, li {{ color: {INK}; }} .muted {{ color: {MUTED}; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }}
td, th {{ padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #e4e7eb; }}
td:last-child, th:last-child {{ text-align: left; }} .off {{ color: {MUTED}; }}
.bad {{ color: {CONTROL}; font-weight: 600; }}
"""


def write_report(front: Front, path: Path) -> None:
    """Write the page; raises `ExportError` if it can't be written or there is nothing to show."""
    if not front.points:
        raise ExportError(f"job {front.job.id} has no measured points yet; nothing to draw")
    figures = [front_figure(front_document(front)), heat_map(front)]
    divs = [
        figure.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False})
        for figure in figures
    ]
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Bitfront: {escape(front.model.name)}</title><style>{STYLE}</style>
<script>{get_plotlyjs()}</script></head><body>
<h1>{escape(front.model.name)}</h1>
<p class="muted">{escape(_facts(front))}</p>
<h2>Loss against size, measured on held-out text</h2>{divs[0]}
<h2>Against the controls</h2><ul>{_findings(front)}</ul>
<h2>Bits by layer</h2>
<p class="muted">Effective bits, scales included, for each unit of a map; choose a map above the
figure.</p>{divs[1]}
{_audit(front)}<h2>All points</h2>{_table(front)}
<p class="muted">{escape(method_of(front))}</p>
</body></html>
"""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ExportError(f"can't write '{path}' ({error})") from error


def heat_map(front: Front) -> go.Figure:
    """Bits of each unit: rows are kinds of unit, columns layers; a menu switches maps."""
    layout = layout_of(front.job, front.model)
    rows = rows_of(layout)
    shown = [p for p in front.points if p.on_front] or list(front.points)
    grids = [_grid(front, layout, rows, point) for point in shown]
    values = [value for values, _ in grids for row in values for value in row if value is not None]
    layers = 1 + max((unit.layer or 0) for unit in layout.units)
    figure = go.Figure()
    start = len(shown) // 2
    for i, (bits, texts) in enumerate(grids):
        figure.add_trace(go.Heatmap(
            z=bits, text=texts, x=list(range(layers)), y=rows, visible=i == start, xgap=1, ygap=2,
            zmin=min(values), zmax=max(values), colorscale="Viridis", reversescale=True,
            colorbar={"title": "bits", "thickness": 14},
            hovertemplate="layer %{x}, %{y}<br>%{text}<extra></extra>",
        ))  # fmt: skip
    buttons = [
        {
            "label": f"point {p.id}: {p.average_bits:.2f} bits, KL {p.kl:.3g}",
            "method": "update",
            "args": [{"visible": [j == i for j in range(len(shown))]}],
        }
        for i, p in enumerate(shown)
    ]
    figure.update_layout(
        template="plotly_white", height=130 + 46 * len(rows), font={"color": INK, "size": 14},
        margin={"l": 10, "r": 10, "t": 60, "b": 50},
        updatemenus=[{"buttons": buttons, "active": start, "x": 0, "xanchor": "left", "y": 1.28,
                      "yanchor": "top"}],
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_xaxes(title="layer")
    return figure


def _grid(
    front: Front, layout: Layout, rows: list[str], point: Point
) -> tuple[list[list[float | None]], list[list[str]]]:
    layers = 1 + max((unit.layer or 0) for unit in layout.units)
    bits: list[list[float | None]] = [[None] * layers for _ in rows]
    texts = [[""] * layers for _ in rows]
    schemes = front.candidates[point.id].schemes
    menu, bytes_table = front.job.facts["menu"], front.job.facts["bytes_table"]
    held = caching.numbers(front.job, layout)
    for u, (unit, scheme, costs) in enumerate(zip(layout.units, schemes, bytes_table, strict=True)):
        if unit.layer is None or scheme not in menu:  # a map that was given may go beyond it
            continue
        row = rows.index(str(row_of(unit)))
        bits[row][unit.layer] = 8 * costs[menu.index(scheme)] / held[u]
        texts[row][unit.layer] = scheme
    return bits, texts


def _facts(front: Front) -> str:
    layout = layout_of(front.job, front.model)
    pinned = sum(1 for row in front.job.facts["choices"] if len(row) == 1)
    reference = front.reference_perplexity
    return (
        f"Job {front.job.id}, {front.job.state}. {len(layout.units) - pinned} units decided, "
        f"{pinned} pinned, {len(layout.kept)} kept in full precision. Weights "
        f"{front.model.weights_hash[:12]}."
        + (f" Unquantized perplexity {reference:.2f}." if reference else "")
    )


def _audit(front: Front) -> str:
    """How well predictions of this model were found to rank maps, if that was audited."""
    audit = front.job.facts.get("audit") or front.job.facts.get("evidence")
    if not audit:
        return ""
    whose = (
        f" by the audit of job {audit['job']}, which chose the estimator" if "job" in audit else ""
    )
    figure = calibration_figure(audit, INK, [ACCENT, CONTROL, MUTED, "#15803d", "#7c3aed"])
    head = ("estimator", "Spearman, all sizes", "Spearman, equal size", "Kendall", "seconds")
    rows = "".join(
        f"<tr><td>{escape(entry['name'])}</td>"
        + "".join(
            f"<td>{'' if value is None else f'{value:.3f}'}</td>"
            for value in (entry["spearman"], entry["spearman_equal_bits"], entry["kendall"])
        )
        + f"<td>{entry['seconds']:.0f}</td></tr>"
        for entry in ranked(audit)
    )
    div = figure.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False})
    remarks = "".join(f"<li>{escape(line)}</li>" for line in audit_remarks(audit))
    return f"""<h2>Predictions audited against measurements</h2>
<p class="muted">Random maps{whose}, measured on the search text; choose estimators in the legend.</p>{div}
<table><tr>{"".join(f"<th>{name}</th>" for name in head)}</tr>{rows}</table><ul>{remarks}</ul>
"""


def _findings(front: Front) -> str:
    items = (
        f'<li class="{"bad" if "LOSES MORE" in finding else ""}">{escape(finding)}</li>'
        for finding in front.findings
    )
    return "".join(items)


def _table(front: Front) -> str:
    cached = any(point.cache_bytes is not None for point in front.points)
    head = ("point", "bits", "with KV cache" if cached else "size", "KL", "95 %", "perplexity", "predicted KL", "search KL",
            "schemes", "what")  # fmt: skip
    rows = "".join(_table_row(front, point) for point in front.points)
    return f"<table><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>{rows}</table>"


def _table_row(front: Front, point: Point) -> str:
    def number(value: float | None, digits: int = 4) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    counts = Counter(front.candidates[point.id].schemes)
    cells: list[Any] = [
        point.id, f"{point.average_bits:.3f}", show_bytes(point.size_bytes), number(point.kl),
        f"{number(point.kl_low)} to {number(point.kl_high)}", number(point.perplexity, 2),
        number(point.predicted_kl), number(point.search_kl),
        ", ".join(f"{n} {name}" for name, n in counts.most_common()),
        front.candidates[point.id].origin,
    ]  # fmt: skip
    style = "" if point.on_front else ' class="off"'
    return f"<tr{style}>{''.join(f'<td>{escape(str(cell))}</td>' for cell in cells)}</tr>"

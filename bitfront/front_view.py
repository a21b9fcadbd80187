"""A front's document as notebooks show it, from a store or from a server."""

from typing import Any


class FrontView(dict[str, Any]):
    """A front's document, which notebooks draw."""

    def figure(self) -> Any:
        """As a plotly figure: KL with intervals over size, controls, predictions."""
        from bitfront.figures import front_figure

        return front_figure(self)

    def _repr_html_(self) -> str:
        if not self["points"]:
            return f"<p>Job {self['job']} is {self['state']} and has no measured points yet.</p>"
        html: str = self.figure().to_html(full_html=False, include_plotlyjs=True)
        return html

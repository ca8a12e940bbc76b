"""The pictures of a card: its experts' loads, and the curves of its training.

A picture holds, as a text chunk, the digest of what it was drawn from. Where matplotlib is missing, one that is there
already and was drawn from the same data is kept; and pictures of two versions of matplotlib, whose bytes may differ,
can be told to show the same.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluation.routing import RoutingReport
from ..evaluation.routing_plot import DPI, heat_map, plot_refusal
from .card_sources import CardSources


FOLDER = "figures"
SOURCE = "Source"  # a keyword of the PNG standard
_DRAWING = 1  # raised where the same data are drawn in another way
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class CardFigure:
    """One picture.

    Attributes:
        name: its file, below `figures/`.
        caption: what it shows.
        data: all that it is drawn from.
        draw: from that data and the metadata of a PNG file to the file.
    """

    name: str
    caption: str
    data: dict[str, Any]
    draw: Callable[[dict[str, Any], dict[str, str | None]], bytes]

    @property
    def digest(self) -> str:
        """sha256 of the data, as the picture's file names it."""
        text = json.dumps([_DRAWING, self.name, self.data], sort_keys=True)
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"

    def content(self, beside: Path | None) -> bytes | None:
        """The picture's file, drawn now or as it lies in `beside` already; None where neither can be had."""
        if plot_refusal() is None:
            from matplotlib import style

            with style.context("default"):  # the same whatever a user's own style is
                return self.draw(self.data, {SOURCE: self.digest})
        path = None if beside is None else beside / FOLDER / self.name
        there = b"" if path is None or not path.is_file() else path.read_bytes()
        return there if drawn_from(there) == self.digest else None


def card_figures(sources: CardSources) -> list[CardFigure]:
    """Those that the records have data for."""
    figures = []
    routing = [record.routing for record in sources.evaluations.values() if record.routing is not None]
    if not routing and sources.training is not None and "routing" in sources.training:
        routing = [sources.training["routing"]]
    if routing:
        report = RoutingReport.from_dict(routing[-1])
        data = {"title": sources.checkpoint.checkpoint.name, "report": report.to_dict()}
        caption = f"Load of each expert over its layer's mean load, on {report.tokens:,} tokens"
        figures.append(CardFigure("routing.png", caption, data, _draw_routing))
    curves = {} if sources.training is None else sources.training["history"]
    curves = {name: curve for name, curve in curves.items() if len(curve["steps"]) > 1}
    if curves:
        figures.append(CardFigure("training.png", "Curves of the training run", {"curves": curves}, _draw_curves))
    return figures


def drawn_from(png: bytes) -> str | None:
    """The digest that a picture's file names; None for a picture of somebody else's."""
    if not png.startswith(_SIGNATURE):
        return None
    at = len(_SIGNATURE)
    while at + 8 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, at)
        content = png[at + 8 : at + 8 + length]
        if kind == b"tEXt" and content.startswith(SOURCE.encode() + b"\0sha256:"):
            return content.partition(b"\0")[2].decode("latin-1")
        at += 12 + length
    return None


def _draw_routing(data: dict[str, Any], metadata: dict[str, str | None]) -> bytes:
    return heat_map([(data["title"], RoutingReport.from_dict(data["report"]))], metadata)


def _draw_curves(data: dict[str, Any], metadata: dict[str, str | None]) -> bytes:
    """Losses in one panel, everything else, which are shares and margins, in a second."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = data["curves"]
    losses = [name for name in curves if name.endswith("loss")]
    panels = [names for names in (losses, [name for name in curves if name not in losses]) if names]
    figure = Figure(figsize=(4.6 * len(panels), 3.2), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    for axis, names in zip(figure.subplots(1, len(panels), squeeze=False).flatten(), panels):
        for name in names:
            steps, values = curves[name]["steps"], curves[name]["values"]
            # A few points of an evaluation are points, a trainer's log is a line
            axis.plot(steps, values, label=name, linewidth=1, marker="o" if len(steps) < 15 else None, markersize=3)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    if losses:
        figure.axes[0].set_ylabel("loss", fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI, metadata=metadata)
    return file.getvalue()

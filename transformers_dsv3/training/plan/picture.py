"""A schedule as a picture: ranks from top to bottom, time from left to right."""

from __future__ import annotations

import io
from collections.abc import Sequence

from .schedules import Timeline


COLOURS = {"F": "#4c78a8", "I": "#f58518", "W": "#54a24b", "B": "#e45756"}
MEANINGS = {
    "F": "forward",
    "I": "gradient of inputs",
    "W": "gradient of weights",
    "B": "both gradients",
}
# Stages of a rank differ in how light their colour is
LIGHTER = 0.55


def picture_refusal() -> str | None:
    """Why no picture can be drawn here; None where it can."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "needs matplotlib, which is not installed: pip install 'transformers-dsv3[plot]'"
    return None


def gantt(timelines: Sequence[tuple[str, Timeline]], unit: str = "seconds") -> bytes:
    """Draws schedules below each other, on the same scale of time.

    Args:
        timelines: with a title each.
        unit: of their time.

    Returns:
        A PNG file.

    Raises:
        ImportError: without matplotlib (extra `plot`).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    heights = [0.9 + 0.22 * len(timeline.spans) for _, timeline in timelines]
    figure = Figure(figsize=(11, sum(heights) + 0.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(heights), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights})
    axes = list(grid[:, 0])
    kinds: set[str] = set()
    for axis, (title, timeline) in zip(axes, timelines):
        begin = min(spans[0].start for spans in timeline.spans)
        for rank, spans in enumerate(timeline.spans):
            first = min(span.action.stage for span in spans)
            for kind in MEANINGS:
                for is_first in (True, False):
                    bars = [
                        (span.start - begin, span.end - span.start)
                        for span in spans
                        if span.action.kind == kind and (span.action.stage == first) == is_first
                    ]
                    if bars:
                        kinds.add(kind)
                        alpha = 1.0 if is_first else LIGHTER
                        axis.broken_barh(bars, (rank - 0.42, 0.84), facecolors=COLOURS[kind], alpha=alpha, linewidth=0)
        axis.set_ylim(len(timeline.spans) - 0.4, -0.6)
        every = max(1, len(timeline.spans) // 8)
        axis.set_yticks(range(0, len(timeline.spans), every))
        axis.set_ylabel("rank")
        axis.set_title(f"{title}: {timeline.idle:.1%} idle", fontsize=9)
    axes[-1].set_xlabel(unit)
    figure.legend(
        handles=[Patch(color=COLOURS[kind], label=meaning) for kind, meaning in MEANINGS.items() if kind in kinds],
        loc="outside upper right",
        ncols=4,
        fontsize=8,
    )
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()

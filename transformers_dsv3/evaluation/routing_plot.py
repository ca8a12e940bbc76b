"""The layer × expert heat map of a routing report."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .routing import RoutingReport


if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 150
# Colours run from a quarter of the mean load to four times of it in every figure, so that figures can be compared
DOUBLINGS = 2
# Beyond so many experts, two maps stand one above the other
SIDE_BY_SIDE = 64
# Up to so many experts a cell is wide enough for its number
NUMBERED = 16


def plot_refusal() -> str | None:
    """Why no plot can be drawn here; None where it can."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "needs matplotlib, which is not installed: pip install 'transformers-dsv3[plot]'"
    return None


def heat_map(reports: Sequence[tuple[str, RoutingReport]], metadata: dict[str, str | None] | None = None) -> bytes:
    """Draw the loads of one checkpoint, or of several beside each other.

    Rows are mixture-of-experts layers, columns experts, colours the load over the layer's mean load on a logarithmic
    scale around 1; experts that no token chose are black. Nothing of matplotlib's global state is used or changed.

    Args:
        reports: pairs of a title and a report.
        metadata: text chunks of the PNG file; `{"Software": None}` leaves matplotlib's version out.

    Returns:
        A PNG file.

    Raises:
        ImportError: without matplotlib (extra `plot`).
    """
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    sizes = [map_inches(report) for _, report in reports]
    stacked = max(report.n_experts for _, report in reports) > SIDE_BY_SIDE
    widths, heights = [width for width, _ in sizes], [height for _, height in sizes]
    figure = Figure(
        figsize=(max(widths) + 1.6, sum(heights) + 1.1 * len(sizes))
        if stacked
        else (sum(widths) + 0.7 * len(sizes) + 0.9, max(heights) + 1.1),
        dpi=DPI,
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    grid: dict[str, Any] = (
        {"nrows": len(sizes), "height_ratios": heights} if stacked else {"ncols": len(sizes), "width_ratios": widths}
    )
    axes = figure.subplots(squeeze=False, **grid).flatten()
    colours = ScalarMappable(Normalize(-DOUBLINGS, DOUBLINGS), colormaps["RdBu_r"].with_extremes(bad="black"))
    for axis, (title, report) in zip(axes, reports):
        load_LE = np.array([layer.relative_load for layer in report.layers])
        doublings_LE = np.log2(load_LE, out=np.full_like(load_LE, np.nan), where=load_LE > 0)
        axis.imshow(doublings_LE, cmap=colours.cmap, norm=colours.norm, aspect="auto", interpolation="nearest")
        _label(axis, title, report)
        if report.n_experts <= NUMBERED:
            for row, loads in enumerate(load_LE):
                for expert, load in enumerate(loads):
                    pale = 0 < load and abs(doublings_LE[row, expert]) < 0.6 * DOUBLINGS
                    axis.text(
                        expert, row, f"{load:.1f}", ha="center", va="center", fontsize=6, color="k" if pale else "w"
                    )
    high = sum(heights) if stacked else max(heights)
    bar = figure.colorbar(colours, ax=list(axes), extend="both", fraction=0.08, aspect=high / 0.15, pad=0.02)
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["¼", "½", "1", "2", "4"], fontsize=7)
    bar.set_label("load over mean load (black: no token)", fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI, metadata=metadata)
    return file.getvalue()


def map_inches(report: RoutingReport) -> tuple[float, float]:
    """Width and height of the cells of one map: at least 6 pixels an expert and 18 a layer."""
    experts, layers = report.n_experts, len(report.layers)
    return max(4.2, min(experts * 0.12, 9.6), experts * 0.04), max(1.2, min(layers * 0.3, 3.6), layers * 0.12)


def _label(axis: Axes, title: str, report: RoutingReport) -> None:
    mean = report.statistics.mean()
    axis.set_title(
        f"{title}\nutilisation {mean['utilisation']:.2f}, MaxVio {mean['max_violation']:.2f}, "
        f"{mean['dead_experts']:.0f} dead",
        fontsize=9,
    )
    rows, experts = len(report.layers), report.n_experts
    # Twelve pixels' worth of a label each at the least
    every_row, every_expert = -(-rows // 31), next(n for n in (1, 2, 4, 8, 16, 32, 64, experts) if experts / n <= 16)
    axis.set_yticks(range(0, rows, every_row), [str(layer.layer) for layer in report.layers[::every_row]], fontsize=7)
    axis.set_xticks(range(0, experts, every_expert), [str(n) for n in range(0, experts, every_expert)], fontsize=7)
    axis.set_xlabel("expert", fontsize=8)
    axis.set_ylabel("layer", fontsize=8)

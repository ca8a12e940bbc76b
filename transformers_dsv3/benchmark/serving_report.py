"""The table and the plot of `--what serving`, made from what the JSON file holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .report import duration, machine_name
from .serving import ENGINE


SERVING_HEADINGS = (
    "measured",
    "contender",
    "tokens/s",
    "latency a token",
    "p99",
    "first token",
    "p99",
    "between tokens",
    "p99",
    "of best static",
)


def serving_rows(results: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows of clients, contender, tokens a second, and medians beside 99th percentiles of three times; the last column
    is the latency a token as a share of that of the best static batches.
    """
    for entry in results.get("serving", ()):
        title = entry["title"]
        for name, figures in entry["contenders"].items():
            cells = []
            for what in ("latency_a_token", "first_token", "between_tokens"):
                times = figures.get(what)
                cells += ["", ""] if times is None else [duration(times["p50"]), duration(times["p99"])]
            best = entry["contenders"].get(entry["best_static"])
            share = "" if best is None or best is figures else f"{figures['median'] / best['median']:.2f}"
            yield (title, name, f"{figures['tokens_per_second']:,.0f}", *cells, share)
            title = ""
        for name, reason in entry["failed"].items():
            yield (title, name, "failed", reason, "", "", "", "", "", "")
            title = ""


def plot_serving(results: dict[str, Any], path: Path) -> None:
    """Draws latency a token and tokens a second by the number of clients, a line for each contender."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entries = [entry for entry in results["serving"] if entry["contenders"]]
    names = sorted({name for entry in entries for name in entry["contenders"]}, key=_place)
    figure, (latency, rate) = plt.subplots(1, 2, figsize=(10, 4))
    for number, name in enumerate(names):
        own = [(entry["clients"], entry["contenders"][name]) for entry in entries if name in entry["contenders"]]
        clients = [count for count, _ in own]
        # Names begin with the engine's, so that no other line has its colour
        style = {"color": f"C{number}", "linewidth": 2.5 if name == ENGINE else 1.2}
        medians = [figures["latency_a_token"]["p50"] * 1000 for _, figures in own]
        latency.plot(clients, medians, marker="o", label=name, **style)
        rate.plot(clients, [figures["tokens_per_second"] for _, figures in own], marker="o", label=name, **style)
    latency.set_ylabel("ms a token, from asking to the end (median)")
    latency.set_yscale("log")
    rate.set_ylabel("tokens a second")
    rate.set_ylim(bottom=0)
    counts = sorted({entry["clients"] for entry in entries})
    for axis in (latency, rate):
        axis.set_xscale("log")
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
        axis.set_xlabel("clients")
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    rate.legend(fontsize=8, frameon=False)
    figure.suptitle(f"{results['model']['source']} on {machine_name(results['machine'])}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _place(name: str) -> tuple[bool, int]:
    return name != ENGINE, int(name.split()[1]) if name != ENGINE else 0

"""The table and the plot of a run, made from what the JSON file holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .contenders import NATIVE, PLUGIN


def table_rows(results: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows of workload, contender, median, spread, tokens a second, faster than native and the plugin, share of floor,
    and the host's time a step beside its kernels with how many it called.

    A workload's name stands in its first row only.
    """
    for entry in results["workloads"]:
        title = entry["title"]
        for name, figures in entry["contenders"].items():
            share = f"{figures['floor']['share']:.0%}" if "floor" in figures else ""
            rate = f"{figures['tokens_per_second']:,.1f}"
            if "mtp" in figures:
                rate += f" ({figures['mtp']['acceptance']:.0%} of drafts)"
            yield (
                title,
                name,
                duration(figures["median"]),
                f"{duration(figures['lower_quartile'])} to {duration(figures['upper_quartile'])}",
                rate,
                times(entry, NATIVE, name),
                times(entry, PLUGIN, name),
                share,
                f"{duration(host['seconds'])} ({host['calls']})" if (host := figures.get("host")) else "",
            )
            title = ""
        for name, reason in entry["failed"].items():
            yield (title, name, "failed", reason, "", "", "", "", "")
            title = ""


def kernel_rows(results: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows of part, backend, median, spread, TFLOP/s, GB/s, faster than torch's own, largest error beside float64."""
    for entry in results.get("kernels", ()):
        title = f"{entry['title']}, {entry['dtype']}"
        for name, figures in entry["contenders"].items():
            errors = figures["errors"].values()
            yield (
                title,
                name,
                short_duration(figures["median"]),
                f"{short_duration(figures['lower_quartile'])} to {short_duration(figures['upper_quartile'])}",
                f"{figures['operations_per_second'] / 1e12:.3g}",
                f"{figures['bytes_per_second'] / 1e9:,.3g}" if not entry.get("with_gradients") else "",
                times(entry, KERNEL_REFERENCE[entry["what"]], name),
                f"{max(errors):.1e}" if errors else "",
            )
            title = ""


KERNEL_HEADINGS = ("measured", "backend", "median", "quartiles", "TFLOP/s", "GB/s", "x torch", "error")
# What torch itself has for it
KERNEL_REFERENCE = {"experts": "grouped_mm", "attention": "torch"}
HEADINGS = (
    *("measured", "contender", "median", "quartiles", "tokens/s", "x transformers", "x plugin", "of floor"),
    "host (calls)",
)


def times(entry: dict[str, Any], other: str, name: str) -> str:
    """How many times faster `name` is than `other`, with the extremes of the rounds; empty where one is missing."""
    both = entry["contenders"]
    if name == other or name not in both or other not in both:
        return ""
    rounds = sorted(a / b for a, b in zip(both[other]["seconds"], both[name]["seconds"]))
    middle = len(rounds) // 2
    median = rounds[middle] if len(rounds) % 2 else (rounds[middle - 1] + rounds[middle]) / 2
    return f"{median:.2f} ({rounds[0]:.2f} to {rounds[-1]:.2f})"


def duration(seconds: float) -> str:
    """Milliseconds below a second, seconds above."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def short_duration(seconds: float) -> str:
    """Microseconds below a tenth of a millisecond, else as `duration`."""
    return f"{seconds * 1e6:.3g} µs" if seconds < 1e-4 else duration(seconds)


def notes(results: dict[str, Any]) -> list[str]:
    """Sentences below the table: model, machine, ceilings, agreement, warnings, peers that failed."""
    machine, model = results["machine"], results["model"]
    cut = f", {model['cut']}" if model["cut"] else ""
    lines = [
        f"{model['source']}: {model['parameters'] / 1e9:.2f} B parameters{cut}, weights {model['weights']}.",
        f"{machine['cpu']}, {machine.get('threads')} of {machine['cores']} cores; torch {machine['torch']}, "
        f"transformers {machine['transformers']}; load average {machine['load_average']} at the start.",
    ]
    if "device" in machine:
        gpu = machine["device"]
        driver = f", driver {gpu['driver_version']}" if "driver_version" in gpu else ""
        lines.append(
            f"{gpu['name']} ({gpu['architecture']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, "
            f"{gpu['multiprocessors']} multiprocessors), {gpu['runtime']}{driver}, triton {gpu['triton']}."
        )
        for when, state in (("before", gpu["state"]), ("after", gpu.get("state_after"))):
            if state:
                lines.append(f"GPU {when}: " + ", ".join(f"{name} {value}" for name, value in state.items()) + ".")
    for entry in results["workloads"][-1:]:
        measured = entry.get("ceilings")
        if measured:
            read = sorted(measured["read_bytes_per_second"])
            rates = ", ".join(
                f"{name} {sorted(values)[len(values) // 2] / 1e9:,.0f} G operations/s"
                for name, values in measured["gemm_operations_per_second"].items()
            )
            lines.append(f"Ceilings, last workload: reading {read[len(read) // 2] / 1e9:.1f} GB/s; {rates}.")
    lines += list(details(results))
    for name, apart in results["agreement"].items():
        lines.append(
            f"Logits of {name} beside the plugin's: relative error {apart['relative_error']:.1e}, "
            f"best token equal at {apart['argmax']:.0%} of positions."
        )
    for name, bits in results.get("quality", {}).items():
        lines.append(
            f"{name}: {bits['value']:.4f} bits a byte of {bits['bytes']:,} bytes that `quickstart` holds out."
        )
    lines += [f"{name} was left out: {reason}" for name, reason in results["failed"].items()]
    return lines + [f"Warning: {text}" for text in results["warnings"]]


def details(results: dict[str, Any]) -> Iterator[str]:
    """Sentences on what was measured beside the times: memory of training, where prefill spends its time."""
    for entry in results.get("kernels", ()):
        for name, reason in entry["failed"].items():
            yield f"{entry['title']}: {name} is left out: {reason}."
    for entry in results["workloads"]:
        for name, figures in entry["contenders"].items():
            if "first_generate_seconds" in figures:
                seconds = duration(figures["first_generate_seconds"])
                yield f"{entry['title']}: the first generate of {name} took {seconds}, with what it compiled."
            memory, profile = figures.get("memory"), figures.get("profile")
            if memory and "failed" in memory:
                yield f"{entry['title']}: memory of {name} was not measured: {memory['failed']}."
            elif memory and memory["peak_bytes"]:
                before, peak = memory["before_bytes"] / 2**20, memory["peak_bytes"] / 2**20
                yield f"{entry['title']}: {name} peaks at {peak:,.0f} MiB, {before:,.0f} MiB of them with the model."
            if parts := figures.get("parts"):
                took = {part: duration(seconds) for part, seconds in parts.items()}
                yield (
                    f"{name} loads in {took['loading']} (reading the files takes {took['reading']}); its first token "
                    f"takes {took['first_token']}, the next {took['next_token']}."
                )
            if profile:
                share = profile["linear_share_of_rate"]
                at_rate = f", at {share:.0%} of the GEMM rate" if share else ""
                linear, attention, other = (
                    duration(profile[f"{kind}_seconds"]) for kind in ("linear", "attention", "other")
                )
                yield (
                    f"{entry['title']}: {name} spends {linear} in linear layers{at_rate}, {attention} in attention, "
                    f"{other} elsewhere."
                )


def machine_name(machine: dict[str, Any]) -> str:
    """What a plot or a table calls the machine."""
    if "device" in machine:
        return machine["device"]["name"]
    return f"{machine['cpu']}, {machine.get('threads')} threads"


def plot(results: dict[str, Any], path: Path) -> None:
    """Draws one panel a workload: a bar for each contender's median, whiskers to the quartiles, the floor dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entries = [entry for entry in results["workloads"] if entry["contenders"]]
    names = list(dict.fromkeys(name for entry in entries for name in entry["contenders"]))
    colours = {name: f"C{place}" for place, name in enumerate(names)}
    columns = min(3, max(len(entries), 1))
    lines = -(-max(len(entries), 1) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 0.9 + 2.4 * lines), squeeze=False)
    for axis in axes.flat[len(entries) :]:
        axis.set_visible(False)
    for axis, entry in zip(axes.flat, entries):
        shown = list(entry["contenders"].items())
        for place, (name, figures) in enumerate(shown):
            median = figures["median"] * 1000
            whiskers = [[median - figures["lower_quartile"] * 1000], [figures["upper_quartile"] * 1000 - median]]
            axis.barh(place, median, xerr=whiskers, color=colours[name], capsize=3, height=0.65)
            axis.text(
                figures["upper_quartile"] * 1000, place, f"  {duration(figures['median'])}", va="center", fontsize=8
            )
            if "floor" in figures:
                floor = figures["floor"]["seconds"] * 1000
                axis.plot([floor, floor], [place - 0.42, place + 0.42], color="black", linestyle="--", linewidth=1)
        axis.set_yticks(range(len(shown)), [name for name, _ in shown], fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(left=0, right=max(figures["upper_quartile"] for _, figures in shown) * 1300)
        axis.set_title(entry["title"], fontsize=9)
        axis.set_xlabel("ms a token" if entry["what"] in ("decode", "mtp") else "ms", fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    model, machine = results["model"], results["machine"]
    figure.suptitle(
        f"{model['source']} on {machine_name(machine)} (dashed: the machine's floor)",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)

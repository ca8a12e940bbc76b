"""What the stages measured beside what was aimed at, and the page that says so. Standard library alone."""

from collections.abc import Iterator
from typing import Any


TARGETS_ARE_OF = "H100 or H200, bf16"


def _record(stages: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next((stage.get("record") or {} for stage in stages if stage["name"] == name), {})


def _served(contenders: dict[str, Any]) -> str | None:
    """Ours, of the backends that ran: Triton's on a GPU, whatever `auto` or the CPU has in a rehearsal."""
    return next((name for name in ("triton", "auto", "cpu") if name in contenders), None)


def _kernel(stages: list[dict[str, Any]], what: str, with_gradients: bool = False) -> dict[str, Any] | None:
    """The largest measurement of a part."""
    found = [
        entry
        for entry in _record(stages, "kernels").get("kernels", ())
        if entry["what"] == what and entry.get("with_gradients", False) == with_gradients
    ]
    return max(found, key=lambda entry: entry["operations"], default=None)


def _workload(stages: list[dict[str, Any]], batch: bool, longest: bool) -> dict[str, Any] | None:
    found = [
        entry for entry in _record(stages, "decoding").get("workloads", ()) if (entry["what"] == "batched") == batch
    ]
    return (max if longest else min)(found, key=lambda entry: entry["tokens"], default=None)


def _target(what: str, bar: str, value: float | None, least: float, written: str, why: str = "") -> dict[str, Any]:
    met = None if value is None else value >= least
    return {"what": what, "bar": bar, "value": value, "met": met, "written": written if met is not None else why}


def _rate(entry: dict[str, Any] | None, figure: str) -> float | None:
    name = _served(entry["contenders"]) if entry else None
    return entry["contenders"][name][figure] if entry and name else None


def _ratio(entry: dict[str, Any] | None, other: str, ours: str | None) -> float | None:
    """How many times as long another takes as ours."""
    if entry is None or ours not in entry["contenders"] or other not in entry["contenders"]:
        return None
    return entry["contenders"][other]["median"] / entry["contenders"][ours]["median"]


def _why_missing(entry: dict[str, Any] | None, *names: str | None) -> str:
    if entry is None:
        return "not measured"
    failed = [f"{name}: {entry['failed'][name]}" for name in names if name in entry["failed"]]
    return "not measured" + (f", {'; '.join(failed)}" if failed else "")


def _error_ratios(stages: list[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """Of every part and result: our error beside float64 over that of torch's own path."""
    for entry in _record(stages, "kernels").get("kernels", ()):
        name, torchs = _served(entry["contenders"]), {"experts": "grouped_mm", "attention": "torch"}[entry["what"]]
        if name is None or torchs not in entry["contenders"]:
            continue
        for result, error in entry["contenders"][name]["errors"].items():
            theirs = entry["contenders"][torchs]["errors"].get(result)
            if theirs:
                yield f"{entry['title']}, {result}", error / theirs


def targets(stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each of what is aimed at: what, bar, value, whether it is met (None where it was not measured), in words."""
    found = []
    for with_gradients, bar in ((False, 500), (True, 400)):
        entry = _kernel(stages, "experts", with_gradients)
        value = _rate(entry, "operations_per_second")
        title = f"experts forward{' + backward' if with_gradients else ''}, 4,096 tokens"
        written = "" if value is None else f"{value / 1e12:.4g} TFLOP/s"
        why = _why_missing(entry, "triton", "auto")
        found.append(_target(title, f"≥ {bar} TFLOP/s", value, bar * 1e12, written, why))
    entry = _kernel(stages, "experts")
    value = _ratio(entry, "grouped_mm", _served(entry["contenders"]) if entry else None)
    written, why = f"{value or 0:.2f}×", _why_missing(entry, "grouped_mm")
    found.append(_target("the same, beside grouped_mm", "≥ 1.3×", value, 1.3, written, why))
    entry = _kernel(stages, "attention")
    value = _rate(entry, "bytes_per_second")
    written = f"{(value or 0) / 1e9:,.4g} GB/s of latents"
    why = _why_missing(entry, "triton")
    found.append(_target("absorbed decode, 64 × 8,192 cached", "≥ 2,300 GB/s", value, 2.3e12, written, why))
    for title, batch, longest in (
        ("batch 1, 1k", False, False),
        ("batch 1, 8k", False, True),
        ("batch 32, 1k", True, True),
    ):
        entry = _workload(stages, batch, longest)
        # What generate() reaches with a static cache, or without one where that failed
        ours = next((name for name in ("plugin static", "plugin") if entry and name in entry["contenders"]), None)
        if not batch:
            share = entry["contenders"][ours].get("floor", {}).get("share") if entry and ours else None
            why = _why_missing(entry, "plugin static", "plugin")
            found.append(
                _target(
                    f"decode, {title}: share of the floor", "≥ 60 %", share, 0.6, f"{share or 0:.0%} ({ours})", why
                )
            )
        value = _ratio(entry, "transformers", ours)
        why = _why_missing(entry, "plugin static", "plugin", "transformers")
        title = f"decode, {title}: beside native's defaults"
        found.append(_target(title, "≥ 5×", value, 5.0, f"{value or 0:.1f}× ({ours})", why))
    worst = max(_error_ratios(stages), key=lambda pair: pair[1], default=None)
    found.append(
        _target(
            "error beside float64, over torch's own bf16 path's",
            "≤ 1×",
            None if worst is None else -worst[1],
            -1.0,
            "" if worst is None else f"{worst[1]:.3f}× at most ({worst[0]})",
            "not measured",
        )
    )
    return found


def succeeded(stages: list[dict[str, Any]]) -> bool:
    """Whether all that ran was right: nothing failed and no time ran out. Speed is another matter."""
    return all(stage["outcome"] == "finished" or stage["outcome"].startswith("not run: ") for stage in stages)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms"


def _rows(headings: list[str], rows: list[list[str]]) -> list[str]:
    lines = [headings, ["---"] * len(headings), *rows]
    return ["", *(f"| {' | '.join(line)} |" for line in lines), ""]


def _kernel_rows(stages: list[dict[str, Any]]) -> Iterator[list[str]]:
    for entry in _record(stages, "kernels").get("kernels", ()):
        for name, figures in entry["contenders"].items():
            yield [
                entry["title"],
                name,
                _milliseconds(figures["median"]),
                f"{figures['operations_per_second'] / 1e12:.3g}",
                "" if entry.get("with_gradients") else f"{figures['bytes_per_second'] / 1e9:,.4g}",
                f"{max(figures['errors'].values()):.1e}" if figures["errors"] else "",
            ]
        for name, reason in entry["failed"].items():
            yield [entry["title"], name, reason, "", "", ""]


def _workload_rows(stages: list[dict[str, Any]]) -> Iterator[list[str]]:
    for entry in _record(stages, "decoding").get("workloads", ()):
        for name, figures in entry["contenders"].items():
            ratio = _ratio(entry, "transformers", name)
            yield [
                entry["title"],
                name,
                _milliseconds(figures["median"]),
                f"{figures['tokens_per_second']:,.1f}",
                f"{figures['floor']['share']:.0%}" if "floor" in figures else "",
                "" if ratio is None or name == "transformers" else f"{ratio:.2f}",
            ]
        for name, reason in entry["failed"].items():
            yield [entry["title"], name, reason, "", "", ""]


def _check_rows(stages: list[dict[str, Any]]) -> Iterator[list[str]]:
    for name, check in _record(stages, "checks").items():
        figures = ", ".join(f"{key} {value}" for key, value in check.get("figures", {}).items())
        yield [name, check["outcome"], figures or check.get("reason", "")]


def page(results: dict[str, Any]) -> str:
    """The results as a page of Markdown."""
    device, versions = results["machine"]["device"], results["machine"]["versions"]
    has = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    lines = [f"# {device['name']}", ""]
    if results["rehearsal"]:
        lines += ["**A rehearsal on a CPU at tiny sizes: the figures say nothing about a GPU.**", ""]
    parts = [device.get("architecture"), device.get("runtime"), device.get("cpu")]
    if device.get("driver_version"):
        parts.append(f"driver {device['driver_version']}")
    lines += [
        f"{', '.join(filter(None, parts))}. {has}. Commit {results['commit'] or 'unknown'}, {results['started']}."
    ]
    lines += _rows(
        [f"target ({TARGETS_ARE_OF})", "bar", "measured", "met"],
        [
            [each["what"], each["bar"], each["written"], {True: "yes", False: "**no**", None: ""}[each["met"]]]
            for each in results["targets"]
        ],
    )
    stages = results["stages"]
    lines += _rows(
        ["stage", "outcome", "seconds"], [[each["name"], each["outcome"], f"{each['seconds']:.0f}"] for each in stages]
    )
    tests = _record(stages, "tests")
    if tests:
        counts = {outcome: list(tests.values()).count(outcome) for outcome in dict.fromkeys(tests.values())}
        lines += [f"Tests: {', '.join(f'{count} {outcome}' for outcome, count in counts.items())}.", ""]
        lines += [f"- {outcome}: `{name}`" for name, outcome in tests.items() if outcome in ("failed", "error")]
    for headings, rows in (
        (["check", "outcome", "figures"], _check_rows(stages)),
        (["part of a layer", "backend", "median", "TFLOP/s", "GB/s", "error"], _kernel_rows(stages)),
        (["whole model", "contender", "median", "tokens/s", "of floor", "× transformers"], _workload_rows(stages)),
    ):
        if listed := list(rows):
            lines += _rows(headings, listed)
    return "\n".join(lines).rstrip() + "\n"

"""The page of a filtering run: funnel, scores by domain, samples at each threshold, and what 12T tokens would cost."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...files import write_whole
from .plan import FilterPlan


PAGE = "report.html"
# Bytes that 12T tokens have
ARTICLE_BYTES = 48e12
SAMPLES, EXCERPT = 3, 300
FILES = 20  # are looked through for samples

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:62em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}pre{background:#f6f6f6;padding:.6em;white-space:pre-wrap;overflow-wrap:anywhere}
.kept{fill:#2a7}.dropped{fill:#c55}.bar{fill:#47a}small{color:#666}"""


def write_page(plan: FilterPlan, report: dict[str, Any]) -> None:
    """Write `report.html`, one file without scripts or anything from elsewhere."""
    parts = [*_head(report), *_funnel(report), *_scores(report), *_groups(report)]
    parts += [*_samples(plan, report), *_unreadable(report), *_cost(plan, report)]
    page = "\n".join(parts)
    head = f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Filter</title><style>{STYLE}</style>'
    write_whole(plan.output / PAGE, f"{head}{page}</html>\n".encode("utf-8", "replace"))


def _head(report: dict[str, Any]) -> Iterator[str]:
    yield (
        f"<h1>{report['kept_share']:.1%} of the tokens kept</h1><p>{report['kept']:,} of {report['read']:,} "
        f"documents, {report['kept_tokens']:,} of {report['tokens']:,} tokens after exact deduplication; "
        f"{report['unreadable']['count']:,} documents or files could not be read.</p>"
    )


def _funnel(report: dict[str, Any]) -> Iterator[str]:
    yield "<h2>Stages</h2>"
    bars, most = [], max([row["left_bytes"] + row["dropped_bytes"] for row in report["funnel"]] or [1]) or 1
    for number, row in enumerate(report["funnel"]):
        width = 520 * row["left_bytes"] / most
        y = 26 * number
        bars.append(
            f'<text x="0" y="{y + 16}">{html.escape(row["stage"])}</text>'
            f'<rect class="bar" x="120" y="{y + 2}" width="{width:.1f}" height="20"/>'
            f'<text x="{128 + width:.1f}" y="{y + 16}">{row["left_bytes"] / 1e6:,.2f} MB left</text>'
        )
    height = 26 * len(bars) + 6
    yield f'<svg width="860" height="{height}" role="img" aria-label="bytes left by stage">{"".join(bars)}</svg>'
    rows = [
        (
            row["stage"],
            f"{row['dropped']:,}",
            f"{row['dropped_bytes'] / 1e6:,.2f}",
            f"{row['left']:,}",
            _reasons(row["reasons"]),
        )
        for row in report["funnel"]
    ]
    yield _table(("stage", "dropped", "MB dropped", "left", "reasons"), rows)


def _reasons(reasons: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1]))


def _scores(report: dict[str, Any]) -> Iterator[str]:
    if not report["scores"]:
        return
    yield "<h2>Scores by domain</h2><p>Tokens by bits a byte under the seed's model: kept green, dropped red.</p>"
    for domain, drawn in report["scores"].items():
        most = max(map(sum, zip(drawn["kept"], drawn["dropped"], strict=True)), default=0) or 1
        bars = []
        for place, (kept, dropped) in enumerate(zip(drawn["kept"], drawn["dropped"], strict=True)):
            low, high = 90 * kept / most, 90 * dropped / most
            bars.append(
                f'<rect class="kept" x="{10 * place}" y="{96 - low:.1f}" width="9" height="{low:.1f}"/>'
                f'<rect class="dropped" x="{10 * place}" y="{96 - low - high:.1f}" width="9" height="{high:.1f}"/>'
            )
        marks = "".join(f'<text x="{80 * bit}" y="114">{bit}</text>' for bit in range(9))
        name = html.escape(domain)
        drawing = (
            f'<svg width="660" height="118" role="img" aria-label="scores of {name}">{"".join(bars)}{marks}</svg>'
        )
        yield f"<h3>{name}</h3>{drawing}"


def _groups(report: dict[str, Any]) -> Iterator[str]:
    def number(value: Any, form: str) -> str:
        return "" if value is None else format(value, form)

    yield "<h2>Domains and languages</h2>"
    rows = [
        (
            group["group"],
            f"{group['documents']:,}",
            f"{group['tokens']:,}",
            f"{group['kept_tokens']:,}",
            f"{group['kept_tokens'] / max(1, group['tokens']):.1%}",
            number(group["quota_tokens"], ",d"),
            number(group["most_bits_per_byte"], ".3f"),
        )
        for group in report["groups"]
    ]
    yield _table(("group", "documents", "tokens", "kept", "share", "quota", "bits a byte at most"), rows)


def _samples(plan: FilterPlan, report: dict[str, Any]) -> Iterator[str]:
    """Texts at each group's threshold, on both of its sides."""
    limits = {group["group"]: group["most_bits_per_byte"] for group in report["groups"] if group["most_bits_per_byte"]}
    if not limits:
        return
    yield "<h2>At the thresholds</h2>"
    kept = _near(plan.output / "kept", limits, False)
    dropped = _near(plan.output / "dropped", limits, True)
    for group in sorted(limits):
        yield f"<h3>{html.escape(group)}, {limits[group]:.3f} bits a byte</h3>"
        for name, found in (("kept", kept), ("dropped", dropped)):
            for _, bits, where, text in sorted(found.get(group, []))[:SAMPLES]:
                yield f"<small>{name}, {bits:.3f}: {html.escape(where)}</small><pre>{html.escape(text)}</pre>"


def _near(folder: Path, limits: dict[str, float], dropped: bool) -> dict[str, list[tuple[float, float, str, str]]]:
    import pyarrow.parquet as pq

    columns = ["domain", "language", "ngram_bits_per_byte", "id", "text", *(["stage"] if dropped else [])]
    found: dict[str, list[tuple[float, float, str, str]]] = {}
    for file in sorted(folder.glob("*.parquet"))[:FILES]:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=256, columns=columns):
            for row in batch.to_pylist():
                bits = row["ngram_bits_per_byte"]
                if bits is None or (dropped and row["stage"] != "ngram"):
                    continue
                group = f"{row['domain']}/{row['language']}"
                group = group if group in limits else f"{row['domain']}/*"
                if group in limits:
                    best = found.setdefault(group, [])
                    best.append((abs(bits - limits[group]), bits, row["id"], row["text"][:EXCERPT]))
                    best.sort()
                    del best[SAMPLES:]
    return found


def _unreadable(report: dict[str, Any]) -> Iterator[str]:
    if report["unreadable"]["count"]:
        yield "<h2>Not read</h2>"
        rows = [
            (str(file), "" if row is None else f"{row:,}", reason)
            for file, row, reason in report["unreadable"]["first"]
        ]
        yield _table(("file", "row", "why"), rows)


def _cost(plan: FilterPlan, report: dict[str, Any]) -> Iterator[str]:
    """Rates of this run, and what 12T tokens would take at them if each stage kept as much as here."""
    from .steps import rates

    measured = rates(plan)
    if not measured:
        return
    read = report["funnel"][0]["left_bytes"] + report["funnel"][0]["dropped_bytes"] if report["funnel"] else 0
    unique = report["funnel"][0]["left_bytes"] if report["funnel"] else 0
    kept_twice = min(1.0, 2 * report["kept_share"])
    share = {"exact": 1.0, "measure": unique / max(1, read), "model": kept_twice, "write": 1.0}
    yield "<h2>Rates, and 12T tokens</h2>"
    rows, total = [], 0.0
    for stage, rate in measured.items():
        hours = ARTICLE_BYTES * share.get(stage, 1.0) / rate / 3600
        total += hours
        rows.append((stage, f"{rate / 1e6:.1f}", f"{rate / 4 * 3600 / 1e6:,.0f}", f"{hours:,.0f}"))
    yield _table(("stage", "MB/s a core", "M tokens an hour and core", "core-hours for 12T tokens"), rows)
    yield f"<p>Together {total:,.0f} core-hours, by this run of {read / 1e6:,.1f} MB; near pairs are extra.</p>"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    cells = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    cells += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return f"<table>{''.join(cells)}</table>"

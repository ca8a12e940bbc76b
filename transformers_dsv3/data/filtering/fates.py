"""What becomes of each document, from what the stages have found: near duplicates, quotas, thresholds, counts."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np

from ...files import write_json
from .plan import STAGES, FilterPlan, load_table, save_table
from .seed import Seed
from .selection import LEVELS_A_BIT, Histogram, best_of_clusters, levels, quotas, thresholds


# Fewer documents of a domain's language have no quota of their own
LEAST_DOCUMENTS = 30
# Times the budget that a model chooses among
WIDER = 2.0
SUMMARY = "summary.json"
BINS = 64


def decide(plan: FilterPlan, before_model: bool = False) -> None:
    """Write each shard's fates, and their summary last.

    Args:
        before_model: write what the model is to score instead.
    """
    if not before_model and plan.path("fates", SUMMARY).exists():
        return
    by_model = "model" in plan.settings.stages and not before_model
    losers = near_duplicates(plan)
    merged, all_tokens = _merged_groups(plan, losers)
    wider = "model" in plan.settings.stages
    limits, wanted = _limits(plan, losers, merged, WIDER * all_tokens if wider else all_tokens, False)
    model_limits: dict[str, int] = {}
    if by_model:
        model_limits, wanted = _limits(plan, losers, merged, all_tokens, True)
    summary = _Summary(plan, merged)
    for shard in range(len(plan.shards)):
        told, table = load_table(plan.path("measured", f"{shard:05d}.npz"))
        lost = losers.get(shard, {})
        left, number = _left(table, lost), table["reason"].copy()
        reasons = [list(reason) for reason in told["reasons"]]
        number[(table["reason"] == 0) & ~left] = _number(reasons, "near", "near duplicate")
        _drop_past(limits, told, table["group"], table["bits"], left, number, reasons, merged, "ngram")
        if before_model:
            save_table(plan.path("candidates", f"{shard:05d}.npz"), {}, place=table["place"][left])
            continue
        model_bits: np.ndarray = np.full(len(left), np.nan)
        if by_model:
            model_bits = _model_bits(plan, shard, table)
            _drop_past(model_limits, told, table["group"], model_bits, left, number, reasons, merged, "model")
        arrays = {name: table[name] for name in ("place", "tokens", "group")}
        arrays |= {"reason": number, "ngram_bits_per_byte": table["bits"], "model_bits_per_byte": model_bits}
        details = dict(told["details"]) | {str(place): f"{of[0]}/{of[1]}" for place, of in lost.items()}
        fates = {"groups": told["groups"], "reasons": reasons, "details": details}
        save_table(plan.path("fates", f"{shard:05d}.npz"), fates, **arrays)
        summary.add(fates, arrays, table["bytes"])
    if not before_model:
        write_json(plan.path("fates", SUMMARY), summary.told(all_tokens, wanted, limits, model_limits))


def _merged_groups(plan: FilterPlan, losers: dict[int, Any]) -> tuple[dict[str, str], int]:
    """What each domain's language is counted as, itself or `DOMAIN/*`, and the tokens after exact deduplication."""
    documents: Counter[str] = Counter()
    all_tokens = 0
    for shard in range(len(plan.shards)):
        told, table = load_table(plan.path("measured", f"{shard:05d}.npz"))
        all_tokens += int(table["tokens"].sum())
        counts = np.bincount(table["group"][_left(table, losers.get(shard, {}))], minlength=len(told["groups"]))
        documents.update(dict(zip(told["groups"], counts.tolist(), strict=True)))
    small = {group for group, count in documents.items() if count < LEAST_DOCUMENTS}
    return {group: f"{group.rpartition('/')[0]}/*" if group in small else group for group in documents}, all_tokens


def _drop_past(
    limits: dict[str, int],
    told: dict[str, Any],
    groups: np.ndarray,
    bits: np.ndarray,
    left: np.ndarray,
    number: np.ndarray,
    reasons: list[list[str]],
    merged: dict[str, str],
    stage: str,
) -> None:
    """Drop what is left and past its group's threshold: `left` and `number` are changed."""
    if limits:
        limit = np.array([limits.get(merged[group], -1) for group in told["groups"]] or [-1])
        past = left & (levels(bits) > limit[groups])
        number[past] = _number(reasons, stage, "score past the threshold")
        left &= ~past


def _limits(
    plan: FilterPlan, losers: dict[int, Any], merged: dict[str, str], of_tokens: float, by_model: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Each group's last score that is kept, and its quota of tokens; both empty where everything is kept."""
    if plan.settings.keep is None:
        return {}, {}
    histogram = Histogram()
    for shard in range(len(plan.shards)):
        told, table = load_table(plan.path("measured", f"{shard:05d}.npz"))
        bits = _model_bits(plan, shard, table) if by_model else table["bits"]
        left = _left(table, losers.get(shard, {})) & ~np.isnan(bits)
        for number, group in enumerate(told["groups"]):
            of = left & (table["group"] == number)
            if of.any():
                histogram.add(merged[group], levels(bits[of]), table["tokens"][of])
    wanted = _quotas(plan, histogram.totals(), round(plan.settings.keep * of_tokens))
    return thresholds(histogram, wanted), wanted


def _quotas(plan: FilterPlan, available: dict[str, int], budget: int) -> dict[str, int]:
    shares: dict[str, float] = {group: float(tokens) for group, tokens in available.items()}
    if plan.settings.shares == "seed":
        of_domain: Counter[str] = Counter()
        for group, tokens in available.items():
            of_domain[group.rpartition("/")[0]] += tokens
        seed = Seed.load(plan.path("seed", "")).shares
        for group, tokens in available.items():
            domain = group.rpartition("/")[0]
            shares[group] = seed.get(domain, 0.0) * tokens / of_domain[domain]
    return quotas(available, budget, shares)


def near_duplicates(plan: FilterPlan) -> dict[int, dict[int, tuple[int, int]]]:
    """By shard and place, what was kept in the place of a near duplicate: the best scored of its cluster."""
    if "near" not in plan.settings.stages:
        return {}
    members = []
    for shard in range(len(plan.shards)):
        path = plan.path("clusters", f"{shard:06d}.clusters")
        told, table = load_table(plan.path("measured", f"{shard:05d}.npz"))
        signed = np.flatnonzero(table["reason"] == 0)  # the documents that had a signature, in their order
        rows = np.fromfile(path, dtype="<u4").reshape(-1, 2) if path.exists() else np.zeros((0, 2), dtype="<u4")
        at = signed[rows[:, 0]]
        # Without scores the longest is the best
        bits = table["bits"][at]
        members.append((rows[:, 1], np.where(np.isnan(bits), -table["bytes"][at], bits), table["place"][at]))
    best = best_of_clusters(members)
    losers: dict[int, dict[int, tuple[int, int]]] = {}
    for shard, (numbers, _, places) in enumerate(members):
        for number, place in zip(numbers.tolist(), places.tolist(), strict=True):
            of = (int(best[number][0]), int(best[number][1]))
            if of != (shard, place):
                losers.setdefault(shard, {})[place] = of
    return losers


def _left(table: dict[str, np.ndarray], lost: dict[int, Any]) -> np.ndarray:
    """Which documents neither the cheap stages nor the near duplicates have dropped."""
    return (table["reason"] == 0) & ~np.isin(table["place"], np.array(list(lost), dtype=np.int64))


def _model_bits(plan: FilterPlan, shard: int, table: dict[str, np.ndarray]) -> np.ndarray:
    found = load_table(plan.path("scored", f"{shard:05d}.npz"))[1]
    bits = np.full(len(table["place"]), np.nan)
    bits[np.searchsorted(table["place"], found["place"])] = found["bits"]
    return bits


def _number(reasons: list[list[str]], stage: str, reason: str) -> int:
    if [stage, reason] not in reasons:
        reasons.append([stage, reason])
    return reasons.index([stage, reason])


class _Summary:
    """Counts of all shards, by stage and reason and by group."""

    def __init__(self, plan: FilterPlan, merged: dict[str, str]):
        self.plan, self.merged = plan, merged
        self.documents: Counter[tuple[str, str]] = Counter()
        self.tokens: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.of_group: dict[str, Counter[str]] = {}
        self.scores: dict[str, np.ndarray] = {}

    def add(self, fates: dict[str, Any], table: dict[str, np.ndarray], sizes: np.ndarray) -> None:
        for number, reason in enumerate(map(tuple, fates["reasons"])):
            of = table["reason"] == number
            self.documents[reason] += int(of.sum())
            self.tokens[reason] += int(table["tokens"][of].sum())
            self.bytes[reason] += int(sizes[of].sum())
        kept = table["reason"] == 0
        scored = ~np.isnan(table["ngram_bits_per_byte"])
        for number, name in enumerate(fates["groups"]):
            group = self.merged[name]
            of = table["group"] == number
            counts = self.of_group.setdefault(group, Counter())
            counts["documents"] += int(of.sum())
            counts["tokens"] += int(table["tokens"][of].sum())
            counts["kept_documents"] += int((of & kept).sum())
            counts["kept_tokens"] += int(table["tokens"][of & kept].sum())
            domain = group.rpartition("/")[0]
            drawn = self.scores.setdefault(domain, np.zeros((2, BINS), dtype=np.int64))
            for row, which in enumerate((of & scored & kept, of & scored & ~kept)):
                bins = np.clip(table["ngram_bits_per_byte"][which] * BINS / 8, 0, BINS - 1).astype(int)
                drawn[row] += np.bincount(bins, weights=table["tokens"][which], minlength=BINS).astype(np.int64)

    def told(
        self, all_tokens: int, wanted: dict[str, int], limits: dict[str, int], model_limits: dict[str, int]
    ) -> dict[str, Any]:
        found = [load_table(self.plan.path("exact", f"{shard:05d}.npz")) for shard in range(len(self.plan.shards))]
        skipped = [place for told, _ in found for place in told["skipped"]]
        read, repeated = sum(len(arrays["rows"]) for _, arrays in found), 0
        for path in sorted(self.plan.path("duplicates", "").glob("*.npz")):
            repeated += len(load_table(path)[1]["rows"])
        rows, left, size = [], read, sum(told["bytes"] for told, _ in found)
        for stage in STAGES:
            if stage not in self.plan.settings.stages and not any(of == stage for of, _ in self.documents):
                continue
            reasons = {
                reason: count for (of, reason), count in sorted(self.documents.items()) if of == stage and count
            }
            tokens = sum(count for (of, _), count in self.tokens.items() if of == stage)
            dropped = sum(reasons.values())
            dropped_bytes = sum(count for (of, _), count in self.bytes.items() if of == stage)
            if stage == "exact":
                reasons, dropped = ({"exact duplicate": repeated} if repeated else {}), repeated
                dropped_bytes = size - sum(self.bytes.values())
                tokens = -(-dropped_bytes // 4)
            left, size = left - dropped, size - dropped_bytes
            rows.append(
                {
                    "stage": stage,
                    "dropped": dropped,
                    "dropped_tokens": tokens,
                    "dropped_bytes": dropped_bytes,
                    "left": left,
                    "left_bytes": size,
                    "reasons": reasons,
                }
            )
        kept_tokens = self.tokens["", ""]
        return {
            "read": read,
            "unreadable": {"count": len(skipped), "first": skipped[:100]},
            "unreadable_reasons": dict(
                sorted(Counter(reason.split(":")[0].split(" behind ")[0] for *_, reason in skipped).items())
            ),
            "tokens": all_tokens,
            "kept": self.documents["", ""],
            "kept_tokens": kept_tokens,
            "kept_share": kept_tokens / max(1, all_tokens),
            "funnel": rows,
            "groups": [
                {
                    "group": group,
                    **{name: counts[name] for name in ("documents", "tokens", "kept_documents", "kept_tokens")},
                    "quota_tokens": wanted.get(group),
                    "most_bits_per_byte": limits[group] / LEVELS_A_BIT if limits.get(group, -1) >= 0 else None,
                    "most_model_bits_per_byte": (
                        model_limits[group] / LEVELS_A_BIT if model_limits.get(group, -1) >= 0 else None
                    ),
                }
                for group, counts in sorted(self.of_group.items())
            ],
            "scores": {
                domain: {"kept": both[0].tolist(), "dropped": both[1].tolist()}
                for domain, both in sorted(self.scores.items())
            },
        }


def summary_of(plan: FilterPlan) -> dict[str, Any]:
    return dict(json.loads(plan.path("fates", SUMMARY).read_text(encoding="utf-8")))

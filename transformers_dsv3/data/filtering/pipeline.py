"""Filtering from end to end: the stages in their order, each where the one before it has ended."""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...files import write_json, write_refusal
from ...option_error import OptionError
from ..text_mixture import MIXTURE_FILE
from .executors import Executor, named_executor
from .fates import decide, summary_of
from .inputs import SHARD_BYTES, check_columns, find_files
from .outputs import kept_pattern
from .plan import FilterPlan, FilterSettings
from .seed import Seed, learn_seed, read_seed


REPORT = "report.json"
# Bytes of input for which one task finds the exact duplicates: it holds 32 bytes a document
DUPLICATES_BYTES = 16 << 30


def filter_text(
    paths: Sequence[str | Path],
    output: str | Path,
    settings: FilterSettings | None = None,
    *,
    seed_text: Sequence[str | Path] = (),
    decontaminate: Sequence[str] = (),
    workers: int = 1,
    executor: Executor | str = "local",
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Filter text into `output/kept` and `output/dropped`, Parquet files with the text unchanged.

    Killed at any moment, the same call goes on, and ends at the same bytes.

    Args:
        paths: JSONL, Parquet and text files, and folders of them.
        settings: what is kept. Without, all that no stage drops.
        seed_text: a little clean text, in a folder for each domain or with a column for it.
        decontaminate: evaluation sets whose text is not to be kept: `humaneval`, `lm-eval:TASK`, files.
        workers: processes.
        executor: `local`, `ray`, or a function that runs steps of datatrove's: it is given them, the number of tasks
            and a folder for logs, and returns when all tasks have ended.
        shard_bytes: of the input, what one task reads, whole files.
        progress: told of each stage when it begins.

    Returns:
        The report, which is also `output/report.json`.

    Raises:
        OptionError: naming the command-line option at fault, before anything is written.
    """
    import pyarrow  # noqa: F401  before anything is written, what is missing
    from loguru import logger

    settings = settings or FilterSettings()
    say = progress or (lambda _: None)
    output = Path(output).expanduser().absolute()
    settings.check(bool(seed_text), bool(decontaminate))
    if workers < 1:
        raise OptionError("--workers", f"is at least 1, not {workers}")
    files = find_files(paths)
    if any(Path(file.path).is_relative_to(output) for file in files):
        raise OptionError("--output", f"{output} is within the input")
    check_columns(files, settings.columns)
    output.parent.mkdir(parents=True, exist_ok=True)
    if refusal := write_refusal(output.parent):
        raise OptionError("--output", refusal)
    seed_paths = tuple(str(Path(path).expanduser().absolute()) for path in seed_text)
    plan = FilterPlan.make(output, settings, files, seed_paths, tuple(decontaminate), shard_bytes)
    texts = read_seed(seed_text, settings.columns) if seed_text else {}
    plan.start()
    if (output / REPORT).exists():
        return dict(json.loads((output / REPORT).read_text(encoding="utf-8")))

    logger.disable("datatrove")  # which logs every step of every task; what fails raises
    run = executor if callable(executor) else named_executor(executor, workers)
    contaminated = _prepare(plan, texts, say)
    _run_stages(plan, run, say)
    report = _report(plan, contaminated)
    say("writing the report")
    from .report import write_page

    write_page(plan, report)
    write_json(output / MIXTURE_FILE, _mixture(plan, report))
    write_json(output / REPORT, report)
    return report


def _prepare(plan: FilterPlan, texts: dict[str, list[str]], say: Callable[[str], None]) -> int:
    """Index the evaluation sets and learn from the seed, less what of the former is in it: so many documents."""
    from .decontamination import contamination_filter, write_index
    from .steps import Words

    contaminated = 0
    if "contamination" in plan.settings.stages:
        from datatrove.data import Document

        folder = plan.path("contamination", "")
        if not (folder / "index.json").exists():
            say("indexing the evaluation sets")
            write_index(folder, plan.evaluation, Words("any"))
        found = contamination_filter(folder, Words("any"))
        for domain, documents in texts.items():
            clean = [text for text in documents if found.filter(Document(text, "")) is True]
            contaminated += len(documents) - len(clean)
            texts[domain] = clean
        texts = {domain: documents for domain, documents in texts.items() if documents}
    if texts and not (plan.path("seed", "") / "seed.json").exists():
        say("learning from the seed")
        learn_seed(texts).save(plan.path("seed", ""))
    return contaminated


def _run_stages(plan: FilterPlan, run: Executor, say: Callable[[str], None]) -> None:
    from datatrove.pipeline.dedup.minhash import MinhashDedupBuckets, MinhashDedupCluster

    from .steps import (
        MINHASH,
        FindExactDuplicates,
        HashDocuments,
        InputReader,
        Measure,
        ScoreByModel,
        WriteShards,
        signatures,
    )

    stages, count = plan.settings.stages, len(plan.shards)
    reader = InputReader(plan.shards, plan.settings.columns)

    def logs(name: str) -> str:
        return str(plan.path("logs", name))

    size = sum(file.size for files in plan.shards for file in files)
    say(f"hashing {size / 1e6:,.1f} MB in {count:,} shards")
    run([HashDocuments(plan)], count, logs("hash"))
    if "exact" in stages:
        run([FindExactDuplicates(plan)], 1 + size // DUPLICATES_BYTES, logs("duplicates"))
    say(", ".join(stage for stage in stages if stage in ("entropy", "statistics", "contamination", "near", "ngram")))
    run([reader, Measure(plan), *([signatures(plan)] if "near" in stages else [])], count, logs("measure"))
    if "near" in stages:
        say("near duplicates")
        pairs, clusters = str(plan.path("pairs", "")), str(plan.path("clusters", ""))
        found = MinhashDedupBuckets(str(plan.path("signatures", "")), pairs, config=MINHASH)
        run([found], MINHASH.num_buckets, logs("pairs"))
        with contextlib.redirect_stderr(io.StringIO()):  # a bar of its own
            run([MinhashDedupCluster(pairs, clusters, config=MINHASH, save_cluster_id=True)], 1, logs("clusters"))
    if "model" in stages:
        say("choosing what the model scores")
        decide(plan, before_model=True)
        say("scoring by the model")
        run([reader, ScoreByModel(plan)], count, logs("model"))
    say("choosing what is kept")
    decide(plan)
    say("writing")
    run([reader, WriteShards(plan)], count, logs("write"))


def _report(plan: FilterPlan, contaminated: int) -> dict[str, Any]:
    told = summary_of(plan)
    seed = None
    if plan.seed:
        learnt = Seed.load(plan.path("seed", ""))
        seed = {"shares": learnt.shares, "quantiles": learnt.quantiles, "contaminated": contaminated}
    settings = {name: value for name, value in plan.told().items() if name not in ("input", "seed", "evaluation")}
    report = {"record": "transformers-dsv3 filter", "version": 1, "settings": settings, "seed": seed, **told}
    return dict(json.loads(json.dumps(report)))  # as it is read again


def _mixture(plan: FilterPlan, report: dict[str, Any]) -> dict[str, Any]:
    """A mixture file of what was kept, in the shares that it has; domains of a single document are left out."""
    tokens: Counter[str] = Counter()
    documents: Counter[str] = Counter()
    for group in report["groups"]:
        domain = group["group"].rpartition("/")[0]
        tokens[domain] += group["kept_tokens"]
        documents[domain] += group["kept_documents"]
    domains = [domain for domain in tokens if documents[domain] > 1 and tokens[domain]]
    total = sum(tokens[domain] for domain in domains)
    shares = {domain: round(tokens[domain] / total, 6) for domain in domains}
    if shares:
        largest = max(shares, key=lambda domain: shares[domain])
        shares[largest] = round(shares[largest] + 1 - sum(shares.values()), 6)
    return {
        "weights": shares,
        "domains": {
            domain: {
                "dataset": f"./{kept_pattern(domain)}",
                "tokens": tokens[domain],
                "eval_documents": min(200, max(1, documents[domain] // 20)),
            }
            for domain in domains
        },
        "filter": {
            "kept_tokens": report["kept_tokens"],
            "share_of_tokens": report["kept_share"],
            **{f"dropped by {row['stage']}": row["dropped_tokens"] for row in report["funnel"]},
        },
    }

"""The metadata of a model card, as the Hub indexes them: what is on the card, in its own fields and identifiers."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..evaluation.evaluation_record import EvaluationRecord
from ..evaluation.evaluation_table import outer_tasks
from .card_sources import CardSources
from .card_usage import auto_class
from .model_folder import REPO_ID


# https://huggingface.co/docs/hub/repositories-licenses, in August 2026
LICENSES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
    eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community h-research
    intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit
    mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openmdw-1.1 openrail openrail++ osl-3.0 other pddl postgresql
    unknown unlicense wtfpl zlib
    """.split()
)
_LICENSE_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")
_LANGUAGE = re.compile(r"[a-z]{2,3}")
# Identifiers of the Hub's data sets; data of one's own get the like
_NOT_IN_IDENTIFIERS = re.compile(r"[^\w.]+", re.ASCII)
_HUMAN_EVAL = "openai/openai_humaneval"


def check_options(options: dict[str, Any]) -> None:
    """Refuse what the Hub would refuse of the metadata that a user gives.

    Raises:
        ValueError: naming the option.
    """
    license, license_name, link = (options.get(name) for name in ("license", "license_name", "license_link"))
    if (license_name is not None or link is not None) and license != "other":
        raise ValueError("license_name and license_link go with license 'other'")
    if license == "other" and (license_name is None or link is None):
        raise ValueError("license 'other' needs license_name and license_link")
    if license_name is not None and not _LICENSE_NAME.fullmatch(license_name):
        raise ValueError(f"license_name {license_name!r} is not of lower-case letters, digits, '.' and '-'")
    for language in options.get("language") or ():
        if not _LANGUAGE.fullmatch(language) and language not in ("code", "multilingual"):
            raise ValueError(
                f"language {language!r} is no code of two or three letters (ISO 639), nor 'code' or 'multilingual'"
            )
    base = options.get("base_model")
    if base is not None and not REPO_ID.fullmatch(base):
        raise ValueError(f"base_model {base!r} is no name on the Hub (namespace/name)")
    if license is not None and license not in LICENSES:
        near = difflib.get_close_matches(license, LICENSES, 1)
        meant = f", perhaps {near[0]!r}" if near else ""
        raise ValueError(
            f"license {license!r} is none of the Hub's identifiers{meant}: others are 'other', with a name and a link"
        )


def metadata(sources: CardSources, name: str, options: dict[str, Any]) -> ModelCardData:
    """The card's metadata.

    Args:
        name: of the model, without its namespace.
        options: what only a user can know: `license`, `license_name`, `license_link`, `base_model`, `language`.
    """
    results = [*_run_results(sources), *(r for record in sources.evaluations.values() for r in _results(record))]
    base = options.get("base_model") or sources.base_name
    return ModelCardData(
        library_name="transformers" if sources.adapter is None else "peft",
        license=options.get("license"),
        license_name=options.get("license_name"),
        license_link=options.get("license_link"),
        language=options.get("language"),
        pipeline_tag=auto_class(sources.architecture)[1],
        # Of a folder here, the Hub knows nothing
        base_model=base if base is not None and REPO_ID.fullmatch(base) else None,
        tags=list(_tags(sources)),
        model_name=name if results else None,
        eval_results=results or None,
    )


def _tags(sources: CardSources) -> Iterator[str]:
    yield from ("deepseek_v3", "transformers-dsv3")
    if sources.config is not None and sources.config.moe_layers:
        yield "mixture-of-experts"
    if sources.config is not None and sources.config.num_nextn_predict_layers and sources.adapter is None:
        yield "multi-token-prediction"
    if sources.training is not None:
        yield _identifier(sources.training["method"]).lower()


def _identifier(text: str) -> str:
    """Words up to the first comma as one, as identifiers on the Hub are written."""
    return _NOT_IN_IDENTIFIERS.sub("-", text.partition(",")[0]).strip("-") or "unnamed"


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _run_results(sources: CardSources) -> Iterator[EvalResult]:
    """What the training run measured."""
    for entry in [] if sources.training is None else sources.training["results"]:
        if (value := _number(entry["after"])) is not None:
            yield EvalResult(
                task_type="text-generation",
                dataset_type=_identifier(entry["data"]),
                dataset_name=entry["data"],
                metric_type=entry["metric"],
                metric_value=value,
                metric_name=entry["metric"].replace("_", " "),
            )


def _results(record: EvaluationRecord) -> Iterator[EvalResult]:
    if (text := record.text) is not None:
        for metric in ("bits_per_byte", "perplexity"):
            if (value := _number(text[metric])) is not None:
                yield EvalResult(
                    task_type="text-generation",
                    dataset_type=_identifier(text["source"]),
                    dataset_name=text["source"],
                    metric_type=metric,
                    metric_value=value,
                    metric_name="bits per byte" if metric == "bits_per_byte" else "perplexity of a token",
                )
    for name, task in outer_tasks(record).items():
        for metric, figure in task["metrics"].items():
            if (value := _number(figure["value"])) is not None:
                data = _task_data(name, task)
                yield EvalResult(
                    task_type="text-generation",
                    dataset_type=data,
                    dataset_name=data,
                    metric_type=metric.partition(",")[0],
                    metric_value=value,
                    metric_name=f"{name}: {metric.removesuffix(',none')}, {task['num_fewshot']} examples",
                )
    for k, figure in (record.human_eval or {}).get("pass@k", {}).items():
        yield EvalResult(
            task_type="text-generation",
            dataset_type=_HUMAN_EVAL,
            dataset_name="HumanEval",
            metric_type=f"pass@{k}",
            metric_value=figure["value"],
            metric_name=f"pass@{k}",
        )


def _task_data(name: str, task: dict[str, Any]) -> str:
    """The data set's name on the Hub; the task's own name where there is none, or several."""
    data = task["dataset"] or ""
    return data if REPO_ID.fullmatch(data) else _identifier(name)

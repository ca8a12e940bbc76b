"""What the Hub checks of a model card's metadata, by its published rules (huggingface/hub-docs: modelcard.md and
docs/hub/repositories-licenses.md, August 2026; the patterns are those of its error messages)."""

import re

import yaml


LICENSES = set(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0
    cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0
    cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl
    gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr
    mpl-2.0 odc-by odbl openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl
    lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    grok2-community gemma unknown other
    """.split()
)
DATA_SET = r"(?:[\w-]+/)?[\w.-]+"
MODEL = r"\w[\w.-]*/\w[\w.-]*"
LANGUAGE = r"[a-z]{2,3}|code|multilingual"
LISTS = ("tags", "datasets", "metrics")


def metadata_errors(content):
    """One sentence for each thing that the Hub would refuse in a card; None where it has no metadata at all."""
    found = re.match(r"---\r?\n(.*?)\r?\n---(\r?\n|$)", content, flags=re.DOTALL)
    if found is None:
        return None
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [f"bad YAML: {error}"]
    if not isinstance(data, dict):
        return ["metadata must be an object"]
    return list(_errors(data))


def _errors(data):
    licenses = data.get("license")
    for license in licenses if isinstance(licenses, list) else [licenses]:
        if license is not None and license not in LICENSES:
            yield f'"license" must be one of the identifiers, not {license!r}'
    if licenses == "other" and not data.get("license_name"):
        yield '"license_name" is required'
    if (name := data.get("license_name")) is not None and not re.fullmatch(r"[a-z0-9.-]+", str(name)):
        yield f'"license_name" with value {name!r} fails to match the required pattern'
    if (link := data.get("license_link")) is not None and not re.fullmatch(r"LICENSE(\.md)?|https?://.+", str(link)):
        yield f'"license_link" must be LICENSE or an address, not {link!r}'
    for field in ("library_name", "pipeline_tag"):
        if field in data and not isinstance(data[field], str):
            yield f'"{field}" must be a string'
    for field in LISTS:
        values = data.get(field, [])
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            yield f'"{field}" must be an array of strings'
    for field, pattern in (("base_model", MODEL), ("datasets", DATA_SET), ("language", LANGUAGE)):
        values = data.get(field, [])
        for value in values if isinstance(values, list) else [values]:
            if not re.fullmatch(pattern, str(value)):
                yield f'"{field}" with value {value!r} is not valid'
    for number, model in enumerate(data.get("model-index", [])):
        yield from _index_errors(f"model-index[{number}]", model)


def _index_errors(place, model):
    if not isinstance(model.get("name"), str):
        yield f'"{place}.name" is required'
    if not isinstance(model.get("results"), list):
        yield f'"{place}.results" must be an array'
        return
    for number, result in enumerate(model["results"]):
        at = f"{place}.results[{number}]"
        for part, names in (("task", ["type"]), ("dataset", ["type", "name"])):
            for name in names:
                if not isinstance((result.get(part) or {}).get(name), str):
                    yield f'"{at}.{part}.{name}" is required'
        if not re.fullmatch(DATA_SET, str((result.get("dataset") or {}).get("type"))):
            yield f'"{at}.dataset.type" fails to match the required pattern'
        if not result.get("metrics"):
            yield f'"{at}.metrics" is required'
        for index, metric in enumerate(result.get("metrics") or []):
            if not isinstance(metric.get("type"), str):
                yield f'"{at}.metrics[{index}].type" is required'
            # The Hub takes text too, and shows it; leaderboards need numbers
            if not isinstance(metric.get("value"), (int, float)) or isinstance(metric.get("value"), bool):
                yield f'"{at}.metrics[{index}].value" must be a number'

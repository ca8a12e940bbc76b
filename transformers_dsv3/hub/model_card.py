"""Model cards made from what a checkpoint's files and records tell. Nothing that a record knows is typed by hand.

A card is the README.md of a repository. It carries a line, which is not shown, by which it is told from a card that
somebody has written: the options that it was made with, and a digest of the rest. It has no date and no path, so that
the same records give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..evaluation.checkpoint_folder import ADAPTER_CONFIG, CONFIG
from ..evaluation.shareable import shareable_text
from ..evaluation.training_record import TRAINING_RECORD
from ..files import write_refusal, write_whole
from ..training.run_folder import is_template
from .card_figures import FOLDER, CardFigure, card_figures, drawn_from
from .card_metadata import check_options, metadata
from .card_sections import evaluation_section, introduction, model_section, training_section
from .card_sources import CardSources, read_sources
from .card_usage import license_section, limits_section, usage_section
from .markdown import plain
from .model_folder import CARD


_SEAL = re.compile(r"<!-- transformers-dsv3 card (\{.*\}) ([0-9a-f]{16}) -->")
_UNSEALED = "0" * 16


class CardError(ValueError):
    """A card that cannot be written as asked. The message names the file or the option."""


class CheckpointCard(ModelCard):
    """A `huggingface_hub.ModelCard` with the pictures that it shows and the records that it was made from.

    Attributes:
        figures: contents of PNG files by name.
        records: contents of JSON files by name, from which the same card is made again without the weights.
        remarks: what a person may want to know of how it came out, a sentence each.
    """

    def __init__(self, content: str, ignore_metadata_errors: bool = False):
        super().__init__(content, ignore_metadata_errors)
        self.figures: dict[str, bytes] = {}
        self.records: dict[str, bytes] = {}
        self.remarks: list[str] = []

    def save(self, filepath: Path | str) -> None:
        """Write the card, its pictures below `figures/` and its records beside it, the card last.

        Beside weights, their own configuration stays as it is.
        """
        folder = Path(filepath).parent
        (folder / FOLDER if self.figures else folder).mkdir(parents=True, exist_ok=True)
        beside_weights = _has_weights(folder)
        for name, data in self.records.items():
            if not (beside_weights and name in (CONFIG, ADAPTER_CONFIG)):
                write_whole(folder / name, data)
        for name, data in self.figures.items():
            write_whole(folder / FOLDER / name, data)
        for path in (folder / FOLDER).glob("*.png"):
            if path.name not in self.figures and drawn_from(path.read_bytes()) is not None:
                path.unlink()  # of a card that had more to show
        write_whole(Path(filepath), str(self).encode())


def model_card(
    folder: str | Path,
    results: str | Path | Iterable[str | Path] = (),
    *,
    name: str | None = None,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    base_model: str | None = None,
    language: Sequence[str] | None = None,
) -> CheckpointCard:
    """Make the card of a checkpoint or an adapter from its files and records. Asks nothing of the Hub.

    Args:
        folder: a checkpoint or an adapter; `training_record.json` and records of evaluations in it are used. Or the
            folder of a card without weights, where `checkpoint_record.json` stands for them.
        results: a record of `transformers-dsv3 evaluate` or a folder with some, or several of these.
        name: what the model is called, or its name on the Hub (`namespace/name`); the folder's name if `None`.
        license: an identifier of the Hub; not stated if `None`. "other" goes with `license_name` and `license_link`.
        base_model: name on the Hub of what the model was trained from.
        language: codes of ISO 639, or `code`.

        Options that are `None` are taken from a card of this function in the folder, where there is one.

    Returns:
        The card. `save(path)` writes it with its pictures (with matplotlib, extra `plot`) and records;
        `push_to_hub(model, repo_id, card=card)` publishes it with a model.

    Raises:
        CheckpointError: the folder is no checkpoint, or a broken one.
        RecordError: a record that is broken, not complete, or of another model, whose digest is named.
        CardError: an option that the Hub would refuse.
    """
    folder = Path(folder).expanduser()
    given = {
        "name": name,
        "license": license,
        "license_name": license_name,
        "license_link": license_link,
        "base_model": base_model,
        "language": None if language is None else list(language),
    }
    options = card_options(folder / CARD, given)
    try:
        check_options(options)
    except ValueError as error:
        raise CardError(str(error)) from None
    sources = read_sources(folder, results)
    card, missing = _render(sources, options, folder)
    card.remarks = []
    if missing:
        names = ", ".join(f"{FOLDER}/{figure.name}" for figure in missing)
        card.remarks.append(f"{names}: not drawn without matplotlib (pip install 'transformers-dsv3[plot]')")
    if options.get("license") is None:
        card.remarks.append("the licence is not stated: say it with --license (license=)")
    if sources.training is None:
        card.remarks.append(f"there is no {TRAINING_RECORD}: the card knows nothing of the training")
    if not sources.evaluations:
        card.remarks.append(
            f"there is no record of an evaluation: `transformers-dsv3 evaluate {folder}` writes evaluation.json, for "
            "--results (results=)"
        )
    return card


def write_card(
    folder: str | Path,
    results: str | Path | Iterable[str | Path] = (),
    *,
    output: str | Path | None = None,
    force: bool = False,
    **options: Any,
) -> tuple[CheckpointCard, Path]:
    """Make a card and write it, with its pictures and records, into the folder or another one.

    Args:
        folder, results, options: see [`model_card`].
        output: a folder without weights, made if needed; `folder` itself if `None`.
        force: write over a README.md that somebody has written or changed.

    Returns:
        The card and its path.

    Raises:
        CardError: beside what `model_card` raises, where the card cannot or must not be written there.
    """
    folder = Path(folder).expanduser()
    target = folder if output is None else Path(output).expanduser()
    if (refusal := target_refusal(folder, target, force)) is not None:
        raise CardError(refusal)
    if target != folder and not (folder / CARD).is_file():
        options = card_options(target / CARD, options)
    card = model_card(folder, results, **options)
    card.save(target / CARD)
    return card, target / CARD


def target_refusal(folder: Path, target: Path, force: bool) -> str | None:
    """Why no card of `folder` is to be written into `target`, in a line; None where one is."""
    there = target / CARD
    if not folder.is_dir():
        return None  # which is said in better words when it is read
    if target.exists() and not target.is_dir():
        return f"{target} is a file, not a folder"
    written = there.read_text(encoding="utf-8", errors="replace") if there.is_file() else None
    if written is not None and not force and not is_template(written) and unsealed(written) is None:
        how = "was changed by hand since" if _SEAL.search(written) else "was not written by this command"
        return f"{there} {how}: --force (force=True) writes over it"
    existing = target
    while not existing.exists():
        existing = existing.parent
    if (refusal := write_refusal(existing)) is not None:
        return refusal
    if target.resolve() == folder.resolve() or not target.is_dir():
        return None
    if _has_weights(target):
        return f"{target} holds weights: a card beside other weights would be taken for theirs"
    if written is None and (target / CONFIG).exists() and not force:
        return f"{target} holds something else ({CONFIG}): --force (force=True) writes over it"
    return None


def card_options(card: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The given options, and those that are not given from the card that is there, changed by hand or not."""
    kept = _told(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    options = {key: value for key, value in given.items() if value is not None}
    if "license" in options:  # its name and link belong to another one
        kept = {key: value for key, value in (kept or {}).items() if not key.startswith("license")}
    return {key: _shareable(value) for key, value in {**(kept or {}), **options}.items()}


def seal(content: str, options: dict[str, Any]) -> str:
    """The card's content with the line that tells it from others, over the rest as it is."""
    told = json.dumps(options, sort_keys=True).replace(">", "\\u003e")
    unsealed = f"{content.rstrip()}\n\n<!-- transformers-dsv3 card {told} {_UNSEALED} -->\n"
    return unsealed.replace(f"{_UNSEALED} -->", f"{_digest(unsealed)} -->")


def unsealed(content: str) -> dict[str, Any] | None:
    """The options of a card that is as it was written; None of any other."""
    found = _SEAL.search(content)
    if found is None:
        return None
    blank = content.replace(f"{found[2]} -->", f"{_UNSEALED} -->")
    return _told(content) if _digest(blank) == found[2] else None


def _told(content: str) -> dict[str, Any] | None:
    """The options in a card's last line; None where there are none."""
    found = _SEAL.search(content)
    try:
        return None if found is None else dict(json.loads(found[1]))
    except (ValueError, TypeError):  # changed by hand
        return None


def _render(sources: CardSources, options: dict[str, Any], folder: Path) -> tuple[CheckpointCard, list[CardFigure]]:
    own_name = sources.checkpoint.checkpoint.name
    called = options.get("name") or f"./{own_name}"
    title = called.rpartition("/")[2]
    figures = card_figures(sources)
    contents = {figure.name: figure.content(folder) for figure in figures}
    shown = {figure.name: figure for figure in figures if contents[figure.name] is not None}
    base = options.get("base_model") or sources.base_name
    if sources.adapter is not None and base is not None and "/" not in base:
        base = f"./{base}"
    sections = [
        f"# {plain(title)}\n\n{introduction(sources)}\n",
        usage_section(sources, called, base),
        model_section(sources),
        training_section(sources, shown),
        evaluation_section(sources, shown),
        limits_section(sources),
        license_section(options.get("license"), options.get("license_name"), options.get("license_link")),
    ]
    header = metadata(sources, title, options).to_yaml()
    # Read and written once by the Hub's own class, so that it is written the same again
    content = str(ModelCard(f"---\n{header}\n---\n\n" + "\n".join(sections)))
    card = CheckpointCard(seal(content, options))
    card.figures = {name: data for name, data in contents.items() if data is not None}
    card.records = sources.records
    return card, [figure for figure in figures if contents[figure.name] is None]


def _shareable(value: Any) -> Any:
    return [shareable_text(text) for text in value] if isinstance(value, list) else shareable_text(str(value))


def _has_weights(folder: Path) -> bool:
    return any(path.suffix == ".safetensors" for path in folder.iterdir())


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:16]

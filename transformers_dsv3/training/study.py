"""Studies: many short runs that differ in a setting or a seed, each done once and kept in one JSON file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from ..files import write_json


class Study:
    """The runs of a JSON file, a list with an entry for each: its setting, and the figures that were measured.

    Args:
        path: written after every run, so that a study which is stopped goes on with the runs that are missing. Its
            folder is made where there is none.

    Attributes:
        entries: in the order in which the runs were done.

    Raises:
        ValueError: the file is no JSON.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.entries: list[dict[str, Any]] = []
        if self.path.exists():
            self.entries = json.loads(self.path.read_text(encoding="utf-8"))

    def result(self, setting: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The entry of a setting, which `run` measures where the file does not have it. Prints it in one line.

        Args:
            setting: the first fields of the entry, values as JSON keeps them.
            run: gives the other fields.
        """
        for entry in self.entries:
            if setting.items() <= {key: entry.get(key) for key in setting}.items():
                break
        else:
            entry = {**setting, **run()}
            self.entries.append(entry)
            write_json(self.path, self.entries)
        print(", ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in _flat(entry)), flush=True)
        return entry


def _flat(entry: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in entry.items():
        if isinstance(value, dict):
            yield from _flat(value)
        else:
            yield name, value


def best_rate(loss: Callable[[float], float], grid: Sequence[float], first: Sequence[float] | None = None) -> float:
    """The learning rate of the lowest loss, from a grid of which no more is tried than is needed.

    Args:
        loss: of a rate, for example on validation text; called once for each rate that is tried.
        grid: rates in ascending order.
        first: those of the grid to begin with; as long as the best of those tried is at their end, its neighbours are
            tried too. Default: all of the grid.
    """
    tried = {rate: loss(rate) for rate in (grid if first is None else first)}
    while True:
        best = min(tried, key=lambda rate: tried[rate])
        place = list(grid).index(best)
        missing = [rate for rate in grid[max(place - 1, 0) : place + 2] if rate not in tried]
        if not missing:
            return best
        tried.update({rate: loss(rate) for rate in missing})


def study_arguments(output_dir: str, seed: int, **options: Any) -> TrainingArguments:
    """Arguments of one run of a study: only its figures are kept, and on a CPU the seed decides every bit of them.

    Args:
        output_dir: nothing is left in it.
        seed: of the order of the data and of what is drawn while training.
        options: other fields of `TrainingArguments`.
    """
    gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=output_dir,
        save_strategy="no",
        report_to="none",
        seed=seed,
        data_seed=seed,
        full_determinism=not gpu,
        use_cpu=not gpu,
        **{"logging_steps": 50, "disable_tqdm": True, "prediction_loss_only": True, **options},
    )


def losses_of(trainer: Trainer, parts: dict[str, Any]) -> dict[str, float]:
    """The loss of the trainer's model on each of some data sets, by their names, in nats a token."""
    return {name: trainer.evaluate(part)["eval_loss"] for name, part in parts.items()}


def mean_of_seeds(values: Sequence[float]) -> str:
    """The mean, and each seed's value in brackets, with three digits behind the point."""
    return f"{statistics.mean(values):.3f} ({' / '.join(f'{value:.3f}' for value in values)})"


def plot_entries(
    path: str | Path,
    entries: Sequence[Mapping[str, Any]],
    x: tuple[str, str],
    y: Mapping[str, str],
    lines: tuple[str, Mapping[Any, str]],
    zero: str,
) -> None:
    """Draw figures of a study's entries over one field, on a logarithmic axis: a panel for each figure.

    Args:
        path: of the picture.
        entries: with the fields that are named.
        x: the field, and what it is called. Entries that have nothing there are left out.
        y: from each figure to what it is called.
        lines: a field, and what the line of each of its values is called.
        zero: what entries are called whose `x` is 0. Their mean is a dotted line across each panel.

    Raises:
        ImportError: without matplotlib (extra `plot`).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axis, (key, label) in zip(figure.subplots(1, len(y), squeeze=False)[0], y.items()):
        for value, name in lines[1].items():
            points = sorted((entry[x[0]], entry[key]) for entry in entries if entry[x[0]] and entry[lines[0]] == value)
            axis.plot([point[0] for point in points], [point[1] for point in points], marker="o", label=name)
        if without := [entry[key] for entry in entries if entry[x[0]] == 0]:
            axis.axhline(statistics.fmean(without), color="black", linestyle=":", label=zero)
        axis.set(xscale="log", xlabel=x[1], ylabel=label)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=150)

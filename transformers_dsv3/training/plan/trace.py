"""Measured steps of a pipeline, and whether the simulation would have foretold their length.

A trace is a JSON file: {"ranks": [[["0F0", start, end], ...], ...]}, by rank what it did, a stage, what (F, I, W or B)
and a microbatch, in seconds, in order. Times in which a rank waits for another belong to no action.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from ...option_error import OptionError
from .schedules import Action, Program, Span, Timeline


_NAME = re.compile(r"(\d+)([FIWB])(\d+)")


@dataclass(frozen=True)
class Replay:
    """A measured step, and the one that the simulation makes of its actions' durations and order."""

    measured: Timeline
    simulated: Timeline

    @property
    def difference(self) -> float:
        """Simulated over measured span, less 1."""
        return self.simulated.seconds / self.measured.seconds - 1


def replay(path: str | Path, delay: float = 0.0) -> Replay:
    """Simulates the actions of a trace.

    Args:
        delay: seconds in which a result reaches the next rank.

    Raises:
        OptionError: for a file that is no trace, naming the entry, and for actions that wait for each other for ever.
    """
    measured = Timeline(_read(Path(path)))
    durations = {span.action: span.end - span.start for spans in measured.spans for span in spans}
    try:
        program = Program([[(span.action,) for span in spans] for spans in measured.spans])
    except ValueError as error:
        raise OptionError("--replay", f"{path}: {error}, or a stage's action is missing") from error
    return Replay(measured, program.run(durations.__getitem__, delay))


def write_trace(path: str | Path, timeline: Timeline) -> None:
    """Writes a trace that `replay` reads."""
    ranks = [[["{}{}{}".format(*span.action), span.start, span.end] for span in spans] for spans in timeline.spans]
    Path(path).write_text(json.dumps({"ranks": ranks}), encoding="utf-8")


def _read(path: Path) -> list[list[Span]]:
    def refuse(reason: str) -> OptionError:
        return OptionError("--replay", f"{path}: {reason}")

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise refuse(f"is not JSON that can be read ({error})") from error
    ranks = content.get("ranks") if isinstance(content, dict) else None
    if not isinstance(ranks, list) or not ranks or not all(isinstance(rank, list) and rank for rank in ranks):
        raise refuse('has no "ranks", a list with the actions of each')
    seen: set[Action] = set()
    spans: list[list[Span]] = []
    for rank, entries in enumerate(ranks):
        spans.append([])
        for entry in entries:
            where = f"rank {rank}, {entry!r}"
            try:
                name, start, end = entry
                stage, kind, microbatch = _NAME.fullmatch(name).groups()  # type: ignore[union-attr]
                start, end = float(start), float(end)
            except (TypeError, ValueError, AttributeError) as error:
                raise refuse(f'{where} is not like ["0F0", 0.0, 0.1]') from error
            action = Action(int(stage), kind, int(microbatch))
            if not (spans[-1][-1].end if spans[-1] else float("-inf")) <= start <= end < float("inf"):
                raise refuse(f"{where} ends before it starts, or starts before the one before it has ended")
            if action in seen:
                raise refuse(f"{where} is there twice")
            seen.add(action)
            spans[-1].append(Span(action, start, end))
    return spans

"""What a filtering run was asked for, and where it keeps what it has found."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...files import json_bytes, write_whole
from ...option_error import OptionError
from .inputs import Columns, InputFile, shards


# In the order in which documents pass them
STAGES = ("exact", "entropy", "statistics", "contamination", "near", "ngram", "model")
PLAN = "plan.json"


@dataclass(frozen=True)
class FilterSettings:
    """What is kept, and by what.

    Attributes:
        keep: share of the tokens after exact deduplication; None keeps all that no stage drops.
        stages: of `STAGES`, those that are run.
        tokenizer: a folder or name whose tokens are counted; without, a token is four bytes.
        min_bytes: shorter documents are dropped.
        columns: of the input.
        shares: what the budget is shared out by: `pool`, what each domain and language has left, or `seed`, each
            domain's share of the seed.
        scorer: a checkpoint for the stage `model`.
    """

    keep: float | None = None
    stages: tuple[str, ...] = STAGES[:-1]
    tokenizer: str | None = None
    min_bytes: int = 16
    columns: Columns = field(default_factory=Columns)
    shares: str = "pool"
    scorer: str | None = None

    def check(self, has_seed: bool, has_evaluation: bool) -> None:
        """Refuse what does not go together.

        Raises:
            OptionError: naming the option.
        """
        unknown = sorted(set(self.stages) - set(STAGES))
        if unknown or not self.stages:
            raise OptionError("--stages", f"{', '.join(unknown) or 'none'}: there are {', '.join(STAGES)}")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise OptionError("--keep", f"is a share of tokens, above 0 and at most 1, not {self.keep:g}")
        if self.shares not in ("pool", "seed"):
            raise OptionError("--shares", f"is pool or seed, not {self.shares!r}")
        if self.min_bytes < 1:
            raise OptionError("--min-bytes", f"is at least 1, not {self.min_bytes}")
        if not has_seed and set(self.stages) & {"entropy", "statistics", "ngram", "model"}:
            raise OptionError("--seed-text", "is needed: clean text, by which the others are judged")
        if self.keep is not None and "ngram" not in self.stages:
            raise OptionError("--keep", "needs the stage ngram, whose scores say what is kept")
        if "contamination" in self.stages and not has_evaluation:
            raise OptionError("--decontaminate", "is needed for the stage contamination: evaluation sets")
        if ("model" in self.stages) != (self.scorer is not None):
            raise OptionError("--scorer", "and the stage model go together")


def usual_stages(has_seed: bool, has_evaluation: bool, has_scorer: bool) -> tuple[str, ...]:
    """All stages for which there is what they need."""
    needs = {"entropy": has_seed, "statistics": has_seed, "contamination": has_evaluation}
    needs |= {"ngram": has_seed, "model": has_scorer}
    return tuple(stage for stage in STAGES if needs.get(stage, True))


@dataclass(frozen=True)
class FilterPlan:
    """A run in its output folder: settings, and the input in shards."""

    output: Path
    settings: FilterSettings
    shards: list[list[InputFile]]
    seed: tuple[str, ...] = ()
    evaluation: tuple[str, ...] = ()

    @classmethod
    def make(
        cls,
        output: Path,
        settings: FilterSettings,
        files: list[InputFile],
        seed: tuple[str, ...],
        evaluation: tuple[str, ...],
        shard_bytes: int,
    ) -> FilterPlan:
        return cls(output, settings, shards(files, shard_bytes), seed, evaluation)

    def path(self, stage: str, name: str) -> Path:
        """A file of what a stage has found."""
        return self.output / "work" / stage / name

    def start(self) -> None:
        """Make the folder, or refuse one of another run.

        Raises:
            OptionError: naming the first setting that differs.
        """
        asked = json.loads(json.dumps(self.told()))
        path = self.output / "work" / PLAN
        if path.exists():
            begun = json.loads(path.read_text(encoding="utf-8"))
            for name in {**begun, **asked}:
                if begun.get(name) != asked.get(name):
                    before, now = begun.get(name), asked.get(name)
                    told = "" if name == "input" else f" was {before!r} and is {now!r} now"
                    raise OptionError(
                        "--output",
                        f"{self.output} was begun with another {name}{told}: repeat the first command, or choose a "
                        "new folder",
                    )
            return
        if self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir())):
            others = [] if not self.output.is_dir() else sorted(file.name for file in self.output.iterdir())
            if others != ["work"] or any((self.output / "work").iterdir()):
                raise OptionError("--output", f"{self.output} holds something else: choose a new folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json_bytes(asked))

    def told(self) -> dict[str, Any]:
        return {
            **asdict(self.settings),
            "seed": list(self.seed),
            "evaluation": list(self.evaluation),
            "input": [[[file.path, file.name, file.size] for file in files] for files in self.shards],
        }

    @classmethod
    def load(cls, output: Path) -> FilterPlan:
        """The plan of a folder.

        Raises:
            OptionError: there is none.
        """
        try:
            told = json.loads((output / "work" / PLAN).read_text(encoding="utf-8"))
        except OSError:
            raise OptionError("--output", f"{output} is no folder of this command") from None
        files = [[InputFile(*file) for file in part] for part in told.pop("input")]
        seed, evaluation = tuple(told.pop("seed")), tuple(told.pop("evaluation"))
        settings = FilterSettings(**told | {"columns": Columns(**told["columns"]), "stages": tuple(told["stages"])})
        return cls(output, settings, files, seed, evaluation)


def save_table(path: Path, told: Mapping[str, Any], **arrays: np.ndarray) -> None:
    """Write arrays, and plain values beside them, into one file, whole."""
    stream = io.BytesIO()
    np.savez(stream, told=np.frombuffer(json.dumps(told).encode(), dtype=np.uint8), **arrays)  # type: ignore[arg-type]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, stream.getvalue())


def load_table(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What [`save_table`] wrote."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    return json.loads(arrays.pop("told").tobytes()), arrays

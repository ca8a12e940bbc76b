"""A checkpoint measured part by part: text, routing, speed, tasks, HumanEval. Each is kept as soon as it is done."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.dsv3.configuration_dsv3 import DeepseekV3Config
from .checkpoint_identity import config_digest
from .checkpoint_source import CheckpointSource
from .decoding import cache_bytes_per_token, decoding_figures, prefill_tokens_per_second, spaced_passages
from .evaluation_record import EvaluationRecord, new_record, read_record
from .harness import TaskSuite, harness_model, task_entries
from .human_eval import human_eval
from .machine import load_average
from .record_fields import RecordError
from .routing import routing_report
from .sandbox import NAMESPACES
from .shareable import shareable_text
from .text_quality import bits_per_byte, compressor_bits_per_byte


# Of a longer text, routing is counted on so many tokens, as `transformers-dsv3 routing` does
ROUTING_TOKENS = 65_536
# Logits of a batch of text: 1 GiB in fp32
_BATCH_LOGITS = 1 << 28
_PASSAGES, _NEW_TOKENS = 8, 64


@dataclass(frozen=True)
class HumanEvalSettings:
    """See `human_eval`."""

    samples: int = 1
    temperature: float = 0.8
    max_new_tokens: int = 512
    isolation: str = NAMESPACES


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured, and how.

    Attributes:
        what: any of `text`, `routing` and `speed`.
        window: tokens of context for text and routing; text is read in steps of half of it.
        batch_size: rows at a time, of text, tasks and HumanEval.
        num_fewshot, limit, chat_template: see `TaskSuite.run`; `limit` counts HumanEval's problems too.
        human_eval: None where programs are not to be run.
    """

    what: tuple[str, ...] = ("text", "routing", "speed")
    window: int = 256
    batch_size: int = 8
    dtype: str = "auto"
    device: str | None = None
    seed: int = 0
    num_fewshot: int | None = None
    limit: int | None = None
    chat_template: bool = False
    human_eval: HumanEvalSettings | None = None


@dataclass(frozen=True)
class EvaluationText:
    """The text to be predicted.

    Attributes:
        source: where it comes from, in words and without folders.
        stream: its token ids, int64 `(n_tokens,)`.
    """

    source: str
    texts: tuple[str, ...]
    stream: torch.Tensor = field(repr=False)

    @property
    def sha256(self) -> str:
        """Over every document's length in bytes and its text."""
        digest = hashlib.sha256()
        for text in self.texts:
            encoded = text.encode("utf-8")
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return digest.hexdigest()


class CheckpointEvaluation:
    """One evaluation and its record in a file.

    Args:
        text: needed where `settings.what` names anything.
        suite: tasks of the harness; None for none.
        command: what a person would type to repeat it.
        path: the file of the record. One of the same evaluation that was interrupted is gone on with, one that has
            ended is measured anew; anything else there is refused.
        overwrite: take the place of whatever is there.

    `identify`, `load` and `run` follow each other.

    Raises:
        RecordError: `path` holds something else.
    """

    def __init__(
        self,
        source: CheckpointSource,
        settings: EvaluationSettings,
        *,
        text: EvaluationText | None,
        tokenizer: PreTrainedTokenizerBase,
        suite: TaskSuite | None,
        command: str,
        path: Path,
        overwrite: bool = False,
    ):
        self.source, self.settings, self.text, self.suite = source, settings, text, suite
        self.tokenizer, self.path = tokenizer, path
        self.command = command
        self.resumed: list[str] = []
        self.earlier: EvaluationRecord | None = None
        if path.exists() and not overwrite:
            self.earlier = read_record(path)
            same = (config_digest(source.folder), self._recorded_settings(), settings.seed)
            self._refuse_other((self.earlier.checkpoint.config_sha256, self.earlier.settings, self.earlier.seed), same)

    def identify(self) -> None:
        """Read the weights for the checkpoint's digest, and begin the record, or go on with that in the file.

        Raises:
            RecordError: the file is of other weights.
            CheckpointError: the checkpoint's files are broken.
        """
        settings = self.settings
        self.record = new_record(
            self.source.identity(),
            command=self.command,
            settings=self._recorded_settings(),
            seed=settings.seed,
            device=settings.device or "cpu",
        )
        if self.earlier is not None:
            mine, theirs = self.record.checkpoint, self.earlier.checkpoint
            self._refuse_other((theirs.sha256, theirs.base), (mine.sha256, mine.base))
            self._take_over(self.earlier)

    def _refuse_other(self, theirs: object, mine: object) -> None:
        if self.earlier is not None and theirs != mine:
            raise RecordError(
                f"{self.path} holds another evaluation, of {self.earlier.checkpoint.name} on {self.earlier.date[:10]} "
                f"({self.earlier.command}): give another file, or --overwrite"
            )

    def _recorded_settings(self) -> dict[str, Any]:
        values: dict[str, Any] = asdict(self.settings)
        del values["seed"]
        values["what"] = list(self.settings.what)
        values["text_sha256"] = None if self.text is None else self.text.sha256
        values["tasks"] = [] if self.suite is None else [shareable_text(name) for name in self.suite.names]
        return values

    def _take_over(self, earlier: EvaluationRecord) -> None:
        """What an interrupted evaluation has measured, where it would come out the same now."""
        mine = self.record
        same_place = earlier.versions == mine.versions and earlier.commit == mine.commit
        if earlier.complete or not same_place or earlier.hardware.get("cpu") != mine.hardware["cpu"]:
            return
        for part in (*self.settings.what, "tasks", "human_eval"):
            if (done := getattr(earlier, part)) is not None:
                setattr(mine, part, done)
                self.resumed.append(part)
        mine.date = earlier.date

    def load(self) -> None:
        """Load the model, where anything is left to measure. Raises what `from_pretrained` raises."""
        if self._missing():
            self.model = self.source.load_model(self.settings.dtype, self.settings.device)

    def run(self, say: Callable[[str], None] = lambda message: None) -> EvaluationRecord:
        """Measure what is not measured yet, after `load`. The record is written after each part.

        Args:
            say: is told what begins.
        """
        for part, measure in self._missing():
            say(part)
            measure(self.model)
            self.record.write(self.path)
        self.record.complete = True
        self.record.write(self.path)
        return self.record

    def _missing(self) -> list[tuple[str, Callable[[PreTrainedModel], None]]]:
        measures: dict[str, Callable[[PreTrainedModel], None]]
        measures = {"text": self._measure_text, "routing": self._measure_routing, "speed": self._measure_speed}
        parts = [(part, measures[part]) for part in self.settings.what if getattr(self.record, part) is None]
        if self.suite is not None:
            done = set(self.record.tasks or {})
            left = [name for name in self.suite.names if not self.suite.members(name) <= done]
            parts += [(f"task {shareable_text(name)}", partial(self._measure_task, name=name)) for name in left]
        if self.settings.human_eval is not None and self.record.human_eval is None:
            parts.append(("HumanEval", self._measure_human_eval))
        return parts

    def _measure_text(self, model: PreTrainedModel) -> None:
        assert self.text is not None
        settings, data = self.settings, "".join(self.text.texts).encode("utf-8")
        rows = max(1, min(settings.batch_size, _BATCH_LOGITS // (settings.window * model.config.vocab_size)))
        stride = settings.window // 2
        quality = bits_per_byte(
            model, self.text.stream, len(data), window=settings.window, stride=stride, batch_size=rows
        )
        nats = quality.value * math.log(2) * quality.bytes / quality.tokens
        self.record.text = {
            "source": self.text.source,
            "sha256": self.text.sha256,
            "documents": len(self.text.texts),
            "bytes": quality.bytes,
            "tokens": quality.tokens,
            "window": settings.window,
            "stride": stride,
            "bits_per_byte": quality.value,
            "nats_per_token": nats,
            "perplexity": _exp(nats),
            "byte_perplexity": _exp(quality.value * math.log(2)),
            **{f"{name}_bits_per_byte": bits for name, bits in compressor_bits_per_byte(data).items()},
        }

    def _measure_routing(self, model: PreTrainedModel) -> None:
        assert self.text is not None
        report = routing_report(
            model,
            self.text.stream,
            window=self.settings.window,
            batch_size=self.settings.batch_size,
            max_tokens=max(ROUTING_TOKENS, self.settings.window),
        )
        self.record.routing = {"source": self.text.source, "sha256": self.text.sha256, **report.to_dict()}

    def _measure_speed(self, model: PreTrainedModel) -> None:
        assert self.text is not None
        context = model.config.max_position_embeddings
        length = max(2, min(self.settings.window // 2, context - _NEW_TOKENS))
        passages = spaced_passages(self.text.stream, _PASSAGES, length)
        new_tokens = min(_NEW_TOKENS, context - passages.shape[1])
        self.record.speed = {
            **decoding_figures(model, passages, new_tokens, self.settings.seed),
            "prefill_tokens_per_second": prefill_tokens_per_second(model, self.text.stream[: self.settings.window]),
            "cache_bytes_per_token": cache_bytes_per_token(model, passages[:1]),
            "load_average": load_average(),
        }

    def _measure_task(self, model: PreTrainedModel, name: str) -> None:
        assert self.suite is not None
        settings = self.settings
        results = self.suite.run(
            name,
            harness_model(model, self.tokenizer, settings.batch_size),
            seed=settings.seed,
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            chat_template=settings.chat_template,
        )
        self.record.tasks = {**(self.record.tasks or {}), **task_entries(results)}

    def _measure_human_eval(self, model: PreTrainedModel) -> None:
        assert self.settings.human_eval is not None
        self.record.human_eval = human_eval(
            model,
            self.tokenizer,
            seed=self.settings.seed,
            limit=self.settings.limit,
            batch_size=self.settings.batch_size,
            **asdict(self.settings.human_eval),
        )


def parts_of(config: Any, wanted: Sequence[str]) -> tuple[str, ...]:
    """Those of the wanted parts that a model of this configuration has: routing needs experts of this package."""
    routed = isinstance(config, DeepseekV3Config) and config.moe_layers
    return tuple(part for part in wanted if part != "routing" or routed)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf

"""Runs whose figures are published, and what is predicted for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ...models.dsv3.configuration_dsv3 import DeepseekV3Config
from .gpus import GPUS
from .splits import Plan, Split, Workload, plan


# DeepSeek-V3 (arXiv 2412.19437), table 1: hours of one H800, and dollars for one
PRETRAINING_TOKENS = 14.8e12
PRETRAINING_HOURS = 2.664e6
ALL_HOURS = 2.788e6  # with the extension of the context, 0.119 M, and post-training, 0.005 M
DOLLARS_PER_HOUR = 2.0
# The article on it that the project starts from has these
ARTICLE_GPUS = 16384
ARTICLE_UTILISATION = 0.78
_NEMO = "NeMo AutoModel's performance summary of October 2025, recipes *_te_deepep.yaml"


@dataclass(frozen=True)
class PublishedRun:
    """One run.

    Args:
        model: a name of `compress --plan`'s published shapes.
        gpu: one of `GPUS`.
        workload: arguments of `Workload` beside the config.
        tokens_per_second: of one GPU, as published or computed from what is.
        source: where.
    """

    name: str
    model: str
    gpu: str
    split: Split
    tokens_per_second: float
    source: str
    workload: dict[str, Any] = field(default_factory=dict)

    def predict(self, config: DeepseekV3Config) -> Plan:
        return plan(Workload(config, **self.workload), self.split, GPUS[self.gpu])


def _nemo(tp: int, pp: int, ep: int, dp: int, stages: int) -> Split:
    return Split(tp, pp, ep, dp, "Interleaved1F1B", "full", sharded=True, stages_per_rank=stages)


RUNS = (
    PublishedRun(
        "DeepSeek-V3, pre-training",
        "deepseek-v3",
        "h800",
        Split(1, 16, 64, 128, "DualPipeV", "selective", fp8=True),
        PRETRAINING_TOKENS / PRETRAINING_HOURS / 3600,
        "arXiv 2412.19437, sections 1 and 3.2: 180 K H800 hours a trillion tokens, PP16, EP64, ZeRO-1, DualPipe",
    ),
    PublishedRun(
        "NeMo AutoModel, DeepSeek-V3",
        "deepseek-v3",
        "h100",
        _nemo(1, 4, 64, 64, 8),
        1002,
        _NEMO,
        {"global_batch": 512, "mtp": False},
    ),
    PublishedRun(
        "NeMo AutoModel, DeepSeek-V3",
        "deepseek-v3",
        "h100",
        _nemo(1, 4, 64, 256, 8),
        865,
        _NEMO,
        {"global_batch": 8192, "accumulation": 4, "mtp": False},
    ),
    PublishedRun(
        "NeMo AutoModel, Kimi K2",
        "kimi-k2",
        "h100",
        _nemo(1, 8, 32, 32, 4),
        924,
        _NEMO,
        {"global_batch": 512, "accumulation": 2, "mtp": False},
    ),
)
# The article's number of GPUs, with the report's batch: a split that keeps two microbatches and more for each rank
ARTICLE_SPLIT = Split(4, 8, 64, 512, "DualPipeV", "selective", fp8=True)


@dataclass(frozen=True)
class Comparison:
    """A published run beside what is predicted for it."""

    run: PublishedRun
    plan: Plan

    @property
    def difference(self) -> float:
        """Predicted tokens a second over the published ones, less 1."""
        return self.plan.tokens_per_second / self.run.tokens_per_second - 1


def compare(config_of: Callable[[str], DeepseekV3Config]) -> list[Comparison]:
    """Every published run.

    Args:
        config_of: the configuration of a published model's name.
    """
    return [Comparison(run, run.predict(config_of(run.model))) for run in RUNS]


@dataclass(frozen=True)
class Bill:
    """Hours, days and dollars of DeepSeek-V3's whole training on so many GPUs."""

    name: str
    gpus: int
    hours: float

    @property
    def days(self) -> float:
        return self.hours / self.gpus / 24

    def dollars(self, price_per_hour: float) -> float:
        return self.hours * price_per_hour


def bills(deepseek: Plan) -> list[Bill]:
    """The published bill, the same hours on the article's number of GPUs, and both as predicted.

    What comes after pre-training is taken from the report in all of them.

    Args:
        deepseek: what is predicted for DeepSeek-V3's own run.
    """
    later = ALL_HOURS - PRETRAINING_HOURS
    own = deepseek.split.gpus
    article = plan(deepseek.workload, ARTICLE_SPLIT, deepseek.gpu)
    return [
        Bill("published", own, ALL_HOURS),
        Bill("predicted", own, deepseek.gpu_hours(PRETRAINING_TOKENS) + later),
        Bill("published hours on the article's GPUs", ARTICLE_GPUS, ALL_HOURS),
        Bill(f"predicted, {article.split}", ARTICLE_GPUS, article.gpu_hours(PRETRAINING_TOKENS) + later),
    ]

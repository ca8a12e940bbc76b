"""What Prometheus may ask, by vLLM's names where the meaning is the same."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from ..generation.requests import Output


SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
LONGER = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
# Names and meanings of what the engine is asked when Prometheus asks: (name, kind, what it says)
OF_ENGINE = {
    "running": ("vllm:num_requests_running", GaugeMetricFamily, "Texts that are being made."),
    "waiting": ("vllm:num_requests_waiting", GaugeMetricFamily, "Texts that wait for a place."),
    "preemptions": ("vllm:num_preemptions", CounterMetricFamily, "Texts that gave their pages to others for a while."),
}


class Metrics:
    """Counts what goes through one server.

    Args:
        model_name: the label of every metric. engine: asked for its statistics when metrics are read.
    """

    def __init__(self, model_name: str, engine: Any):
        self.engine, self.model_name = engine, model_name
        self.registry = CollectorRegistry()
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Tokens of prompts.")
        self.generation_tokens = self._counter("vllm:generation_tokens", "Tokens that were made.")
        self.queries = self._counter("vllm:prefix_cache_queries", "Tokens of prompts that were looked up.")
        self.hits = self._counter("vllm:prefix_cache_hits", "Tokens of prompts that were found in pages.")
        self.first = self._histogram("vllm:time_to_first_token_seconds", "From the request on.", SECONDS)
        self.between = self._histogram("vllm:inter_token_latency_seconds", "From a token to the next.", SECONDS)
        self.whole = self._histogram("vllm:e2e_request_latency_seconds", "From the request to its last token.", LONGER)
        self.prompts = self._histogram("vllm:request_prompt_tokens", "Tokens of each prompt.", TOKENS)
        self.texts = self._histogram("vllm:request_generation_tokens", "Tokens of each text.", TOKENS)
        self.success = Counter(
            "vllm:request_success",
            "Texts that ended, by the reason.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self.answers = Counter(
            "dsv3:http_responses", "Answers by their status.", ["model_name", "status"], registry=self.registry
        )
        self.registry.register(_EngineCollector(engine, model_name))

    def _counter(self, name: str, says: str) -> Any:
        return Counter(name, says, ["model_name"], registry=self.registry).labels(self.model_name)

    def _histogram(self, name: str, says: str, buckets: tuple[float, ...]) -> Any:
        metric = Histogram(name, says, ["model_name"], buckets=buckets, registry=self.registry)
        return metric.labels(self.model_name)

    def answered(self, status: int) -> None:
        self.answers.labels(self.model_name, str(status)).inc()

    def observer(self, texts: int) -> Timing:
        """Watches the texts of one request, which begins now."""
        return Timing(self, texts)

    def render(self) -> tuple[bytes, str]:
        """Prometheus' text, and its type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


class Timing:
    """Times and counts of one request's texts, by their outputs."""

    def __init__(self, metrics: Metrics, texts: int):
        self.metrics, self.begun = metrics, time.monotonic()
        self.last: list[float | None] = [None] * texts
        self.made = [0] * texts

    def __call__(self, text: int, output: Output, now: float) -> None:
        metrics, count = self.metrics, len(output.tokens)
        last = self.last[text]
        if count:
            if last is None:
                metrics.first.observe(now - self.begun)
                metrics.prompt_tokens.inc(output.prompt_tokens)
                metrics.queries.inc(output.prompt_tokens)
                metrics.hits.inc(output.cached_tokens)
            else:
                for _ in range(count):
                    metrics.between.observe((now - last) / count)
            metrics.generation_tokens.inc(count)
            self.made[text] += count
            self.last[text] = now
        if output.finish_reason is not None:
            metrics.success.labels(metrics.model_name, output.finish_reason).inc()
            metrics.whole.observe(now - self.begun)
            metrics.prompts.observe(output.prompt_tokens)
            metrics.texts.observe(self.made[text])


class _EngineCollector:
    def __init__(self, engine: Any, model_name: str):
        self.engine, self.model_name = engine, model_name

    def collect(self) -> Iterator[Any]:
        statistics = self.engine.statistics()
        for field, (name, family, says) in OF_ENGINE.items():
            metric = family(name, says, labels=["model_name"])
            metric.add_metric([self.model_name], getattr(statistics, field))
            yield metric
        used = GaugeMetricFamily(
            "vllm:kv_cache_usage_perc", "Share of the pages in use, 0 to 1.", labels=["model_name"]
        )
        used.add_metric([self.model_name], statistics.pages_used / max(statistics.pages_total, 1))
        yield used

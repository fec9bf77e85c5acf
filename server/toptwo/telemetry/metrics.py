"""What the server counts, in Prometheus' format.

Knows counts and names; must not know HTTP, requests or where a number comes from. Counting is adding to
plain numbers: it is done for every token, and read now and then. Names are vLLM's behind a prefix of our own
where they mean the same, so that dashboards can be carried over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from toptwo.messages import SECONDS, EngineInfo, EngineStats, FinishReason, Histogram

PREFIX = "toptwo:"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
TOKENS = tuple(step * 10**power for power in range(6) for step in (1, 2, 5))
"""Bounds for numbers of tokens."""

_STATS_GAUGES = {
    "num_requests_running": ("num_running", "Sequences that the engine computes."),
    "num_requests_waiting": ("num_waiting", "Sequences that wait in the engine."),
}
_STATS_COUNTERS = {
    "num_preemptions": ("preemptions", "Sequences that gave their KV blocks to older ones."),
    "prompt_tokens": ("prompt_tokens", "Tokens of prompts whose answers have begun, cached ones included."),
    "generation_tokens": ("generation_tokens", "Generated tokens."),
    "prefix_cache_queries": ("prefix_queries", "Prompt tokens that were looked up in the prefix cache."),
    "prefix_cache_hits": ("prefix_hits", "Prompt tokens that the prefix cache had."),
}
_INFO = ("architecture", "backend", "quantization", "dtype", "kv_dtype", "device")


@dataclass(frozen=True)
class EngineView:
    """What can be seen of the engine, from outside and by its own word.

    num_open: sequences that are inside the server, those that wait for threads or the engine included.
    """

    info: EngineInfo | None
    stats: EngineStats | None
    num_restarts: int
    num_open: int


class Metrics:
    """Everything that is counted on behalf of one model. model_name: the value of a label of that name.

    first_token_seconds, token_seconds, queue_seconds: to be added to by whoever measures.
    """

    def __init__(self, model_name: str) -> None:
        self.model_name = model_name
        self.first_token_seconds = Histogram.over(SECONDS)
        self.token_seconds = Histogram.over(SECONDS)
        self.queue_seconds = Histogram.over(SECONDS)
        self._answer_seconds = Histogram.over(SECONDS)
        self._prompt_tokens = Histogram.over(TOKENS)
        self._completion_tokens = Histogram.over(TOKENS)
        self._requests: Counter[tuple[str, ...]] = Counter()
        self._sequences: Counter[tuple[str, ...]] = Counter()
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)

    def count_request(self, endpoint: str, status: int, outcome: str) -> None:
        """An HTTP request has ended. endpoint: a route's own path."""
        self._requests[endpoint, str(status), outcome] += 1

    def count_answer(self, seconds: float, prompt_tokens: int, completion_tokens: int) -> None:
        """A request has been answered in full; its counts are those that its caller was told."""
        self._answer_seconds.add(seconds)
        self._prompt_tokens.add(prompt_tokens)
        self._completion_tokens.add(completion_tokens)

    def count_sequence(self, reason: FinishReason) -> None:
        """A sequence has ended."""
        self._sequences[(reason,)] += 1

    def render(self, engine: EngineView) -> bytes:
        """All of it as text. Slow where a model has many experts: call it in a thread."""
        page = CollectorRegistry()
        page.register(_Page([*self._of_requests(), *self._of_engine(engine)]))
        experts = self._of_experts(engine.stats.expert_tokens) if engine.stats else b""
        return generate_latest(page) + experts + generate_latest(self._process)

    def _of_requests(self) -> Iterator[Metric]:
        histogram, counter = self._histogram, self._counter
        yield histogram(
            "time_to_first_token_seconds", self.first_token_seconds, "From request to first token."
        )
        yield histogram(
            "inter_token_latency_seconds", self.token_seconds, "Between two tokens of a sequence."
        )
        yield histogram(
            "request_queue_time_seconds", self.queue_seconds, "From the engine's queue to a first step."
        )
        yield histogram(
            "e2e_request_latency_seconds", self._answer_seconds, "From request to the answer's end."
        )
        yield histogram("request_prompt_tokens", self._prompt_tokens, "Prompt tokens of answered requests.")
        yield histogram("request_generation_tokens", self._completion_tokens, "Their generated tokens.")
        yield counter(
            "http_requests", ("endpoint", "status", "outcome"), self._requests, "Requests that ended."
        )
        # vLLM's name; it counts sequences, those without success too.
        yield counter("request_success", ("finished_reason",), self._sequences, "Sequences that ended.")

    def _of_engine(self, engine: EngineView) -> Iterator[Metric]:
        yield self._gauge("engine_up", engine.info is not None, "Whether the engine serves.")
        yield self._gauge("num_sequences_open", engine.num_open, "Sequences inside the server.")
        yield self._counter("engine_restarts", (), {(): engine.num_restarts}, "Engines after the first one.")
        info, stats = engine.info, engine.stats
        if info is None or stats is None:
            return
        about = GaugeMetricFamily(
            f"{PREFIX}engine_info", "What the engine is.", labels=["model_name", *_INFO]
        )
        about.add_metric([self.model_name, *(str(getattr(info, name)) for name in _INFO)], 1)
        yield about
        used = 1 - stats.num_free_blocks / info.num_blocks
        yield self._gauge("kv_cache_usage_perc", used, "Part of the KV blocks that is in use, 1 for all.")
        for name, (field, sentence) in _STATS_GAUGES.items():
            yield self._gauge(name, getattr(stats, field), sentence)
        for name, (field, sentence) in _STATS_COUNTERS.items():
            yield self._counter(name, (), {(): getattr(stats, field)}, sentence)
        yield self._histogram("step_seconds", stats.step_seconds, "How long steps of the model took.")

    def _of_experts(self, tokens: Mapping[int, Sequence[int]]) -> bytes:
        """Written by hand: there may be 15,000 of them, for which the library takes a second."""
        name, model = f"{PREFIX}expert_tokens_total", self.model_name
        for character, escaped in (("\\", "\\\\"), ("\n", "\\n"), ('"', '\\"')):
            model = model.replace(character, escaped)
        lines = [f"# HELP {name} Tokens that came to each expert.\n# TYPE {name} counter"]
        for layer, counts in tokens.items():
            labels = f'{{model_name="{model}",layer="{layer}",expert="'
            lines += [f'{name}{labels}{expert}"}} {count}' for expert, count in enumerate(counts)]
        return ("\n".join(lines) + "\n").encode()

    def _gauge(self, name: str, value: float, sentence: str) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, sentence, labels=["model_name"])
        family.add_metric([self.model_name], float(value))
        return family

    def _counter(
        self, name: str, labels: Sequence[str], values: Mapping[tuple[str, ...], int], sentence: str
    ) -> Metric:
        family = CounterMetricFamily(PREFIX + name, sentence, labels=["model_name", *labels])
        for key, value in list(values.items()):  # it grows while this runs in a thread
            family.add_metric([self.model_name, *key], value)
        return family

    def _histogram(self, name: str, histogram: Histogram, sentence: str) -> Metric:
        family = HistogramMetricFamily(PREFIX + name, sentence, labels=["model_name"])
        buckets, below = [], 0
        for bound, count in zip(
            [*map(str, map(float, histogram.bounds)), "+Inf"], histogram.counts, strict=True
        ):
            below += count
            buckets.append((bound, float(below)))
        family.add_metric([self.model_name], buckets, histogram.total)
        return family


class _Page(Collector):
    """Finished families, in the form that the library writes down."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Sequence[Metric]:
        """All of them."""
        return self._families

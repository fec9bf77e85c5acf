"""The page that Prometheus reads: its parser takes it, and finds what was counted."""

from __future__ import annotations

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from fakes import engine_info
from toptwo.messages import SECONDS, EngineStats, Histogram
from toptwo.telemetry.metrics import EngineView, Metrics

NAME = 'org/"odd"\\\nname'


def stats(**changes: object) -> EngineStats:
    fields: dict[str, object] = {
        "num_running": 3,
        "num_waiting": 2,
        "num_free_blocks": engine_info().num_blocks // 4,
        "preemptions": 5,
        "prompt_tokens": 70,
        "generation_tokens": 80,
        "prefix_queries": 60,
        "prefix_hits": 20,
        "step_seconds": Histogram.over(SECONDS),
        "expert_tokens": {1: [4, 0], 7: [1, 3]},
    }
    return EngineStats(**fields | changes)  # type: ignore[arg-type]


def view(**changes: object) -> EngineView:
    fields: dict[str, object] = {
        "info": engine_info(),
        "stats": stats(),
        "num_restarts": 2,
        "num_open": 9,
    }
    return EngineView(**fields | changes)  # type: ignore[arg-type]


def read(page: bytes) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(page.decode())}


def value(families: dict[str, Metric], name: str, **labels: str) -> float:
    """The sample of a name and labels, beside the model's."""
    wanted = {"model_name": NAME, **labels}
    samples = [sample for family in families.values() for sample in family.samples]
    (found,) = [sample.value for sample in samples if (sample.name, sample.labels) == (name, wanted)]
    return found


def test_what_the_engine_counts() -> None:
    families = read(Metrics(NAME).render(view()))
    assert value(families, "toptwo:engine_up") == 1
    assert value(families, "toptwo:engine_restarts_total") == 2
    assert value(families, "toptwo:num_sequences_open") == 9
    assert value(families, "toptwo:num_requests_running") == 3
    assert value(families, "toptwo:num_requests_waiting") == 2
    assert value(families, "toptwo:kv_cache_usage_perc") == 0.75
    assert value(families, "toptwo:num_preemptions_total") == 5
    assert value(families, "toptwo:prompt_tokens_total") == 70
    assert value(families, "toptwo:generation_tokens_total") == 80
    assert value(families, "toptwo:prefix_cache_queries_total") == 60
    assert value(families, "toptwo:prefix_cache_hits_total") == 20
    for layer, expert, tokens in (("1", "0", 4), ("1", "1", 0), ("7", "0", 1), ("7", "1", 3)):
        assert value(families, "toptwo:expert_tokens_total", layer=layer, expert=expert) == tokens
    (about,) = families["toptwo:engine_info"].samples
    assert about.labels["architecture"] == "mixtral"


@pytest.mark.parametrize("missing", [{"info": None, "stats": None}, {"stats": None}])
def test_an_engine_that_says_nothing_has_no_numbers(missing: dict[str, None]) -> None:
    families = read(Metrics(NAME).render(view(**missing)))
    assert value(families, "toptwo:engine_up") == ("info" not in missing)
    assert not {name for name in families if "running" in name or "expert" in name or "step" in name}
    assert "process_resident_memory_bytes" in families


def test_histograms_add_up() -> None:
    metrics = Metrics(NAME)
    for seconds, times in ((0.0005, 1), (0.001, 2), (0.3, 3), (5000.0, 1)):
        metrics.token_seconds.add(seconds, times)
    families = read(metrics.render(view()))
    name = "toptwo:inter_token_latency_seconds"
    below = {
        bound: value(families, f"{name}_bucket", le=bound) for bound in ("0.001", "0.0025", "0.5", "1000.0")
    }
    assert below == {"0.001": 3, "0.0025": 3, "0.5": 6, "1000.0": 6}
    assert value(families, f"{name}_bucket", le="+Inf") == value(families, f"{name}_count") == 7
    assert value(families, f"{name}_sum") == pytest.approx(5000.9025)


def test_a_page_of_a_large_model_is_one() -> None:
    many = {layer: list(range(256)) for layer in range(3, 61)}
    families = read(Metrics(NAME).render(view(stats=stats(expert_tokens=many))))
    samples = families["toptwo:expert_tokens"].samples
    assert len(samples) == 58 * 256
    assert sum(sample.value for sample in samples) == 58 * sum(range(256))

"""How a request ends is told from what is known of it, once."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from toptwo.messages import FinishReason, TokenEvent
from toptwo.telemetry.metrics import Metrics
from toptwo.telemetry.record import RequestRecord, sequence_records


def record() -> RequestRecord:
    return RequestRecord("id", Metrics("name"))


@pytest.mark.parametrize(
    ("expected", "ended", "status", "outcome"),
    [
        (0, [], 200, "completed"),
        (0, [], 404, "refused"),
        (0, [], 503, "refused"),
        (0, [], 500, "failed"),
        (0, [], 499, "cancelled"),
        (1, ["stop"], 200, "completed"),
        (2, ["stop", "length"], 200, "completed"),
        (2, ["stop"], 200, "cancelled"),  # the other had not begun
        (1, [], 200, "cancelled"),
        (1, ["abort"], 499, "cancelled"),
        (1, ["abort"], 200, "cancelled"),
        (1, ["error"], 200, "failed"),
        (2, ["abort", "error"], 200, "failed"),  # one's failure ends the others
        (1, ["overload"], 503, "failed"),
        (1, ["stop"], 500, "failed"),
    ],
)
def test_outcomes(expected: int, ended: list[FinishReason], status: int, outcome: str) -> None:
    request = record()
    request.expect(10, expected)
    request.finish_reasons += ended
    assert request.outcome(status) == outcome


def test_a_line_says_what_an_answer_cost() -> None:
    request = record()
    first, second = sequence_records(request, 10, 2)
    first.take(TokenEvent("a", [1], None, 4, queue_seconds=0.25))
    second.take(TokenEvent("b", [1], None, 8, queue_seconds=0.5))
    first.take(TokenEvent("a", [2, 3], "stop", 4))
    second.take(TokenEvent("b", [], "length"))
    assert first.end("stop")
    assert not first.end("abort")
    assert second.end("length")
    with capture_logs() as lines:
        request.end("POST", "/v1/chat/completions", 200, "abc")
    (line,) = lines
    assert line.pop("seconds") >= line.pop("ttft_seconds") >= 0
    assert line == {
        "event": "request",
        "log_level": "info",
        "request_id": "id",
        "method": "POST",
        "endpoint": "/v1/chat/completions",
        "status": 200,
        "outcome": "completed",
        "key": "abc",
        "model": "name",
        "prompt_tokens": 10,
        "cached_tokens": 4,
        "completion_tokens": 4,
        "queue_seconds": 0.25,
        "finish_reason": "length,stop",
        "client_left": False,
    }


def test_machines_that_ask_all_the_time_are_not_worth_a_line() -> None:
    with capture_logs() as lines:
        record().end("GET", "/health/ready", 200, None)
        record().end("GET", "/metrics", 200, "abc")
        record().end("GET", "/health/ready", 503, None)
    assert [line["log_level"] for line in lines] == ["debug", "debug", "info"]

"""Whole runs of `toptwo bench`, as the command line starts them."""

from __future__ import annotations

import io
import json
import struct
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from bench_command.servers import NUM_TOKENS, BadServer, Ours
from fakes import KEY
from toptwo import cli
from toptwo.bench import plot
from toptwo.bench.client import Outcome, Target
from toptwo.bench.live import Meter, watch
from toptwo.bench.load import Level, LevelRun
from toptwo.bench.options import BenchOptions
from toptwo.bench.report import Report
from toptwo.errors import StartupError

SMALL = ["--prompt-tokens", "200", "--max-tokens", str(NUM_TOKENS)]


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(cli.cli, ["bench", *map(str, arguments)])


def refusal(*arguments: object) -> str:
    """The one line with which a run ends that cannot begin."""
    result = bench(*arguments)
    assert isinstance(result.exception, StartupError), result.output
    assert "\n" not in str(result.exception)
    return str(result.exception)


def size_of(picture: Path) -> tuple[int, int]:
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def test_a_curve(ours: Ours, tmp_path: Path) -> None:
    report, picture = tmp_path / "report.json", tmp_path / "curve.png"
    files = ["--json", report, "--plot", picture]
    goodput = ["--goodput-ttft", 1, "--goodput-itl", 0.001]
    load = ["--concurrency", "1,2", "--concurrency", 3, "--requests", 4, "--warmup", 2]
    result = bench(ours.url, "--api-key", KEY, *load, *SMALL, *goodput, *files)
    assert result.exit_code == 0, result.output
    assert f"org/tiny-moe at {ours.url}" in result.output
    assert f"prompt 200, output {NUM_TOKENS} tokens, seed 0" in result.output
    rows = {line[:20].strip(): line[20:].split() for line in result.output.splitlines()}
    assert rows["requests at once"] == ["1", "2", "3"]
    assert rows["requests ok"] == ["4", "4", "4"]
    assert rows["requests failed"] == ["0", "0", "0"]
    assert rows["output tokens"] == [f"{NUM_TOKENS:.1f}"] * 3
    assert rows["goodput, requests/s"] == ["0.00", "0.00", "0.00"]
    assert size_of(picture) == (1800, 630)
    assert KEY not in report.read_text()

    # One to see what the server is like, two to warm it up, and three levels.
    assert len(ours.engine.requests) == 1 + 2 + 3 * 4
    assert all(request.stop_token_ids == [] for request in ours.engine.requests)
    assert len({tuple(request.prompt_ids) for request in ours.engine.requests}) == 15
    assert {request.max_tokens for request in ours.engine.requests[1:]} == {NUM_TOKENS}
    check_json(json.loads(report.read_text()), ours)


def check_json(found: dict[str, Any], ours: Ours) -> None:
    assert (found["format"], found["model"], found["base_url"]) == (1, "org/tiny-moe", ours.url)
    assert found["config"] == {
        "url": ours.url,
        "model": None,
        "concurrency": [1, 2, 3],
        "rate": [],
        "requests": 4,
        "duration": None,
        "prompt_tokens": "200",
        "max_tokens": str(NUM_TOKENS),
        "shared_prefix": 0,
        "temperature": 0,
        "ignore_eos": True,
        "seed": 0,
        "warmup": 2,
        "timeout": 600,
        "goodput_ttft": 1,
        "goodput_itl": 0.001,
        "json": found["config"]["json"],
        "plot": found["config"]["plot"],
    }
    assert [level["concurrency"] for level in found["levels"]] == [1, 2, 3]
    sent = [request.prompt_ids for request in ours.engine.requests[3:]]
    counted = [request["prompt_tokens"] for level in found["levels"] for request in level["requests"]]
    assert sorted(counted) == sorted(len(ids) for ids in sent)
    for level in found["levels"]:
        summary, requests = level["summary"], level["requests"]
        assert (level["rate"], summary["num_ok"], summary["errors"]) == (None, 4, {})
        for request in requests:
            assert request["completion_tokens"] == NUM_TOKENS
            assert request["error"] is request["detail"] is None
            assert len(request["inter_token_ms"]) <= NUM_TOKENS - 1
            whole = request["ttft_ms"] + sum(request["inter_token_ms"])
            assert 0 < whole <= request["end_to_end_ms"] + 0.01
        assert summary["output_rate"] == pytest.approx(4 * NUM_TOKENS / summary["seconds"])
        assert summary["end_to_end"]["max"] == pytest.approx(max(r["end_to_end_ms"] for r in requests), abs=1)
        assert set(summary["ttft"]) == {"count", "mean", "p50", "p90", "p99", "max"}


def test_an_open_loop_and_its_distributions(ours: Ours, tmp_path: Path) -> None:
    picture = tmp_path / "spread.png"
    load = ["--rate", 100, "--duration", 0.1, "--seed", 4, "--no-ignore-eos"]
    result = bench(ours.url, "--api-key", KEY, *load, *SMALL, "--plot", picture)
    assert result.exit_code == 0, result.output
    assert "requests/s offered" in result.output
    assert f"output {NUM_TOKENS} tokens, may end earlier, seed 4" in result.output
    assert size_of(picture) == (1800, 630)
    assert all(request.stop_token_ids for request in ours.engine.requests)


def test_failures_are_counted_by_kind(bad: BadServer, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    result = bench(bad.at("flaky"), "--requests", 6, "--warmup", 0, "--max-tokens", 2, "--json", report)
    assert result.exit_code == 0, result.output
    assert "1 at once: 3 x http 429 (ignore_eos is not known)" in result.output
    (level,) = json.loads(report.read_text())["levels"]
    assert (level["summary"]["num_ok"], level["summary"]["errors"]) == (3, {"http 429": 3})
    assert sorted(request["error"] or "" for request in level["requests"]) == [""] * 3 + ["http 429"] * 3


@pytest.mark.parametrize("behaviour", ["http-429", "cut", "hang-up", "silent"])
def test_a_run_in_which_all_fails_says_so(bad: BadServer, behaviour: str) -> None:
    result = bench(bad.at(behaviour), "--requests", 2, "--warmup", 0, "--timeout", 0.1)
    assert result.exit_code == 1
    kind = {"http-429": "http 429", "cut": "cut short", "hang-up": "disconnected", "silent": "timeout"}
    assert f"1 at once: 2 x {kind[behaviour]}" in result.output


@pytest.mark.parametrize("num_levels", [1, 2])
def test_a_picture_of_nothing(num_levels: int) -> None:
    run = LevelRun(Level(concurrency=1), 0.0, 1.0, [Outcome(0.0, [], 1.0, error="timeout")])
    target = Target("http://x/v1", None, "a_model $with$ _odd^ name")
    report = Report(BenchOptions(), target, 0, datetime.now(UTC), [run] * num_levels)
    assert [len(axis.get_title()) > 5 for axis in plot.draw(report).axes] == [True] * 3


@pytest.mark.parametrize(
    ("behaviour", "tokens", "note"),
    [
        ("crowded", 2, "A chunk has up to 2.00 tokens: inter-token figures are between chunks."),
        ("uncounted", 2, "The server does not count tokens: an output token is a chunk here."),
        ("good", 5, "Answers ended before their length: the server does not honour ignore_eos."),
        ("good", 2, None),
    ],
)
def test_what_must_be_known_to_read_the_table(
    bad: BadServer, behaviour: str, tokens: int, note: str | None
) -> None:
    result = bench(bad.at(behaviour), "--requests", 1, "--max-tokens", tokens)
    assert result.exit_code == 0, result.output
    notes = [line for line in result.output.splitlines() if line.endswith(".")]
    assert notes == ([note] if note else [])


@pytest.mark.parametrize(
    ("behaviour", "arguments", "words"),
    [
        ("locked", [], "/locked/v1 wants a key; give --api-key (http 401)"),
        ("locked", ["--api-key", "x"], "/locked/v1 refuses the key from --api-key (http 401)"),
        ("http-401", ["--api-key", "x"], "/http-401/v1 refuses the key from --api-key (http 401)"),
        ("http-400", [], "refuses model 'bad' (http 400): ignore_eos is not known; try --no-ignore-eos"),
        ("http-404", ["--no-ignore-eos"], "refuses model 'bad' (http 404): ignore_eos is not known"),
        ("good", ["--model", "best"], "--model best: "),
        ("good", ["--model", "best"], "/good/v1 has no such model; it serves bad, worse"),
        ("listless", [], "/listless/v1/models lists no model; is the URL right? Or name one with --model"),
        ("ill", [], "/ill/v1/models: http 503: still loading"),
        ("good", ["--api-key", "schlüssel"], "--api-key: a key must be printable ASCII"),
        ("good", ["--json", "/no/such/place"], "--json /no/such/place: no file can be written there"),
        ("good", ["--plot", "/"], "--plot /: no file can be written there"),
        ("good", ["--", "MODEL"], "MODEL: with a URL, no server is started that could obey it"),
    ],
)
def test_a_run_that_cannot_begin(bad: BadServer, behaviour: str, arguments: list[str], words: str) -> None:
    assert words in refusal(bad.at(behaviour), *arguments)
    assert len(bad.bodies) <= 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["http://127.0.0.1:1"], "http://127.0.0.1:1/v1: connection refused; is a server running there?"),
        (["127.0.0.1:8000"], "URL '127.0.0.1:8000': "),
        (["http://"], "URL 'http://': give a whole one"),
        (["ftp://host/v1"], "URL 'ftp://host/v1': give a whole one"),
        (["http://x", "--concurrency", "1,0"], "--concurrency: Input should be greater than or equal to 1"),
        (["http://x", "--concurrency", "1,,2"], "--concurrency: Input should be a valid integer"),
        (["http://x", "--rate", "nan"], "--rate: Input should be a finite number"),
        (["http://x", "--rate", "1", "--concurrency", "1"], "--rate cannot be combined with --concurrency"),
        (["http://x", "--requests", "3", "--concurrency", "1,4"], "--requests 3: that many are never 4"),
        (["http://x", "--prompt-tokens", "9:3"], "--prompt-tokens: lengths are at least 1, and a range"),
        (["http://x", "--max-tokens", "some"], "--max-tokens: give a number of tokens, or a range"),
        (["http://x", "--timeout", "0"], "--timeout: Input should be greater than 0"),
    ],
)
def test_mistakes_are_named(arguments: list[str], words: str) -> None:
    assert words in refusal(*arguments)


def test_the_key_is_not_repeated_in_a_mistake() -> None:
    assert refusal("http://x", "--api-key", "").startswith("--api-key: ")


def test_a_picture_needs_the_extra(bad: BadServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toptwo.bench.plot.importlib.util.find_spec", lambda name: None)
    assert "install the extra: pip install 'toptwo[plot]'" in refusal(bad.at("good"), "--plot", "x.png")
    assert bad.bodies == []


def test_where_the_key_comes_from(bad: BadServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def key_used(*arguments: str) -> str | None:
        bad.headers.clear()
        assert bench(bad.at("good"), "--requests", 1, *arguments).exit_code == 0
        return bad.headers[0].get("authorization")

    assert key_used() is None
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "api-key").write_text("local\n")
    assert key_used() == "Bearer local"
    monkeypatch.setenv("OPENAI_API_KEY", "openai")
    assert key_used() == "Bearer openai"
    monkeypatch.setenv("TOPTWO_API_KEY", "one, two")
    assert key_used() == "Bearer one"
    assert key_used("--api-key", "given") == "Bearer given"


def test_the_model_that_is_asked_for(bad: BadServer) -> None:
    assert bench(bad.at("good"), "--requests", 1, "--model", "worse", "--temperature", 0.5).exit_code == 0
    assert {body["model"] for body in bad.bodies} == {"worse"}
    assert {body["temperature"] for body in bad.bodies} == {0.5}
    assert bench(bad.at("listless"), "--requests", 1, "--model", "any").exit_code == 0
    assert bad.bodies[-1]["model"] == "any"


def test_help_names_every_option() -> None:
    result = CliRunner().invoke(cli.cli, ["bench", "--help"], env={"COLUMNS": "300"})
    assert result.exit_code == 0
    for name, field in BenchOptions.model_fields.items():
        flag = "URL" if name == "url" else "--" + (field.alias or name).replace("_", "-")
        assert flag in result.output
    assert "--no-ignore-eos" in result.output


async def test_what_is_seen_meanwhile() -> None:
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=120)
    async with watch(console, Level(concurrency=2, requests=4), "2 at once") as meter:
        for _ in range(3):
            meter.on_token()
        meter.on_outcome(Outcome(0.0, [0.25], 1.0))
        meter.on_outcome(Outcome(0.0, [], 1.0, error="timeout"))
    assert "2 at once" in terminal.getvalue()
    assert "1 answered, 1 failed, " in terminal.getvalue()
    assert "TTFT p50 250 ms" in terminal.getvalue()
    assert meter.done() == 2


def test_a_level_without_a_number_is_measured_by_its_time() -> None:
    meter = Meter(Level(concurrency=1, duration=5))
    assert 0 <= meter.done() < meter.total() == 5

"""The embedded server: started, read, and stopped whatever happens. A script stands in for it."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench_command.servers import BadServer
from toptwo import cli
from toptwo.bench import embedded
from toptwo.bench.embedded import embedded_server
from toptwo.errors import StartupError

BANNER = """
print('preparing', flush=True)
print('\\ntoptwo is ready\\n\\n  model     x\\n  serving   {url}\\n  key       as configured', flush=True)
"""
WAIT = "\nwhile True: time.sleep(0.01)\n"


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Make a script take the place of Python; it leaves its arguments and its end in a folder."""

    def put(program: str) -> Path:
        script = tmp_path / "python"
        script.write_text(
            f"#!{sys.executable}\n"
            "import json, os, pathlib, signal, sys, time\n"
            f"here = pathlib.Path({str(tmp_path)!r})\n"
            "def end(*_): (here / 'stopped').touch(); sys.exit()\n"
            "signal.signal(signal.SIGTERM, end)\n"
            f"(here / 'arguments').write_text(json.dumps(sys.argv[1:])){program}"
        )
        script.chmod(0o700)
        monkeypatch.setattr("toptwo.bench.embedded.sys.executable", str(script))
        return tmp_path

    return put


def test_a_measurement_without_a_url(stand_in: Callable[[str], Path], bad: BadServer) -> None:
    here = stand_in(BANNER.format(url=bad.at("good")) + WAIT)
    arguments = ["bench", "--requests", "2", "--max-tokens", "2", "--", "MODEL", "--threads", "2"]
    result = CliRunner().invoke(cli.cli, arguments)
    assert result.exit_code == 0, result.output
    assert f"bad at {bad.at('good')}" in result.output
    assert (here / "stopped").exists()
    *head, key, model, flag, value = json.loads((here / "arguments").read_text())
    assert head == ["-P", "-m", "toptwo", "serve", "--port", "0", "--api-key"]
    assert (model, flag, value) == ("MODEL", "--threads", "2")
    assert len(key) >= 24
    assert {headers["authorization"] for headers in bad.headers} == {f"Bearer {key}"}


def test_what_the_server_says_is_told(stand_in: Callable[[str], Path]) -> None:
    told: list[str] = []
    stand_in("\nprint('preparing', flush=True); time.sleep(0.2)" + BANNER.format(url="http://x/v1") + WAIT)
    with embedded_server([], told.append) as server:
        assert server.url == "http://x/v1"
    assert told[-1] == "preparing"


@pytest.mark.parametrize(
    ("last_words", "reason"),
    [
        ("toptwo: --port: taken", "ended with status 1: --port: taken"),
        ("╭─ Error ───╮\n│ No such option: --x │\n╰───╯", "ended with status 1: No such option: --x"),
        ("", "ended with status 1: without a word"),
    ],
)
def test_a_server_that_does_not_start(stand_in: Callable[[str], Path], last_words: str, reason: str) -> None:
    stand_in(f"\nprint({last_words!r}, file=sys.stderr); sys.exit(1)")
    with pytest.raises(StartupError) as caught, embedded_server([], lambda line: None):
        pass
    assert str(caught.value) == f"the embedded server {reason}"


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, None)]
)
def test_signals_stop_the_server_too(
    stand_in: Callable[[str], Path], number: signal.Signals, status: int | None
) -> None:
    here = stand_in(BANNER.format(url="http://x/v1") + WAIT)
    before = signal.getsignal(number)
    expected: type[BaseException] = SystemExit if status else KeyboardInterrupt
    with pytest.raises(expected) as caught, embedded_server([], lambda line: None):
        signal.raise_signal(number)
    assert getattr(caught.value, "code", None) == status
    assert (here / "stopped").exists()
    assert signal.getsignal(number) is before


def test_a_server_that_does_not_stop_is_killed(
    stand_in: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "STOP_SECONDS", 0.1)
    deaf = "\nsignal.signal(signal.SIGTERM, signal.SIG_IGN); (here / 'pid').write_text(str(os.getpid()))"
    here = stand_in(deaf + BANNER.format(url="http://x/v1") + WAIT)
    with embedded_server([], lambda line: None):
        pid = int((here / "pid").read_text())
    assert not Path(f"/proc/{pid}").exists()

"""The clients that people use, each in a small environment of its own, against one real server.

Makes the environments that are missing, starts a server with a tiny random model, runs every client's
checks, and prints a table. Exits with 1 if anything failed or could not be installed.

Run: make test-clients [ARGS="--only openai_python --only langchain"]
     python tests/clients/run.py --only openai_python -- -k stream
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from rich.console import Console

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS)]

import tiny  # noqa: E402
from clients.environments import CLIENTS, Client, InstallError, install, is_installed  # noqa: E402
from clients.report import Outcome, print_details, print_table, read_junit  # noqa: E402
from server_process import ServerProcess  # noqa: E402

MODEL = "tiny-moe"
ALL = (
    Client("openai_python", "openai"),
    Client("openai_node", "openai"),
    Client("ai_sdk", "ai"),
    Client("langchain", "langchain-openai"),
    Client("llm", "llm"),
    Client("instructor", "instructor"),
    Client("pydantic_ai", "pydantic-ai-slim"),
    Client("litellm", "litellm"),
    Client("anthropic_python", "anthropic"),
    Client("schemathesis", "schemathesis"),
)


def main() -> int:
    """Parse arguments, run, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", action="append", choices=[client.name for client in ALL], metavar="NAME")
    parser.add_argument("--list", action="store_true", help="name the clients and stop")
    parser.add_argument("--fail-fast", action="store_true", help="stop after the first client that fails")
    parser.add_argument("options", nargs="*", help="after --: options for pytest or node --test")
    arguments = parser.parse_args()
    chosen = [client for client in ALL if not arguments.only or client.name in arguments.only]
    console = Console()
    if arguments.list:
        for client in chosen:
            console.print(f"{client.name:18}{client.package} {client.version}", highlight=False)
        return 0
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="toptwo-clients-") as directory:
        server = start_server(Path(directory))
        try:
            environment = client_environment(server.wait_until_ready())
            for number, client in enumerate(chosen, 1):
                console.print(f"[{number}/{len(chosen)}] {client.name}", style="bold", markup=False)
                if not is_installed(client):
                    console.print("  making its environment", style="dim")
                outcomes.append(try_client(client, environment, arguments.options))
                print_details(console, outcomes[-1])
                if server.process.poll() is not None:
                    outcomes[-1].trouble = "the server ended"
                    console.print(server.err[-4000:], markup=False, highlight=False)
                    break
                if arguments.fail_fast and not outcomes[-1].good:
                    break
        finally:
            server.kill()
    print_table(console, outcomes)
    return 0 if all(outcome.good for outcome in outcomes) else 1


def start_server(directory: Path) -> ServerProcess:
    """A server that people would start, but for the size of its model."""
    tiny.write_chat_mixtral(directory / MODEL)
    return ServerProcess(directory / "server", [str(directory / MODEL), "--threads", "1"])


def client_environment(server: ServerProcess) -> dict[str, str]:
    """The environment of installers and clients: the person's, without what would point elsewhere."""
    foreign = ("OPENAI_", "ANTHROPIC_", "TOPTWO_", "PYTEST_", "PYTHON", "VIRTUAL_ENV", "NODE_OPTIONS")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return kept | {
        "OPENAI_BASE_URL": server.url,
        "OPENAI_API_KEY": server.key,
        "ANTHROPIC_BASE_URL": server.root,
        "ANTHROPIC_API_KEY": server.key,
        "MODEL": MODEL,
        "PYTHONPATH": str(CLIENTS),
    }


def try_client(client: Client, environment: dict[str, str], options: Sequence[str]) -> Outcome:
    """Install the client if need be, run its checks, and read what they said."""
    outcome = Outcome(client.name, client.version)
    began = time.monotonic()
    try:
        if not is_installed(client):
            install(client, environment)
    except InstallError as error:
        outcome.trouble = f"not installed: {error}"
    else:
        run_checks(client, environment, options, outcome)
    outcome.seconds = time.monotonic() - began
    return outcome


def run_checks(client: Client, environment: dict[str, str], options: Sequence[str], outcome: Outcome) -> None:
    """Run the checks in the client's environment. Their output is kept beside it, in output.txt."""
    report, log = client.home / "report.xml", client.home / "output.txt"
    report.unlink(missing_ok=True)
    command = node_command(client, report) if client.on_node else pytest_command(client, report)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *options],
            cwd=client.home,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(client.seconds)
        except subprocess.TimeoutExpired:
            outcome.trouble = f"no end within {client.seconds} s ({log})"
            status = 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(OSError, ElementTree.ParseError):
        read_junit(report, outcome)
    if status and not outcome.failures:
        outcome.trouble = f"the checks ended with status {status} ({log})"


def pytest_command(client: Client, report: Path) -> list[str]:
    """Run every check_*.py of the folder."""
    options = ["-p", "served", "-p", "no:cacheprovider", f"--junitxml={report}"]
    return [
        str(client.python), "-m", "pytest", "-c", str(CLIENTS / "pytest.ini"), *options, str(client.source)
    ]  # fmt: skip


def node_command(client: Client, report: Path) -> list[str]:
    """Run every check*.mjs from a copy, since Node looks for packages beside the file that imports them."""
    scripts = sorted(client.source.glob("*.mjs"))
    for script in scripts:
        (client.home / script.name).write_bytes(script.read_bytes())
    checks = [script.name for script in scripts if script.name.startswith("check")]
    reporters = ["--test-reporter=spec", "--test-reporter-destination=stdout"]
    reporters += ["--test-reporter=junit", f"--test-reporter-destination={report}"]
    return ["node", "--test", *reporters, *checks]


if __name__ == "__main__":
    sys.exit(main())

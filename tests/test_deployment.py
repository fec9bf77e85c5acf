"""The deployment files name only what exists: paths, ports, commands, settings, routes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from fakes import FakeEngine, FakeGrammars, served_model
from toptwo.api.health import Lifecycle
from toptwo.api.security import KeyRing
from toptwo.app import create_app
from toptwo.settings import ENV_PREFIX, Settings

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
INSTRUCTIONS = [
    line.split(maxsplit=1)
    for line in (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]
FINAL = INSTRUCTIONS[max(i for i, (word, _) in enumerate(INSTRUCTIONS) if word == "FROM") :]
SERVICE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["toptwo"]


def value(word: str, instructions: list[list[str]] = FINAL) -> str:
    (found,) = [rest for name, rest in instructions if name == word]
    return found


def environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in value("ENV").split())


def test_what_is_copied_exists_and_is_let_in() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"}
    for word, rest in INSTRUCTIONS:
        if word == "COPY" and not rest.startswith("--from"):
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert source in allowed, source
    assert {name for name in allowed if not (ROOT / name).exists()} == set()
    for needed in [PROJECT["readme"], *PROJECT["license-files"]]:
        assert needed in allowed


def test_the_final_stage_has_no_compiler_and_no_root() -> None:
    assert not [rest for word, rest in FINAL if word == "RUN" and re.search(r"apt-get|g\+\+|gcc", rest)]
    user = value("USER")
    assert user != "root"
    assert f"useradd --uid 10001 --create-home {user}" in value("RUN")


def test_the_command_exists() -> None:
    (entry,) = json.loads(value("ENTRYPOINT"))
    assert entry in PROJECT["scripts"]
    assert json.loads(value("CMD")) == ["serve"]


def test_the_environment_holds_settings_that_exist() -> None:
    ours = [name for name in environment() if name.startswith(ENV_PREFIX)] + SERVICE["environment"]
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields}
    assert set(ours) <= known
    assert ours


def test_ports_agree() -> None:
    port = value("EXPOSE")
    assert environment()["TOPTWO_PORT"] == port
    assert [entry.rsplit(":", 1)[1] for entry in SERVICE["ports"]] == [port]
    assert all(entry.startswith("127.0.0.1:") for entry in SERVICE["ports"])


def test_the_volume_holds_cache_and_key() -> None:
    assert SERVICE["volumes"] == [f"toptwo-data:{value('VOLUME')}"]
    assert environment()["TOPTWO_CACHE_DIR"] == value("VOLUME")
    assert environment()["HF_HOME"].startswith(value("VOLUME"))
    assert f"--owner {value('USER')} {value('VOLUME')}" in value("RUN")


def test_the_health_check_asks_a_route_that_exists() -> None:
    path = re.search(r"(/health/\w+)", value("HEALTHCHECK"))
    app = create_app(FakeEngine(), served_model(), FakeGrammars(), KeyRing.from_keys([]), Lifecycle())
    assert path is not None
    assert app.url_path_for("ready") == path[1]
    program = json.loads(value("HEALTHCHECK").split("CMD ", 1)[1])[2]
    compile(program, "healthcheck", "exec")


def test_compose_waits_longer_than_the_server_drains() -> None:
    default: int = Settings.model_fields["drain_timeout"].default
    assert int(SERVICE["stop_grace_period"].removesuffix("s")) > default


def test_docker_compose_accepts_the_file() -> None:
    for compose in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(compose[0]) and not subprocess.run([*compose, "version"], check=False).returncode:
            subprocess.run([*compose, "config", "--quiet"], cwd=ROOT, check=True)
            return
    pytest.skip("docker compose is not installed")

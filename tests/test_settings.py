"""Settings: every one on the command line and in the environment, and every mistake named."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner

from toptwo import __version__, cli, launch
from toptwo.errors import StartupError
from toptwo.settings import (
    ENV_PREFIX,
    Settings,
    environment_without_settings,
    flag_of,
    load_settings,
    unknown_variables,
)

EXAMPLES: dict[str, tuple[str, object]] = {
    "model": ("some/model", "some/model"),
    "host": ("0.0.0.0", "0.0.0.0"),
    "port": ("9000", 9000),
    "api_key": ("a-key", ("a-key",)),
    "accounts": ("on", "on"),
    "admin_key": ("another-key", ("another-key",)),
    "database_url": ("sqlite:////tmp/a.db", "sqlite:////tmp/a.db"),
    "data_dir": ("/tmp/data", Path("/tmp/data")),
    "account_grant": ("1.25", Decimal("1.25")),
    "accounts_fail_open": ("true", True),
    "public_url": ("https://llm.example.org/", "https://llm.example.org"),
    "sign_in_allow": ("@example.org", ("@example.org",)),
    "github_client_id": ("an-id", "an-id"),
    "github_client_secret": ("a-secret", "a-secret"),
    "google_client_id": ("an-id", "an-id"),
    "google_client_secret": ("a-secret", "a-secret"),
    "oidc_issuer": ("https://login.example.org", "https://login.example.org"),
    "oidc_client_id": ("an-id", "an-id"),
    "oidc_client_secret": ("a-secret", "a-secret"),
    "oidc_label": ("Ours", "Ours"),
    "served_model_name": ("name", "name"),
    "chat_template": ("/tmp/t.jinja", Path("/tmp/t.jinja")),
    "device": ("cpu", "cpu"),
    "dtype": ("bfloat16", "bfloat16"),
    "quantization": ("int4", "int4"),
    "kv_dtype": ("fp8", "fp8"),
    "random_weights": ("true", True),
    "tune": ("true", True),
    "backend": ("reference", "reference"),
    "max_model_len": ("100", 100),
    "max_num_seqs": ("7", 7),
    "max_step_tokens": ("999", 999),
    "max_queue": ("0", 0),
    "queue_timeout": ("9", 9),
    "max_requests_per_key": ("4", 4),
    "kv_cache_gib": ("1.5", 1.5),
    "threads": ("3", 3),
    "no_prefix_caching": ("true", True),
    "cache_dir": ("/tmp/x", Path("/tmp/x")),
    "default_model_wheel": ("/tmp/w.whl", Path("/tmp/w.whl")),
    "drain_timeout": ("5", 5),
    "send_timeout": ("5", 5),
    "metrics": ("off", "off"),
    "log_level": ("debug", "debug"),
}


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(ENV_PREFIX + name.upper(), raising=False)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Settings, dict[str, str]]]:
    """What `toptwo serve` would have started with."""
    calls: list[tuple[Settings, dict[str, str]]] = []
    monkeypatch.setattr(launch, "serve", lambda settings, sources, console: calls.append((settings, sources)))
    return calls


def test_there_is_an_example_of_every_setting() -> None:
    assert set(EXAMPLES) == set(Settings.model_fields)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_setting_from_the_command_line(name: str, served: list[tuple[Settings, dict[str, str]]]) -> None:
    text, value = EXAMPLES[name]
    arguments = [flag_of(name), text]
    if name == "model":
        arguments = [text]
    if value is True:
        arguments = [flag_of(name)]
    result = CliRunner().invoke(cli.cli, ["serve", *arguments])
    assert result.exit_code == 0, result.output
    ((settings, sources),) = served
    assert getattr(settings, name) == value
    assert sources == {name: flag_of(name)}


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_setting_from_the_environment(
    name: str, served: list[tuple[Settings, dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, value = EXAMPLES[name]
    monkeypatch.setenv(ENV_PREFIX + name.upper(), text)
    assert CliRunner().invoke(cli.cli, ["serve"]).exit_code == 0
    ((settings, sources),) = served
    assert getattr(settings, name) == value
    assert sources == {name: ENV_PREFIX + name.upper()}


def test_the_command_line_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOPTWO_PORT", "1")
    settings, sources = load_settings({"port": "2"})
    assert settings.port == 2
    assert sources == {"port": "--port"}


def test_several_keys(served: list[tuple[Settings, dict[str, str]]], monkeypatch: pytest.MonkeyPatch) -> None:
    CliRunner().invoke(cli.cli, ["serve", "--api-key", "one", "--api-key", "two"])
    assert served[0][0].api_key == ("one", "two")
    monkeypatch.setenv("TOPTWO_API_KEY", "three, four")
    assert load_settings({})[0].api_key == ("three", "four")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"model": ""}, "MODEL: String should have at least 1 character (got '')"),
        ({"port": "70000"}, "--port: Input should be less than or equal to 65535 (got '70000')"),
        ({"device": "tpu"}, "--device: Input should be 'auto', 'cpu' or 'cuda' (got 'tpu')"),
        ({"max_num_seqs": "0"}, "--max-num-seqs: Input should be greater than or equal to 1"),
        ({"max_queue": "-1"}, "--max-queue: Input should be greater than or equal to 0"),
        ({"queue_timeout": "0"}, "--queue-timeout: Input should be greater than or equal to 1"),
        ({"max_requests_per_key": "0"}, "--max-requests-per-key: Input should be greater than or equal to 1"),
        ({"kv_cache_gib": "-1"}, "--kv-cache-gib: Input should be greater than 0"),
        ({"kv_cache_gib": "nan"}, "--kv-cache-gib:"),
        ({"kv_cache_gib": "inf"}, "--kv-cache-gib:"),
        ({"threads": "many"}, "--threads: Input should be a valid integer"),
        ({"cache_dir": "~nobody-here/x"}, "--cache-dir: Value error, Could not determine home directory"),
        (
            {"quantization": "int3"},
            "--quantization: Input should be 'auto', 'none', 'int8', 'int4' or 'fp8' (got 'int3')",
        ),
        ({"backend": "cuda"}, "--backend: Input should be 'auto', 'cpu' or 'reference' (got 'cuda')"),
        ({"max_step_tokens": "32", "max_num_seqs": "33"}, "--max-step-tokens 32 must be at least"),
    ],
)
def test_a_bad_value_names_its_flag(flags: dict[str, object], words: str) -> None:
    with pytest.raises(StartupError) as caught:
        load_settings(flags)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["quantization", "backend", "dtype"])
def test_every_number_format_and_backend_is_accepted(name: str) -> None:
    for value in get_args(Settings.model_fields[name].annotation):
        assert getattr(load_settings({name: value})[0], name) == value


def test_a_bad_value_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOPTWO_MAX_MODEL_LEN", "long")
    with pytest.raises(StartupError, match="TOPTWO_MAX_MODEL_LEN: "):
        load_settings({})


@pytest.mark.parametrize("key", ["", " ", "None", "null", "with space", "tab\there", "ünïcode", "a\x00b"])
def test_a_weak_key_is_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(StartupError, match="--api-key: ") as caught:
        load_settings({"api_key": [key]})
    assert "got" not in str(caught.value)


def test_variables_that_are_no_settings_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOPTWO_MAX_NUM_SEQ", "3")
    monkeypatch.setenv("TOPTWO_API_KEY", "secret")
    assert unknown_variables() == ["TOPTWO_MAX_NUM_SEQ"]
    assert not [name for name in environment_without_settings() if name.startswith(ENV_PREFIX)]
    assert "PATH" in environment_without_settings()


def test_help_names_every_setting() -> None:
    result = CliRunner().invoke(cli.cli, ["serve", "--help"], env={"COLUMNS": "300"})
    assert result.exit_code == 0
    for name in Settings.model_fields:
        assert flag_of(name) in result.output, name


def test_version() -> None:
    assert CliRunner().invoke(cli.cli, ["--version"]).output == f"toptwo {__version__}\n"

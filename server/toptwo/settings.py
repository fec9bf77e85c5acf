"""All settings, each declared once: name, type, default, bounds, help text.

The command line (`--max-model-len`), the environment (`TOPTWO_MAX_MODEL_LEN`) and the README's table
are derived from these fields. The environment is read here and nowhere else. `auto` values are
resolved later, once, into a frozen config; nothing in this module looks at the machine or the model.
"""

from __future__ import annotations

import os
import re
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from toptwo.errors import StartupError

ENV_PREFIX = "TOPTWO_"
SECRETS = (
    "api_key",
    "admin_key",
    "database_url",
    "github_client_secret",
    "google_client_secret",
    "oidc_client_secret",
)
"""Fields that are shown to nobody, and not handed to other processes."""

_LOOPBACK = ("localhost", "127.0.0.1", "::1")

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["auto", "none", "int8", "int4", "fp8"]
KVDtype = Literal["auto", "fp8"]
Backend = Literal["auto", "cpu", "reference"]
MetricsAccess = Literal["key", "open", "off"]
AccountsUse = Literal["auto", "on", "off"]
LogLevel = Literal["debug", "info", "warning", "error"]


class Settings(BaseSettings):
    """What a person can configure. Field descriptions are the `--help` texts."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="ignore")

    model: str | None = Field(
        None,
        min_length=1,
        description="Checkpoint directory, GGUF file or hub id; without it, the embedded default model.",
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    api_key: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Accepted bearer key; repeatable (comma-separated in the environment)."
    )
    accounts: AccountsUse = Field(
        "auto",
        description="Accounts with keys, limits and credit; auto is on where there is a database of them or "
        "an admin key.",
    )
    admin_key: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Key that may manage accounts, and nothing else; repeatable."
    )
    database_url: str | None = Field(
        None,
        min_length=1,
        description="Where accounts are kept: sqlite:///PATH or postgresql://USER@HOST/NAME; by default "
        "accounts.db in the data directory.",
    )
    data_dir: Path = Field(Path("~/.local/share/toptwo"), description="Where accounts are kept.")
    account_grant: Decimal = Field(
        Decimal("0.5"),
        ge=0,
        le=1_000_000,
        decimal_places=6,
        description="Credits that a new account begins with.",
    )
    accounts_fail_open: bool = Field(
        False,
        description="While the accounts' database cannot be used, serve keys that are known, uncharged; "
        "otherwise they get a 503.",
    )
    public_url: str | None = Field(
        None, description="Where browsers reach the server, as https://llm.example.org; for signing in."
    )
    sign_in_allow: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Who may sign in at the console: an e-mail address, @domain, or * for everybody; "
        "repeatable.",
    )
    github_client_id: str | None = Field(
        None, min_length=1, description="Client id at GitHub, for people to sign in with it."
    )
    github_client_secret: str | None = Field(None, min_length=1, description="The secret that goes with it.")
    google_client_id: str | None = Field(
        None, min_length=1, description="Client id at Google, for people to sign in with it."
    )
    google_client_secret: str | None = Field(None, min_length=1, description="The secret that goes with it.")
    oidc_issuer: str | None = Field(
        None, description="Any other OpenID Connect provider, as https://login.example.org."
    )
    oidc_client_id: str | None = Field(None, min_length=1, description="Client id at that provider.")
    oidc_client_secret: str | None = Field(None, min_length=1, description="The secret that goes with it.")
    oidc_label: str = Field(
        "OpenID Connect", min_length=1, max_length=40, description="What people call that provider."
    )
    served_model_name: str | None = Field(
        None, min_length=1, description="Model id that clients use; by default the model's own name."
    )
    chat_template: Path | None = Field(
        None, description="Jinja file that replaces the model's chat template, or gives it one."
    )
    device: Device = Field("auto", description="Where the model runs; auto is the processor.")
    dtype: Dtype = Field(
        "auto",
        description="Number format of weights and KV cache; auto is float32, with float16 for the KV cache "
        "of a quantised model, and bfloat16 on a GPU.",
    )
    quantization: Quantization = Field(
        "auto", description="Weight format; auto is int8, or none on a GPU or where a dtype is asked for."
    )
    kv_dtype: KVDtype = Field("auto", description="Number format of the KV cache; fp8 halves it on a GPU.")
    random_weights: bool = Field(
        False,
        description="Make up the weights instead of reading them, to measure a machine with a model's shape; "
        "what such a model says means nothing.",
    )
    tune: bool = Field(
        False,
        description="Measure which kernel configurations are fastest for the model on this GPU before it is "
        "served; takes minutes, and the result is kept in the cache directory.",
    )
    backend: Backend = Field(
        "auto", description="Kernels: auto is the native ones where they were built, else the reference."
    )
    max_model_len: int | None = Field(
        None,
        ge=1,
        le=1 << 24,
        description="Longest prompt plus output, in tokens; by default the model's context.",
    )
    max_num_seqs: int = Field(64, ge=1, le=4096, description="Most sequences that run in one step.")
    max_step_tokens: int = Field(
        512, ge=1, le=65536, description="Token budget of one step; longer prompts run in chunks."
    )
    max_queue: int = Field(
        256,
        ge=0,
        le=1 << 16,
        description="Most sequences that wait beyond those that run; further requests get a 503.",
    )
    queue_timeout: int = Field(
        60,
        ge=1,
        le=86400,
        description="Seconds that a request may wait for its first step, then it gets a 503.",
    )
    max_requests_per_key: int | None = Field(
        None,
        ge=1,
        le=1 << 16,
        description="Most requests of one key at once, each choice counted; further ones get a 429.",
    )
    kv_cache_gib: float | None = Field(
        None, gt=0, le=1 << 20, description="Memory for the KV cache in GiB; by default sized to the machine."
    )
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads of the model; by default one per core."
    )
    no_prefix_caching: bool = Field(False, description="Do not reuse the KV of shared prompt prefixes.")
    cache_dir: Path = Field(Path("~/.cache/toptwo"), description="Where prepared models are kept.")
    default_model_wheel: Path | None = Field(
        None, description="Local copy of the default model's wheel, for machines without a registry."
    )
    drain_timeout: int = Field(
        60, ge=0, le=3600, description="Seconds that open requests may take to end after SIGTERM or Ctrl-C."
    )
    send_timeout: int = Field(
        60,
        ge=1,
        le=3600,
        description="Seconds after which a client that takes nothing of its answer is disconnected.",
    )
    metrics: MetricsAccess = Field(
        "key", description="Who may read /metrics: callers with a key, anybody, or nobody."
    )
    log_level: LogLevel = Field("info", description="Least severe messages that are logged.")

    @property
    def signs_in(self) -> bool:
        """Whether people can sign in with a provider of identities."""
        return bool(self.github_client_id or self.google_client_id or self.oidc_client_id)

    @field_validator("api_key", "admin_key", "sign_in_allow", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value

    @field_validator("api_key", "admin_key")
    @classmethod
    def _refuse_weak_keys(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        # An empty secret has switched authentication off in other servers; here it is a mistake.
        for key in keys:
            if not key.strip() or key.lower() in {"none", "null"}:
                raise ValueError("a key is empty; give a real one, or none at all to have one created")
            if not key.isascii() or any(c.isspace() or not c.isprintable() for c in key):
                raise ValueError("a key must be printable ASCII without spaces")
        return keys

    @field_validator("sign_in_allow")
    @classmethod
    def _refuse_unclear_guests(cls, entries: tuple[str, ...]) -> tuple[str, ...]:
        for entry in entries:
            if entry != "*" and not re.fullmatch(r"[^@\s]*@[^@\s]+", entry):
                raise ValueError("each must be an e-mail address, @domain or *")
        return entries

    @field_validator("public_url", "oidc_issuer")
    @classmethod
    def _refuse_open_lines(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError("it must be an address like https://example.org")
        if parts.scheme == "http" and parts.hostname not in _LOOPBACK:
            raise ValueError("it must begin with https://, unless it is on this machine")
        return url

    @field_validator("public_url")
    @classmethod
    def _refuse_path(cls, url: str | None) -> str | None:
        if url is not None and urlsplit(url).path.strip("/"):
            raise ValueError("it must be an address without a path")
        return url and url.rstrip("/")

    @field_validator("cache_dir", "data_dir", "chat_template", "default_model_wheel")
    @classmethod
    def _expand_home(cls, path: Path | None) -> Path | None:
        try:
            return path.expanduser() if path else None
        except RuntimeError as error:
            raise ValueError(str(error)) from None


def check_supported(settings: Settings) -> None:
    """Refuse, before anything is fetched or loaded, what this version cannot do at all.

    Raises StartupError that names the setting.
    """
    if settings.max_step_tokens < settings.max_num_seqs:
        raise StartupError(
            f"--max-step-tokens {settings.max_step_tokens} must be at least "
            f"--max-num-seqs {settings.max_num_seqs}, or not every sequence could take a step"
        )


def environment_without_settings() -> dict[str, str]:
    """The environment for a process that gets its settings in another way, and is to see no key."""
    return {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}


def client_key() -> tuple[str, str] | None:
    """The key with which a client of any server is to identify itself, and the variable that holds it."""
    for name in (f"{ENV_PREFIX}API_KEY", "OPENAI_API_KEY"):
        if key := os.environ.get(name, "").split(",")[0].strip():  # of several accepted keys, the first
            return key, name
    return None


def unknown_variables() -> list[str]:
    """Variables that look like settings and are none: misspelt ones would be ignored in silence."""
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields}
    return sorted(name for name in os.environ if name.startswith(ENV_PREFIX) and name not in known)


def flag_of(field: str) -> str:
    """The command-line flag of a field: `max_model_len` -> `--max-model-len`."""
    return "MODEL" if field == "model" else "--" + field.replace("_", "-")


def load_settings(flags: dict[str, object]) -> tuple[Settings, dict[str, str]]:
    """Settings from flags, then environment, then defaults, and the source of each non-default one.

    flags: field name -> value, only those given on the command line.
    Raises StartupError with one line that names the flag or variable, also for a value that this
    version cannot honour.
    """
    try:
        settings = Settings(**flags)  # type: ignore[arg-type]
    except ValidationError as error:
        raise StartupError("; ".join(_explain(dict(e), flags) for e in error.errors())) from None
    check_supported(settings)
    sources = {
        name: flag_of(name) if name in flags else ENV_PREFIX + name.upper()
        for name in sorted(settings.model_fields_set)
        if getattr(settings, name) != Settings.model_fields[name].default
    }
    return settings, sources


def _explain(error: dict[str, object], flags: dict[str, object]) -> str:
    location = error["loc"]
    field = str(location[0]) if isinstance(location, tuple) and location else "settings"
    source = flag_of(field) if field in flags else ENV_PREFIX + field.upper()
    shown = "" if field in SECRETS else f" (got {error.get('input')!r})"
    return f"{source}: {error['msg']}{shown}"

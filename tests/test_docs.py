"""What exists is documented, and what is documented exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

import pytest
from starlette.routing import Route

from fakes import FakeEngine, FakeGrammars, served_model
from toptwo.accounts.book import AccountBook
from toptwo.accounts.database import Database
from toptwo.api.admin import PREFIX as ADMIN_PREFIX
from toptwo.api.health import Lifecycle
from toptwo.api.pages import CONSOLE, read_pages
from toptwo.api.security import KeyRing
from toptwo.app import OPENAI_PREFIXES, AppOptions, create_app
from toptwo.identity.opening import SignIn
from toptwo.identity.provider import GuestList
from toptwo.models.registry import ARCHITECTURES
from toptwo.settings import ENV_PREFIX, Settings, flag_of
from toptwo_kernels.ops import Ops
from toptwo_kernels.registry import BACKENDS, GPU_BACKENDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [*sorted(ROOT.glob("*.md")), ROOT / "kernels" / "README.md"]


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_has_its_row(name: str) -> None:
    row = re.search(rf"^\| `{flag_of(name)}` \| `{ENV_PREFIX}{name.upper()}` \| (.+?) \|", README, re.M)
    assert row, f"README.md has no row for {flag_of(name)}"
    default = Settings.model_fields[name].default
    if isinstance(default, int | float | str | Path) and not isinstance(default, bool):
        assert row[1].strip("`") == str(default)


def test_no_setting_is_invented() -> None:
    rows = re.findall(r"^\| `(\S+)` \| `TOPTWO_", README, re.M)
    assert sorted(rows) == sorted(flag_of(name) for name in Settings.model_fields)


def test_every_route_is_listed() -> None:
    sign_in = SignIn((), GuestList(()), "https://llm.example.org")
    options = AppOptions(book=AccountBook(cast(Database, None)), sign_in=sign_in)
    app = create_app(
        FakeEngine(), served_model(), FakeGrammars(), KeyRing.from_keys([]), Lifecycle(), options
    )
    paths = {route.path for route in routes_of(app) if isinstance(route, Route)}
    paths -= set(read_pages()) - {CONSOLE}  # the parts of a page
    assert len(paths) > 4
    for path in paths:
        prefix = next((p for p in OPENAI_PREFIXES if path.startswith(p)), None)
        shown = path if prefix is None else OPENAI_PREFIXES[0] + path.removeprefix(prefix)
        shown = shown.removeprefix(ADMIN_PREFIX).replace("{model_id:path}", "{id}")
        assert f"{shown}`" in README, path
    for prefix in OPENAI_PREFIXES:
        assert f"`{prefix}`" in README or f"{prefix}/" in README


def routes_of(app: object) -> list[object]:
    """All routes, those of included routers too."""
    found = []
    for route in getattr(app, "routes", []):
        found += [route, *routes_of(getattr(route, "original_router", None) or getattr(route, "app", None))]
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_has_its_row(name: str) -> None:
    assert f"`models/{name}.py`" in README
    assert (ROOT / "server/toptwo/models" / f"{name}.py").exists()


def test_every_op_and_backend_is_described() -> None:
    text = (ROOT / "kernels" / "README.md").read_text()
    for name in [op for op in vars(Ops) if not op.startswith("_")] + list(BACKENDS + GPU_BACKENDS):
        assert re.search(rf"^\|[^|]*`{name}`[^|]*\|", text, re.M), name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_files_exist(path: Path) -> None:
    text = path.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (path.parent / target).exists(), target
    for target in re.findall(r"`((?:tests|server|kernels|\.ci)/[\w./]+)`", text):
        assert (ROOT / target).exists(), target
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.M):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target


@pytest.mark.parametrize(
    "path", sorted((ROOT / "tests" / "clients").glob("*/snippet.*")), ids=lambda p: p.parent.name
)
def test_every_client_has_its_snippet(path: Path) -> None:
    """What the README shows is what `make test-clients` runs."""
    assert path.read_text().rstrip() in README


def test_the_tour_visits_files_that_exist() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    names = set(re.findall(r"`((?:\w+/)*\w+\.py)`", text)) - {"tests"}
    assert len(names) > 30
    for name in names:
        places = [ROOT / "server/toptwo" / name, ROOT / "kernels" / name, ROOT / name]
        assert any(place.exists() for place in places), name


def test_the_version_is_the_same_everywhere() -> None:
    from toptwo import __version__

    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()

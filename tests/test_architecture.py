"""The house stays as designed: who imports whom, what nobody may use, how large a room may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SERVER, KERNELS = ROOT / "server" / "toptwo", ROOT / "kernels" / "toptwo_kernels"
SOURCES = sorted([*SERVER.rglob("*.py"), *KERNELS.rglob("*.py")])

LEAVES = {"settings", "errors", "messages", "heap"}
# A room and the rooms it may import besides itself and the leaves. Whatever is not here may import nothing.
ARROWS: dict[str, set[str]] = {
    "__init__": set(),
    "__main__": {"cli"},
    "cli": {"launch", "bench", "account_commands", "model_commands", "option_groups", "__init__"},
    "option_groups": set(),
    "accounts": set(),
    "identity": set(),
    "account_commands": {"accounts", "option_groups"},
    "launch": {
        *("app", "api", "accounts", "identity", "text", "telemetry", "engine"),
        *("source", "banner", "local_key"),
    },
    "launch_engine": {"engine", "runtime", "telemetry"},
    "source": {"default_model", "gguf"},
    "model_commands": {
        *("runtime", "models", "layers", "moe", "kernels"),
        *("source", "default_model", "gguf", "text"),
    },
    "bench": {"local_key", "__init__"},
    "banner": {"local_key", "__init__"},
    "local_key": set(),
    "app": {"api", "accounts", "identity", "text", "telemetry", "engine"},
    "api": {"accounts", "identity", "text", "telemetry", "engine", "__init__"},
    "text": set(),
    "telemetry": set(),
    "engine": set(),
    "runtime": {"models", "layers", "moe", "kernels", "gguf"},
    "models": {"layers", "moe", "kernels"},
    "layers": {"kernels"},
    "moe": {"kernels"},
    "default_model": {"gguf"},
    "gguf": set(),
    **{leaf: set() for leaf in LEAVES},
}
# settings explains its mistakes as a StartupError; otherwise leaves import nothing of ours.
LEAF_IMPORTS = {"settings": {"errors"}, "errors": set(), "messages": set(), "heap": set()}

TORCH_FREE = (
    "engine",
    "api",
    "accounts",
    "identity",
    "text",
    "telemetry",
    "app",
    "cli",
    "launch",
    "source",
    "bench",
    *LEAVES,
)
TRAINING_ONLY = SERVER / "default_model" / "train_router.py"


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "toptwo":
                yield from (f"toptwo.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""


def room_of(path: Path) -> str:
    if path.is_relative_to(KERNELS):
        return "kernels"
    relative = path.relative_to(SERVER)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def room_of_import(name: str) -> str | None:
    """The room that an import leads to; None outside this project."""
    head, *rest = name.split(".")
    if head == "toptwo_kernels":
        return "kernels"
    if head != "toptwo":
        return None
    return (
        rest[0]
        if (rest and (SERVER / rest[0]).exists()) or (SERVER / f"{rest[0]}.py").exists()
        else "__init__"
    )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path: Path) -> None:
    room = room_of(path)
    if room == "kernels":
        allowed = {"kernels"}
    elif room in LEAVES:
        allowed = LEAF_IMPORTS[room]
    else:
        allowed = ARROWS[room] | LEAVES | {room}
    found = {target for name in imports(path) if (target := room_of_import(name))}
    assert found <= allowed, f"{room} must not import {sorted(found - allowed)}"


def test_every_room_has_its_arrows() -> None:
    assert {room_of(path) for path in SOURCES} - {"kernels"} == set(ARROWS)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_torch_outside_the_model(path: Path) -> None:
    if room_of(path) in TORCH_FREE:
        heavy = {name.split(".")[0] for name in imports(path)} & {"torch", "transformers", "safetensors"}
        assert not heavy


def test_an_engine_process_needs_no_api() -> None:
    program = (
        "import sys\n"
        "for name in ('fastapi', 'starlette', 'uvicorn', 'tokenizers', 'jinja2', 'toptwo.api'):\n"
        "    sys.modules[name] = None\n"
        "import toptwo.launch_engine, toptwo.engine.engine, toptwo.engine.transport, toptwo.runtime.build\n"
        "import toptwo.models.mixtral, toptwo.settings, toptwo.telemetry.logs\n"
        "print('imported')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "imported\n", done.stderr


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("toptwo.engine.engine", ["torch", "fastapi", "starlette", "numpy", "toptwo.runtime"]),
        ("toptwo.engine.supervisor", ["torch", "fastapi", "starlette", "numpy", "toptwo.runtime"]),
        ("toptwo.launch", ["torch", "transformers", "toptwo.runtime", "toptwo.models"]),
        ("toptwo.bench.command", ["torch", "numpy", "fastapi", "matplotlib", "toptwo.engine", "toptwo.api"]),
    ],
)
def test_importing_brings_no_stranger_along(module: str, forbidden: list[str]) -> None:
    """In a process of its own, with the forbidden modules impossible to import."""
    program = (
        f"import sys\nfor name in {forbidden!r}: sys.modules[name] = None\nimport {module}\nprint('imported')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "imported\n", done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_environment_is_read_in_one_place(path: Path) -> None:
    """What else no room may do is in tests/security/test_sources.py."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
            assert room_of(path) == "settings", f"line {node.lineno}: only settings reads the environment"


MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 400, 60, 6
RECEIVERS = ("self", "cls", "tape", "device")  # bound before anybody calls, as the ops to a tape or a device


def is_gpu_program(node: ast.AST) -> bool:
    """What Triton compiles: it can be given no structs, and calls cannot always divide it."""
    if not isinstance(node, ast.FunctionDef):
        return False
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_stay_small_and_say_what_they_are(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree) or not text.strip(), "a module says what it knows"
    assert text.count("\n") <= MAX_FILE_LINES
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_gpu_program(node):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"
            given = [argument.arg for argument in node.args.args + node.args.kwonlyargs]
            count = len([name for name in given if name not in RECEIVERS])
            assert count <= MAX_PARAMETERS or path == TRAINING_ONLY, f"{node.name} takes {count} parameters"

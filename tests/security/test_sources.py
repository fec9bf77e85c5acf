"""What our own source never does, read from its syntax: so that the next change does not begin to."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import toptwo
import toptwo_kernels

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path for package in (toptwo, toptwo_kernels) for path in Path(package.__file__ or "").parent.rglob("*.py")
)

# Modules that are never imported, and why.
IMPORTS = {
    **dict.fromkeys(
        ("pickle", "cPickle", "cloudpickle", "dill", "joblib", "jsonpickle"), "unpickling runs code"
    ),
    **dict.fromkeys(("marshal", "shelve", "copyreg", "multiprocessing"), "these unpickle or run code"),
    **dict.fromkeys(("ray", "torch.distributed", "torch.multiprocessing"), "these listen without a key"),
    **dict.fromkeys(("transformers", "vllm"), "these read a config that may name code"),
    **dict.fromkeys(
        ("multipart", "python_multipart", "xml", "lxml", "yaml"), "parsers that requests do not need"
    ),
    **dict.fromkeys(("sqlite3", "psycopg"), "SQL is SQLAlchemy's to write"),
    **dict.fromkeys(("requests", "aiohttp", "httpx", "websockets"), "nothing is fetched in another way"),
}
NAMES = {
    **dict.fromkeys(
        ("eval", "exec", "compile", "literal_eval", "__import__", "execfile"), "runs text as code"
    ),
    **dict.fromkeys(("recv_pyobj", "send_pyobj", "recv_serialized", "broadcast_object_list"), "pickles"),
    **dict.fromkeys(
        ("Unpickler", "trust_remote_code", "AutoModel", "AutoTokenizer", "AutoConfig"), "runs code"
    ),
    **dict.fromkeys(("Environment", "SandboxedEnvironment", "NativeEnvironment", "Template"), "no sandbox"),
    **dict.fromkeys(("Form", "File", "UploadFile", "StaticFiles", "FileResponse"), "forms and files"),
    **dict.fromkeys(("CORSMiddleware", "WebSocket", "APIWebSocketRoute"), "other origins"),
    **dict.fromkeys(("system", "popen", "getoutput", "getstatusoutput"), "a shell"),
}
DOTTED = {
    "torch.load",
    "np.load",
    "numpy.load",
    "torch.jit.load",
    "torch.hub.load",
    "os.execv",
    "importlib.import_module",
}

# Not parts of a server: they made files of the default model, and the architecture test keeps them apart.
TRAINING_ONLY = ("default_model/train_router.py", "default_model/training/chat.py")


def dotted(node: ast.expr) -> str:
    """`a.b.c` as text, as far as it is only names."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=attr):
            return f"{dotted(value)}.{attr}"
    return ""


def imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(module, name in it or "") of every import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


def offences(tree: ast.Module) -> Iterator[str]:
    """Everything in a module's syntax that is on a list above."""
    for module, name in imported(tree):
        parents = {module, f"{module}.{name}"} | {".".join(module.split(".")[:n]) for n in range(1, 4)}
        yield from sorted(f"import {bad}: {IMPORTS[bad]}" for bad in parents & set(IMPORTS))
        if name in NAMES:
            yield f"import {module}.{name}: {NAMES[name]}"
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=func):
                # A method called compile, as of regular expressions, is none that runs code.
                name = dotted(func).rpartition(".")[2]
                if name in NAMES and not dotted(func).endswith(("re.compile", ".eval")):
                    yield f"line {node.lineno}: {name}: {NAMES[name]}"
            case ast.Attribute() if dotted(node) in DOTTED:
                yield f"line {node.lineno}: {dotted(node)}"
            case ast.keyword(arg="shell" | "trust_remote_code" | "allow_pickle", value=value):
                if not (isinstance(value, ast.Constant) and value.value is False):
                    yield f"line {value.lineno}: {node.arg}"


def is_ours(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=is_ours)
def test_nothing_of_the_lists_is_used(path: Path) -> None:
    found = list(offences(ast.parse(path.read_text())))
    if path.name == "registry.py":  # architectures and backends, by names out of a list of ours
        found = [each for each in found if "import_module" not in each]
    if any(path.match(each) for each in TRAINING_ONLY):
        found = [each for each in found if "import transformers" not in each]
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from multiprocessing.connection import Listener",
        "from torch import distributed",
        "import torch.distributed as dist",
        "from jinja2 import Template",
        "jinja2.Environment()",
        "environment.Template('x')",
        "ast.literal_eval(x)",
        "eval(x)",
        "socket.recv_pyobj()",
        "torch.load(x, weights_only=True)",
        "load = torch.load",
        "numpy.load(x, allow_pickle=True)",
        "subprocess.run(x, shell=True)",
        "from fastapi import Form",
        "AutoModel.from_pretrained(x, trust_remote_code=flag)",
    ],
)
def test_the_lists_are_looked_for(source: str) -> None:
    """A test that finds nothing finds nothing in clean source alone."""
    assert list(offences(ast.parse(source)))


def libraries_of(path: Path) -> set[str]:
    return {module.split(".")[0] for module, _ in imported(ast.parse(path.read_text()))}


def sql_texts(tree: ast.Module) -> Iterator[str]:
    """Where SQL is given as text that was put together, whatever it is made of."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=func, args=[given, *_]) if dotted(func).rpartition(".")[2] in SQL_CALLS:
                if not isinstance(given, ast.Constant):
                    yield f"line {node.lineno}: {ast.unparse(node)}"


SQL_CALLS = {"text", "exec_driver_sql", "literal_column"}
# Names of tables and numbers of our own, where no value of anybody's has a place.
SQL_MADE_OF_CONSTANTS = {
    "accounts/database.py": "BEGIN",
    "accounts/migrations/__init__.py": "pg_advisory_xact_lock",
}


SQL_SOURCES = [path for path in SOURCES if libraries_of(path) & {"sqlalchemy", "alembic"}]


@pytest.mark.parametrize("path", SQL_SOURCES, ids=is_ours)
def test_values_reach_the_database_as_values(path: Path) -> None:
    known = next((words for name, words in SQL_MADE_OF_CONSTANTS.items() if path.match(name)), None)
    found = [each for each in sql_texts(ast.parse(path.read_text())) if not (known and known in each)]
    assert not found
    tree = ast.parse("connection.exec_driver_sql(f'SELECT {x}')")
    assert list(sql_texts(tree))


@pytest.mark.parametrize("path", SQL_SOURCES, ids=is_ours)
def test_only_accounts_know_sql(path: Path) -> None:
    # Those outside hand transactions around, and write nothing themselves.
    assert "accounts" in path.parts or path.name in {"office.py", "admin.py", "self_service.py"}


SECRETS = ("api/security.py", "api/anthropic.py", "local_key.py")


@pytest.mark.parametrize("name", SECRETS)
def test_cve_2025_59425_no_secret_is_compared_with_equals(name: str) -> None:
    """vLLM: `==` on keys. Lengths and schemes may be compared, keys and their digests may not."""
    tree = ast.parse((Path(toptwo.__file__ or "").parent / name).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and any(
            isinstance(op, ast.Eq | ast.NotEq | ast.In | ast.NotIn) for op in node.ops
        ):
            for side in (node.left, *node.comparators):
                assert dotted(side).rpartition(".")[2] not in {
                    "key",
                    "presented",
                    "digest",
                    "known",
                    "secret",
                }


def modules_of(path: Path) -> set[str]:
    return {module for module, _ in imported(ast.parse(path.read_text()))}


def test_only_these_rooms_speak_to_others() -> None:
    """Whoever could fetch something: the loader of the default model, the bench, the hub of --model, and who
    asks providers of identities."""
    networks = {"httpx2", "urllib", "http", "socket", "ssl", "ftplib", "huggingface_hub", "smtplib"}
    found = {
        path.relative_to(Path(toptwo.__file__ or "").parent).parts[0]
        for path in SOURCES
        if path.is_relative_to(Path(toptwo.__file__ or "").parent)
        and {module.split(".")[0] for module in modules_of(path) - {"urllib.parse"}} & networks
        and not path.is_relative_to(Path(toptwo.__file__ or "").parent / "api")
    }
    assert found <= {"bench", "default_model", "identity", "source.py", "launch.py", "model_commands"}

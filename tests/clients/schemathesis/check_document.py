"""The OpenAPI document against the server: no answer that it does not name, and never a 5xx."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

# Left out: "negative_data_rejection" and "positive_data_acceptance" - whether a request makes sense depends
# on more than a schema can say (an unknown model, a contradiction between two fields).
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
)
SECONDS = 50


@pytest.fixture(scope="session")
def document(url: str) -> str:
    return url.removesuffix("/v3/openai") + "/openapi.json"


@pytest.fixture(scope="session")
def copy(document: str, key: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy on disk, for the runs without a key, which may not have it."""
    request = urllib.request.Request(document, headers={"Authorization": f"Bearer {key}"})
    path = tmp_path_factory.mktemp("document") / "openapi.json"
    with urllib.request.urlopen(request, timeout=30) as answer:
        path.write_bytes(answer.read())
    return path


def schemathesis(directory: Path, *arguments: str) -> str:
    """Run it; returns what it printed. Fails where it found something, or tested nothing."""
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("schemathesis")), "run", *arguments,
            "--checks", ",".join(CHECKS), "--max-time", str(SECONDS), "--max-examples", "20",
            "--phases", "examples,coverage,fuzzing", "--seed", "1", "--no-color", "--request-timeout", "30",
            "--generation-database", "none",
            "--exclude-path-regex", "^/(v3/openai|openai/v1)/",  # the same routes as under /v1
            "--exclude-path", "/v1/embeddings",  # it answers 501 by design, which counts as a server error
        ],
        cwd=directory,
        env=dict(os.environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS + 60,
        check=False,
    )  # fmt: skip
    found = re.findall(r"ST\d+ .+: \d+$", done.stdout, re.M) or ["it could not run"]
    assert done.returncode == 0, "; ".join(found) + "\n" + done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"[1-9]\d* generated", done.stdout), done.stdout[-2000:]
    return done.stdout


def test_the_document_needs_a_key(document: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(document, timeout=30)
    assert refusal.value.code == 401


def test_with_a_key(document: str, key: str, tmp_path: Path) -> None:
    schemathesis(tmp_path, document, "--header", f"Authorization: Bearer {key}")


def test_without_a_key(copy: Path, document: str, tmp_path: Path) -> None:
    schemathesis(tmp_path, str(copy), "--url", document.removesuffix("/openapi.json"))

"""The README's own snippets, run as they stand against a server; only address and key are put in place.

Those of other clients are run by `make test-clients`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from server_process import ServerProcess

README = (Path(__file__).parents[2] / "README.md").read_text()


def snippets(language: str, containing: str) -> list[str]:
    own = README.partition("### Other clients")[0]
    blocks = re.findall(rf"```{language}\n(.*?)```", own, re.S)
    found = [block for block in blocks if containing in block]
    assert found
    return found


def test_the_snippets_run(start: Callable[..., ServerProcess], tmp_path: Path) -> None:
    home = tmp_path / "home"
    cache = home / ".cache" / "toptwo"
    server = start("--served-model-name", "smol-moe-8x135m", TOPTWO_CACHE_DIR=str(cache)).wait_until_ready()
    environment = {**os.environ, "HOME": str(home)}

    def in_place(snippet: str) -> str:
        assert "http://127.0.0.1:8000" in snippet
        return snippet.replace("http://127.0.0.1:8000", server.root)

    for snippet in snippets("python", "openai"):
        command = [sys.executable, "-c", in_place(snippet)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout
    for snippet in snippets("sh", "curl"):
        command = ["sh", "-c", in_place(snippet)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.rstrip().endswith("data: [DONE]")

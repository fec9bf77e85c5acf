"""Seconds from `git clone` to the first token, for the first start and for the second.

Clones this repository to a temporary directory and runs `make serve` there with an empty cache, as a
newcomer would; then once more. Downloads everything that a newcomer downloads.

Run: make bench-start
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[2]


def start_and_ask(clone: Path, began: float) -> dict[str, float]:
    """Seconds since `began` to a ready server and to the first token of its first answer."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TOPTWO_")}
    environment |= {"TOPTWO_CACHE_DIR": str(clone / "cache")}
    output = clone / "output"
    with output.open("wb") as file:
        server = subprocess.Popen(
            ["make", "serve", "ARGS=--port 0 --api-key bench-key"],
            cwd=clone,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        while "Try it" not in output.read_text():
            if server.poll() is not None:
                raise SystemExit(output.read_text())
            time.sleep(0.02)
        ready = time.monotonic() - began
        url = re.search(r"serving +(\S+)", output.read_text())[1]  # type: ignore[index]
        body = {
            "model": "smol-moe-8x135m",
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "stream": True,
        }
        request = urllib.request.Request(
            f"{url}/chat/completions",
            json.dumps(body).encode(),
            {"Authorization": "Bearer bench-key", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as response:
            for line in response:
                if line.startswith(b"data: ") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                    return {"ready": ready, "first token": time.monotonic() - began}
        raise SystemExit("no token came")
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        clone = Path(directory) / "toptwo"
        began = time.monotonic()
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        for start in ("first", "second"):
            figures = start_and_ask(clone, began)
            print(f"{start} start: " + ", ".join(f"{k} after {v:.1f} s" for k, v in figures.items()))
            began = time.monotonic()


if __name__ == "__main__":
    main()

"""What a person reads when the server is ready: the line to copy is one that works."""

from __future__ import annotations

import io
import json
import shlex

import pytest
from rich.console import Console

from toptwo.banner import print_chat_off, print_key


@pytest.mark.parametrize(
    ("has_chat", "path", "asks"), [(True, "/chat/completions", "messages"), (False, "/completions", "prompt")]
)
def test_the_line_that_tries_it(has_chat: bool, path: str, asks: str) -> None:
    out = io.StringIO()
    print_key(Console(file=out), None, "http://here:1/v3/openai", "org/it's", has_chat=has_chat)
    (line,) = (line for line in out.getvalue().splitlines() if "curl" in line)
    words = shlex.split(line)
    assert f"http://here:1/v3/openai{path}" in words
    body = json.loads(words[words.index("-d") + 1])
    assert body["model"] == "org/it's"
    assert body[asks]


def test_no_chat_is_said() -> None:
    out = io.StringIO()
    print_chat_off(Console(file=out))
    assert "no chat template" in out.getvalue()
    assert "--chat-template FILE" in out.getvalue()

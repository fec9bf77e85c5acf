"""Grammars that force the shape of an answer, and the check that one can be used at all.

A grammar is a serialised text for llguidance; the engine makes its matcher from the same text. Only
callers know what they ask for, and a grammar can be small and yet cost gigabytes or minutes to compile.
So it is compiled in a process of its own first, which has a limit on memory and is killed when it is late.

Knows schemas, regular expressions and Lark grammars as data; must not know tools, HTTP or the engine.
Nothing of llguidance is loaded in this process.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import re
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

MAX_GRAMMAR_BYTES = 256 * 1024
_TOO_LARGE = f"The grammar is larger than {MAX_GRAMMAR_BYTES // 1024} KiB."
MAX_SCHEMA_DEPTH = 64
CHECK_SECONDS = 2.0  # the engine compiles it once more, while other requests wait
WORKER_BYTES = 1024**3  # address space of the worker
_START_SECONDS = 60.0  # a large vocabulary takes a while to load on a busy machine
_END_SECONDS = 1.0  # until a worker that nobody writes to is gone by itself
_NUM_CACHED = 1024
# A verdict of "too slow" may be the fault of a busy machine, so it does not hold for ever.
_DOUBT_SECONDS = 60.0
_MOST_REASON = 200  # characters of the library's reason that a caller sees

# One blank or one line break with its indent: free space without end would let a model write nothing else.
_JSON_OPTIONS = {"whitespace_pattern": r"\x20|\n[\x20\t]{0,32}"}

_MAPS_OF_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_LISTS_OF_SCHEMAS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems", "items"})
_SCHEMAS = frozenset(
    {
        "additionalItems",
        "additionalProperties",
        "contains",
        "else",
        "if",
        "items",
        "not",
        "propertyNames",
        "then",
        "unevaluatedItems",
        "unevaluatedProperties",
    }
)


class GrammarError(Exception):
    """The grammar cannot be used; the message is one short sentence for the caller."""


def json_object_grammar() -> str:
    """Any JSON object."""
    return json_schema_grammar({"type": "object"})


def json_schema_grammar(schema: object) -> str:
    """JSON that obeys the schema; properties come in the schema's order.

    Raises GrammarError when it is no schema, too deep or too large.
    """
    return _serialised({"json_schema": json_schema(schema)})


def regex_grammar(regex: str) -> str:
    """A text that the whole regular expression matches."""
    # In Lark a regular expression stands between slashes, on one line.
    inner = re.sub(r"\\.|/|\n", _escape_in_lark, regex, flags=re.DOTALL)
    return _serialised({"lark_grammar": f"start: /{inner}/"})


def lark_grammar(text: str) -> str:
    """A text of llguidance's variant of Lark; the rule is `start`."""
    return _serialised({"lark_grammar": text})


def framed_grammar(frame: str, grammar: str) -> str:
    """The text of the frame, a Lark grammar, in which @answer is what the serialised grammar stands for.

    The rules of the two do not see one another.
    """
    (answer,) = json.loads(grammar)["grammars"]
    return json.dumps({"grammars": [{"lark_grammar": frame}, {"name": "answer", **answer}]})


def json_schema(schema: object) -> dict[str, Any]:
    """The schema as llguidance is to read it: one dialect (2020-12), none of its options from outside.

    Older dialects, named by "$schema", would make it skip newer keywords in silence; its own options,
    named "x-guidance", could allow it to. Raises GrammarError when it is no schema or too deep.
    """
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        raise GrammarError("The JSON schema must be an object.")
    return {**_normalised(schema, 1), "x-guidance": _JSON_OPTIONS}


def _normalised(schema: object, depth: int) -> Any:
    if not isinstance(schema, Mapping):
        return schema  # true, false, or a mistake that the check reports
    if depth > MAX_SCHEMA_DEPTH:
        raise GrammarError(f"The JSON schema is nested more than {MAX_SCHEMA_DEPTH} levels deep.")
    normalised: dict[str, Any] = {}
    for keyword, value in schema.items():
        if keyword in ("$schema", "x-guidance"):
            continue
        if keyword in _MAPS_OF_SCHEMAS and isinstance(value, Mapping):
            value = {name: _normalised(part, depth + 1) for name, part in value.items()}
        elif keyword in _LISTS_OF_SCHEMAS and isinstance(value, list):
            value = [_normalised(part, depth + 1) for part in value]
        elif keyword in _SCHEMAS:
            value = _normalised(value, depth + 1)
        normalised[keyword] = value
    return normalised


def _escape_in_lark(match: re.Match[str]) -> str:
    return {"/": r"\/", "\n": r"\n", "\\\n": r"\n"}.get(match.group(), match.group())


def _serialised(grammar: Mapping[str, object]) -> str:
    text = io.StringIO()
    try:
        # Piece by piece: megabytes written in one call would keep all other threads waiting.
        for piece in json.JSONEncoder().iterencode({"grammars": [grammar]}):
            text.write(piece)
            if text.tell() > MAX_GRAMMAR_BYTES:
                raise GrammarError(_TOO_LARGE)
        return text.getvalue()
    except RecursionError:
        raise GrammarError("The JSON schema is nested too deeply.") from None
    except (TypeError, ValueError):
        raise GrammarError("The JSON schema is not JSON.") from None


class GrammarChecker:
    """Tells whether grammars can be used. Thread-safe; checks wait for one another, known answers do not.

    tokenizer_file: tokenizer.json of the model, for grammars that name its control tokens.
    seconds: how long a grammar may take to compile.
    The worker process starts with the first check, and is replaced when it dies.
    """

    def __init__(self, tokenizer_file: Path | None = None, *, seconds: float = CHECK_SECONDS) -> None:
        limits = [str(WORKER_BYTES), str(math.ceil(seconds) + 1)]  # its own alarm is for when nobody kills it
        self._command = [sys.executable, "-P", "-m", "toptwo.text.grammar_worker", *limits]
        if tokenizer_file is not None:
            self._command.append(str(tokenizer_file))
        self._seconds = seconds
        self._worker_lock = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._cache_lock = threading.Lock()
        self._cache: OrderedDict[bytes, tuple[str | None, float]] = OrderedDict()

    def check(self, grammar: str) -> None:
        """Return when the grammar compiles within the limits.

        Raises GrammarError when it does not, RuntimeError when the worker cannot be started.
        """
        try:
            text = grammar.encode()
        except UnicodeEncodeError:
            raise GrammarError("The grammar is not valid Unicode.") from None
        if len(text) > MAX_GRAMMAR_BYTES:
            raise GrammarError(_TOO_LARGE)
        key = hashlib.sha256(text).digest()
        found = self._recall(key)
        if found is None:
            with self._worker_lock:
                found = self._recall(key)  # whoever held the lock may have asked the same
                if found is None:
                    found = self._compile(grammar)
                    self._remember(key, found)
        error, _ = found
        if error is not None:
            raise GrammarError(error)

    def close(self) -> None:
        """End the worker, also in the middle of a check. No check is made afterwards."""
        self._closed = True
        worker = self._worker
        if worker is not None:
            worker.kill()
        with self._worker_lock:
            self._discard()

    def _recall(self, key: bytes) -> tuple[str | None, float] | None:
        with self._cache_lock:
            found = self._cache.get(key)
            if found is None or found[1] < time.monotonic():
                return None
            self._cache.move_to_end(key)
            return found

    def _remember(self, key: bytes, verdict: tuple[str | None, float]) -> None:
        with self._cache_lock:
            self._cache[key] = verdict
            while len(self._cache) > _NUM_CACHED:
                self._cache.popitem(last=False)

    def _compile(self, grammar: str) -> tuple[str | None, float]:
        """(error or None, until when that is believed)"""
        answer = self._ask(json.dumps(grammar).encode() + b"\n")
        if self._closed:
            raise GrammarError("The server is shutting down.")
        if not answer:
            return "The grammar is too complex.", time.monotonic() + _DOUBT_SECONDS
        reason = json.loads(answer)
        return (None if reason is None else _sentence(reason)), math.inf

    def _ask(self, line: bytes) -> bytes:
        """The worker's line of answer; empty when the question was too much for it."""
        for _ in range(2):
            worker = self._running_worker()
            started = time.monotonic()
            with contextlib.suppress(BrokenPipeError):
                if answer := _exchange(worker, line, self._seconds):
                    return answer
            self._discard()
            # It was killed, and not for being late: that was somebody else, and says nothing of the question.
            if worker.returncode != -signal.SIGKILL or time.monotonic() - started >= self._seconds:
                break
        return b""

    def _running_worker(self) -> subprocess.Popen[bytes]:
        if self._worker is not None and self._worker.poll() is None:
            return self._worker
        self._discard()
        if self._closed:
            raise GrammarError("The server is shutting down.")
        self._worker = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        if not _exchange(self._worker, b"", _START_SECONDS):  # it greets when it is ready
            self._discard()
            if self._closed:
                raise GrammarError("The server is shutting down.")
            raise RuntimeError("the worker that checks grammars did not start")
        return self._worker

    def _discard(self) -> None:
        worker, self._worker = self._worker, None
        if worker is None:
            return
        stdin, stdout = _pipes(worker)
        with contextlib.suppress(BrokenPipeError):
            stdin.close()
        stdout.close()
        try:
            worker.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def _exchange(worker: subprocess.Popen[bytes], line: bytes, seconds: float) -> bytes:
    """Send a line, receive one; empty when the worker dies or had to be killed for being late."""
    stdin, stdout = _pipes(worker)
    # Killing it wakes both the write and the read, whichever it is stuck in.
    alarm = threading.Timer(seconds, worker.kill)
    alarm.daemon = True
    alarm.start()
    try:
        stdin.write(line)
        stdin.flush()
        answer = stdout.readline()
    finally:
        alarm.cancel()
    return answer if answer.endswith(b"\n") else b""


def _pipes(worker: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    if worker.stdin is None or worker.stdout is None:
        raise RuntimeError("the worker that checks grammars has no pipes")
    return worker.stdin, worker.stdout


def _sentence(reason: str) -> str:
    """The library's reason in one line: it may repeat the whole grammar and underline a place in it."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    stated = next((line for line in lines if line.startswith("error:")), lines[0] if lines else "")
    if stated.startswith("Resource "):
        stated = "a $ref to another document is not supported"
    if stated.startswith("recursion limit"):
        stated = "it is nested too deeply"
    if len(stated) > _MOST_REASON:
        stated = f"{stated[: _MOST_REASON // 2]} ... {stated[-_MOST_REASON // 2 :]}"
    return f"The grammar cannot be used: {stated.removeprefix('error:').strip().rstrip('.')}."

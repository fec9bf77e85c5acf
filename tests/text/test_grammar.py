"""Grammars from schemas and expressions, and the process that tries them out."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import psutil
import pydantic
import pytest
from llguidance import LLMatcher, LLTokenizer

from fakes import byte_level_vocabulary
from toptwo.text import grammar as grammar_module
from toptwo.text.grammar import (
    GrammarChecker,
    GrammarError,
    framed_grammar,
    json_object_grammar,
    json_schema_grammar,
    lark_grammar,
    regex_grammar,
)

BYTES = LLTokenizer("byte")


@pytest.fixture(scope="module")
def checker() -> Iterator[GrammarChecker]:
    shared = GrammarChecker(seconds=3)
    yield shared
    shared.close()


def accepts(grammar: str, text: str) -> bool:
    matcher = LLMatcher(BYTES, grammar)
    assert not matcher.is_error(), matcher.get_error()
    ids = list(text.encode())
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def pid_of(checker: GrammarChecker) -> int:
    assert checker._worker
    return checker._worker.pid


STRICT = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": ["integer", "null"]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["value", "children"],
            "additionalProperties": False,
        }
    },
}


@pytest.mark.parametrize(
    ("schema", "text", "expected"),
    [
        (STRICT, '{"name": "Ann", "age": 3}', True),
        (STRICT, '{\n  "name": "Ann",\n  "age": null\n}', True),
        (STRICT, '{"name": "Ann"}', False),
        (STRICT, '{"name": "Ann", "age": 3, "x": 1}', False),
        (STRICT, '{"name":  "two blanks"', False),
        (TREE, '{"value": 1, "children": [{"value": 2, "children": []}]}', True),
        (TREE, '{"value": 1, "children": [{"value": 2}]}', False),
        (True, '["anything", {}]', True),
        ({"type": "string", "pattern": "^a/b$"}, '"a/b"', True),
        # Older dialects know fewer keywords, and would skip the others in silence.
        ({"$schema": "http://json-schema.org/draft-04/schema#", "const": 1}, "2", False),
        ({"type": "object", "properties": {"$schema": {"const": 1}}}, '{"$schema": 1}', True),
        ({"const": {"$schema": "s"}}, '{"$schema": "s"}', True),
        (
            {"x-guidance": {"whitespace_flexible": False, "item_separator": "x"}, "const": [1, 2]},
            "[1, 2]",
            True,
        ),
    ],
)
def test_schemas(schema: object, text: str, expected: bool) -> None:
    assert accepts(json_schema_grammar(schema), text) == expected


def test_a_json_object_is_any_object() -> None:
    assert accepts(json_object_grammar(), '{"a": [1, {"b": null}]}')
    assert not accepts(json_object_grammar(), "[1]")


@pytest.mark.parametrize(
    ("regex", "text"),
    [
        (r"a/b", "a/b"),
        (r"a\/b", "a/b"),
        ("a\nb", "a\nb"),
        ("a\\\nb", "a\nb"),
        (r"\\/", "\\/"),
        (r"[/\]]+", "/]"),
        (r"^\d{3}$", "123"),
        ("é|ü", "ü"),
        ('"#//', '"#//'),
        ("", ""),
    ],
)
def test_regular_expressions(regex: str, text: str, checker: GrammarChecker) -> None:
    checker.check(regex_grammar(regex))
    assert accepts(regex_grammar(regex), text)
    assert not accepts(regex_grammar(regex), text + "x")


def test_a_regular_expression_cannot_leave_its_slashes() -> None:
    assert not accepts(regex_grammar("a/\nother: /b"), "a")


def test_lark() -> None:
    assert accepts(lark_grammar('start: "a" b\nb: /[0-9]/'), "a7")
    # Text that looks like the serialised form is not taken for it.
    assert LLMatcher(BYTES, lark_grammar(json_object_grammar())).is_error()


def test_schemas_of_real_clients_are_fine(checker: GrammarChecker) -> None:
    class Cat(pydantic.BaseModel):
        kind: Literal["cat"]
        lives: int = pydantic.Field(ge=0, le=9)

    class Dog(pydantic.BaseModel):
        kind: Literal["dog"]
        name: str = pydantic.Field(min_length=1, max_length=20, pattern="^[A-Z]")

    class Owner(pydantic.BaseModel):
        pets: list[Annotated[Cat | Dog, pydantic.Field(discriminator="kind")]]
        place: tuple[float, float] | None
        notes: dict[str, str]
        friend: Owner | None

    Owner.model_rebuild(_types_namespace={"Cat": Cat, "Dog": Dog, "Owner": Owner})
    checker.check(json_schema_grammar(Owner.model_json_schema()))
    checker.check(json_schema_grammar(STRICT))
    checker.check(json_schema_grammar(TREE))
    checker.check(json_schema_grammar({"type": "object", "title": "t", "description": "d", "default": {}}))


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


def test_depth_is_bounded(checker: GrammarChecker) -> None:
    checker.check(json_schema_grammar(nested(63)))
    with pytest.raises(GrammarError, match="more than 64 levels"):
        json_schema_grammar(nested(64))
    deep: object = 1
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(GrammarError, match="too deeply"):
        json_schema_grammar({"const": deep})
    with pytest.raises(GrammarError, match="too deeply"):
        checker.check(json_schema_grammar({"const": json.loads("[" * 300 + "]" * 300)}))


@pytest.mark.parametrize("schema", [5, None, [], "x", False])
def test_a_schema_is_an_object(schema: object) -> None:
    with pytest.raises(GrammarError, match="must be an object"):
        json_schema_grammar(schema)


# What llguidance cannot enforce, and what nothing can satisfy.
REFUSED = [
    ({"$ref": "http://example.com/schema"}, "another document"),
    ({"properties": {"a": {"$ref": "other.json#/x"}}}, "another document"),
    ({"$ref": "#/$defs/missing"}, "missing"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"not": {"type": "string"}}, '"not"'),
    ({"if": {"type": "string"}, "then": {"maxLength": 3}}, '"if"'),
    (
        {"$schema": "http://json-schema.org/draft-07/schema#", "dependentRequired": {"a": ["b"]}},
        "dependentRe",
    ),
    ({"x-guidance": {"lenient": True}, "not": {}}, '"not"'),
    ({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}, "oneOf"),
    ({"type": "string", "format": "credit-card"}, "Unknown format"),
    ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
    ({"type": "string", "pattern": "["}, "unclosed"),
    ({"type": "strin"}, "strin"),
    ({"type": "string", "minLength": 5, "maxLength": 3}, "Unsatisfiable"),
    ({"enum": []}, "Unsatisfiable"),
    ({"const": "\ud800"}, "hex escape"),
    ({"$ref": "#"}, "no text satisfies"),
    (
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        "no text satisf",
    ),
    ({"type": "object", "properties": {"a": {}}, "minProperties": 1}, "minProperties|min/max"),
]


@pytest.mark.parametrize(("schema", "reason"), REFUSED)
def test_no_schema_is_weakened_in_silence(checker: GrammarChecker, schema: object, reason: str) -> None:
    with pytest.raises(GrammarError, match=reason) as caught:
        checker.check(json_schema_grammar(schema))
    assert len(str(caught.value)) <= 300


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (lark_grammar(""), "no start rule"),
        (lark_grammar("start: other"), "unknown name"),
        (lark_grammar("start: start"), "no text satisfies"),
        (lark_grammar("start: <|im_end|>"), "unknown special token"),
        (lark_grammar("\0"), "lexer error"),
        (lark_grammar('start: %json {"x-guidance": {"lenient": true}, "format": "odd"}'), "Unknown format"),
        (regex_grammar("("), "unclosed group"),
        (regex_grammar("a\\"), "lexer error"),
        (regex_grammar("(" * 2000 + "a" + ")" * 2000), "nested parentheses"),
        ("{", "EOF"),
        ("\ud800", "Unicode"),
    ],
)
def test_bad_grammars_are_named(checker: GrammarChecker, grammar: str, reason: str) -> None:
    with pytest.raises(GrammarError, match=reason) as caught:
        checker.check(grammar)
    assert len(str(caught.value)) <= 300
    assert "\n" not in str(caught.value)


HUNGRY = json_schema_grammar({"allOf": [{"type": "string", "pattern": f".*a.{{{i}}}"} for i in range(20)]})
HOSTILE = [
    regex_grammar("(a+)+$"),
    regex_grammar("(a|aa)+b"),
    regex_grammar("((a{1,1000}){1,1000}){1,1000}"),
    regex_grammar("(.*a.{200}|.*b.{199})c"),
    regex_grammar(r"\w{1,500}\p{L}{100,2000}"),
    json_schema_grammar({"type": "string", "minLength": 10**9}),
    json_schema_grammar({"type": "array", "minItems": 10**9, "items": {"type": "array", "minItems": 10**9}}),
    json_schema_grammar({"type": "number", "multipleOf": 1e-9}),
    json_schema_grammar({"type": "integer", "multipleOf": 99999999, "minimum": 1}),
    json_schema_grammar(
        {
            "$ref": "#/$defs/d0",
            "$defs": {
                f"d{i}": {"properties": {name: {"$ref": f"#/$defs/d{(i + 1) % 40}"} for name in "ab"}}
                for i in range(40)
            },
        }
    ),
    lark_grammar('start: x\nx: x x | "a" | '),
    lark_grammar('start: x{100000}\nx: y{100000}\ny: "a"'),
    lark_grammar("start: A\nA: ~(/(?s:.*)a(?s:.{100})/) & ~(/(?s:.*)b(?s:.{100})/)"),
    lark_grammar('start: A\nA: %regex {"substring_chars": "' + "ab" * 100_000 + '"}'),
]


@pytest.mark.parametrize("grammar", HOSTILE)
def test_hostile_grammars_are_judged_in_time(checker: GrammarChecker, grammar: str) -> None:
    """Either way, and the checker lives on."""
    started = time.monotonic()
    with contextlib.suppress(GrammarError):
        checker.check(grammar)
    assert time.monotonic() - started < 10
    checker.check(json_object_grammar())


def test_too_slow_is_too_complex(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "_DOUBT_SECONDS", 0.3)
    checker = GrammarChecker(seconds=0.3)
    try:
        checker.check(json_object_grammar())
        before = pid_of(checker)
        with pytest.raises(GrammarError, match="too complex"):
            checker.check(HUNGRY)
        started = time.monotonic()
        with pytest.raises(GrammarError, match="too complex"):
            checker.check(HUNGRY)  # known
        assert time.monotonic() - started < 0.1
        checker.check(regex_grammar("a"))
        assert pid_of(checker) != before
        assert not psutil.pid_exists(before)
        time.sleep(0.3)
        assert checker._recall(next(iter(checker._cache))) is not None  # a sure verdict stays
        with pytest.raises(GrammarError, match="too complex"):
            checker.check(HUNGRY)  # a doubtful one is tried again
        assert checker._worker is None
    finally:
        checker.close()


def test_too_much_memory_is_too_complex(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "WORKER_BYTES", 144 * 1024**2)
    checker = GrammarChecker(seconds=60)
    try:
        checker.check(json_object_grammar())
        with pytest.raises(GrammarError, match="too complex"):
            checker.check(HUNGRY)
        checker.check(regex_grammar("a"))
    finally:
        checker.close()


def test_large_grammars_do_not_reach_the_worker() -> None:
    checker = GrammarChecker()
    with pytest.raises(GrammarError, match="larger than 256 KiB"):
        checker.check(json_schema_grammar({"enum": ["x" * 10_000_000]}))
    with pytest.raises(GrammarError, match="larger than 256 KiB"):
        checker.check(framed_grammar("start: @answer" + " " * 300_000, regex_grammar("a")))
    assert checker._worker is None
    checker.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGINT])
def test_a_worker_may_be_struck_between_checks(number: signal.Signals) -> None:
    checker = GrammarChecker(seconds=0.5)
    try:
        checker.check(regex_grammar("a"))
        before = pid_of(checker)
        os.kill(before, number)
        if number == signal.SIGSTOP:  # it can only be taken for slow
            with pytest.raises(GrammarError, match="too complex"):
                checker.check(regex_grammar("b"))
        checker.check(regex_grammar("c"))
        assert (pid_of(checker) == before) == (number == signal.SIGINT)
        with pytest.raises(GrammarError, match="unclosed"):
            checker.check(regex_grammar("("))
    finally:
        checker.close()


def test_verdicts_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "_NUM_CACHED", 3)
    checker = GrammarChecker()
    asked: list[bytes] = []
    answers = {b"good": b"null", b"bad": b'"a reason"'}

    def ask(line: bytes) -> bytes:
        asked.append(line)
        return answers[b"bad" if b"bad" in line else b"good"]

    monkeypatch.setattr(checker, "_ask", ask)
    for _ in range(3):
        checker.check("good")
        with pytest.raises(GrammarError, match="a reason"):
            checker.check("bad")
    assert len(asked) == 2
    for index in range(3):
        checker.check(f"good {index}")
    assert len(checker._cache) == 3
    checker.check("good")
    assert len(asked) == 6


def test_many_threads_may_ask(checker: GrammarChecker) -> None:
    failures: list[BaseException] = []

    def ask(index: int) -> None:
        try:
            for turn in range(10):
                checker.check(regex_grammar(f"a{{{index % 3}}}{turn}"))
                with pytest.raises(GrammarError):
                    checker.check(regex_grammar(f"({turn}"))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=[index]) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_closing_ends_a_check_too() -> None:
    checker = GrammarChecker(seconds=60)
    checker.check(regex_grammar("a"))
    pid = pid_of(checker)
    raised: list[BaseException] = []

    def ask() -> None:
        try:
            checker.check(HUNGRY)
        except GrammarError as error:
            raised.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while not psutil.Process(pid).cpu_times().user > 0.3:
        time.sleep(0.01)
    checker.close()
    thread.join()
    assert "shutting down" in str(raised[0])
    assert not psutil.pid_exists(pid)
    checker.check(regex_grammar("a"))  # known
    with pytest.raises(GrammarError, match="shutting down"):
        checker.check(regex_grammar("b"))
    checker.close()


def test_a_tokenizer_that_cannot_be_read_is_our_fault(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    checker = GrammarChecker(tmp_path / "tokenizer.json")
    with pytest.raises(RuntimeError, match="did not start"):
        checker.check(regex_grammar("a"))
    checker.close()


def test_control_tokens_of_the_model_are_known(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    byte_level_vocabulary().save(str(path))
    checker = GrammarChecker(path)
    try:
        checker.check(lark_grammar("start: <|im_start|>"))
        with pytest.raises(GrammarError, match="unknown special token"):
            checker.check(lark_grammar("start: <|tool|>"))
    finally:
        checker.close()


def test_a_worker_ends_with_its_parent() -> None:
    program = (
        "import os\n"
        "from toptwo.text.grammar import GrammarChecker, regex_grammar\n"
        "checker = GrammarChecker()\n"
        "checker.check(regex_grammar('a'))\n"
        "print(checker._worker.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    worker = int(done.stdout)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(worker) and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)

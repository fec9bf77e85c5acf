"""The parser of answers: content, thoughts and calls, however the text is cut."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toptwo.text.parsers import (
    Content,
    OutputParser,
    Piece,
    Reasoning,
    ReasoningFormat,
    ToolCallArguments,
    ToolCallStart,
    detect_reasoning,
    make_parser,
)
from toptwo.text.tools import ToolFormat

HERMES, MISTRAL, LLAMA3 = ToolFormat("hermes"), ToolFormat("mistral"), ToolFormat("llama3")
GRANITE = ToolFormat("granite")
FORMATS = pytest.mark.parametrize("form", [HERMES, MISTRAL, LLAMA3, GRANITE], ids=lambda form: form.name)
THINK = ReasoningFormat("<think>", "</think>")

# What an answer comes to: texts as they are, ("think", text) and (name, arguments).
Told = list[str | tuple[str, str]]


def told(pieces: list[Piece]) -> Told:
    """The pieces joined; two calls, or two stretches of content, never melt together."""
    answer: Told = []
    last: Piece | None = None
    for piece in pieces:
        match piece:
            case ToolCallStart(index, name):
                assert index == sum(isinstance(p, ToolCallStart) for p in pieces[: pieces.index(piece)])
                answer.append((name, ""))
            case ToolCallArguments(index, text):
                assert isinstance(last, ToolCallStart | ToolCallArguments)
                assert last.index == index
                assert text
                assert isinstance(answer[-1], tuple)
                name, before = answer[-1]
                answer[-1] = (name, before + text)
            case Reasoning(text):
                assert text
                before = answer.pop()[1] if isinstance(last, Reasoning) else ""
                answer.append(("think", before + text))
            case Content(text):
                assert text
                joined = answer.pop() if isinstance(last, Content) else ""
                assert isinstance(joined, str)
                answer.append(joined + text)
        last = piece
    return answer


def feed(parser: OutputParser, pieces: list[str]) -> Told:
    shown = [piece for text in pieces for piece in parser.push(text)]
    shown += parser.flush()
    assert parser.num_tool_calls == sum(isinstance(piece, ToolCallStart) for piece in shown)
    assert parser.flush() == []
    return told(shown)


def parse(form: ToolFormat | None, text: str, **options: bool) -> Told:
    """The answer, whole and character by character, which must agree."""
    reasoning = THINK if options.pop("thinks", False) else None
    whole = feed(make_parser(form, reasoning, **options), [text])
    assert feed(make_parser(form, reasoning, **options), list(text)) == whole
    return whole


CALL = '{"name": "get", "arguments": {"a": [1, {"b": "}\\"]"}]}}'
ARGUMENTS = '{"a": [1, {"b": "}\\"]"}]}'
GOT = ("get", ARGUMENTS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"<tool_call>{CALL}</tool_call>", [GOT]),
        (f"<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{CALL}</tool_call> ", [GOT, GOT]),
        (f"Let me see. \n<tool_call>{CALL}</tool_call>\n\nDone.\n", ["Let me see.", GOT, "Done.\n"]),
        ('<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>', [("f", '{"x": 1}')]),
        ('<tool_call>{"parameters":{},"name":"f"}</tool_call>', [("f", "{}")]),
        ('<tool_call>{"id": 7, "name": "f", "arguments": {}, "type": ["x"]}</tool_call>', [("f", "{}")]),
        (
            '<tool_call>{"name": "f", "arguments": "{\\"x\\": \\"\\u00e9\\"}"}</tool_call>',
            [("f", '{"x": "é"}')],
        ),
        ('<tool_call>{"name": "caf\\u00e9", "arguments": {}}</tool_call>', [("café", "{}")]),
        # The last brace is what models forget.
        ('<tool_call>{"name": "f", "arguments": {"x": 1}</tool_call>ok', [("f", '{"x": 1}'), "ok"]),
        ('<tool_call>{"name": "f", "arguments": {"x": 1</tool_call>ok', [("f", '{"x": 1'), "ok"]),
        # Cut off.
        ('<tool_call>{"name": "f", "arguments": {"x": "ab', [("f", '{"x": "ab')]),
        ('<tool_call>{"name": "f", "arguments": {"x": 1}}', [("f", '{"x": 1}')]),
        ('<tool_call>{"name": "f", "arguments": {"x": 1}}</tool', [("f", '{"x": 1}'), "</tool"]),
    ],
)
def test_hermes(text: str, expected: Told) -> None:
    assert parse(HERMES, text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"[TOOL_CALLS] [{CALL}]", [GOT]),
        (f"[TOOL_CALLS][{CALL} , {CALL}]\n", [GOT, GOT]),
        (f"[TOOL_CALLS] {CALL}", [GOT]),
        (f"Well. [TOOL_CALLS] [{CALL}] Done", ["Well.", GOT, "Done"]),
        ('[TOOL_CALLS] [{"name":"f","arguments":{},"id":"abcdefghi"}]', [("f", "{}")]),
        (f"[TOOL_CALLS]get[ARGS]{ARGUMENTS}", [GOT]),
        (f"[TOOL_CALLS]get{ARGUMENTS}[TOOL_CALLS] get [ARGS] {ARGUMENTS}", [GOT, GOT]),
        (f"[TOOL_CALLS]get[CALL_ID]a1b2c3d4e[ARGS]{ARGUMENTS}", [GOT]),
        ('[TOOL_CALLS] [{"name":"f","arguments":{}}, oops', [("f", "{}"), ", oops"]),
        ("[TOOL_CALLS]get[OTHER]{}", ["[TOOL_CALLS]get[OTHER]{}"]),
        ("[TOOL_CALLS]hello world", ["[TOOL_CALLS]hello world"]),
        ("[TOOL_CALLS] []", ["[TOOL_CALLS] []"]),
        ("A list [TOOL_LIST] [1]", ["A list [TOOL_LIST] [1]"]),
    ],
)
def test_mistral(text: str, expected: Told) -> None:
    assert parse(MISTRAL, text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"<|tool_call|>[{CALL}, {CALL}]", [GOT, GOT]),
        (f"Well. <|tool_call|> [{CALL}]", ["Well.", GOT]),
        ("<|tool_call|>[]", ["<|tool_call|>[]"]),
    ],
)
def test_granite(text: str, expected: Told) -> None:
    assert parse(GRANITE, text) == expected


LLAMA_CALL = '{"name": "get", "parameters": {"a": 1}}'
LLAMA_GOT = ("get", '{"a": 1}')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LLAMA_CALL, [LLAMA_GOT]),
        (f"\n\n{LLAMA_CALL}\n", [LLAMA_GOT]),
        (f"<|python_tag|>{LLAMA_CALL}", [LLAMA_GOT]),
        (f" <|python_tag|> {LLAMA_CALL}; {LLAMA_CALL}", [LLAMA_GOT, LLAMA_GOT]),
        (f"{LLAMA_CALL}\n{LLAMA_CALL}", [LLAMA_GOT, LLAMA_GOT]),
        (f"I will. <|python_tag|>{LLAMA_CALL}", ["I will.", LLAMA_GOT]),
        (f"For example {LLAMA_CALL}", [f"For example {LLAMA_CALL}"]),
        ('{"name": "Ann", "age": 3}', ['{"name": "Ann", "age": 3}']),
        (f"{LLAMA_CALL}; and more", [LLAMA_GOT, "; and more"]),
        ("  plain", ["  plain"]),
        ("   ", ["   "]),
    ],
)
def test_llama3(text: str, expected: Told) -> None:
    assert parse(LLAMA3, text) == expected


@pytest.mark.parametrize(
    "body",
    [
        "",
        "oops",
        "{",
        "{}",
        "[]",
        '{"name": "f"}',
        '{"name": "f", "arguments": 5}',
        '{"name": "f", "arguments": null}',
        '{"name": "f", "arguments": "not an object"}',
        '{"name": "f", "arguments": "[1]"}',
        '{"name": "", "arguments": {}}',
        '{"name": 5, "arguments": {}}',
        pytest.param('{"name": ' + "[" * 9000 + "]" * 9000 + ', "arguments": {}}', id="deep name"),
        pytest.param('{"name": "f", "arguments": "' + "[" * 9000 + '"}', id="deep text"),
        '{"name": "\\ud800", "arguments": {}}',
        '{"name": "f", "arguments": "{\\"x\\": \\"\\ud800\\"}"}',
        '{"name": "\\x", "arguments": {}}',
        '{"arguments": {"a": 1}',
        '{"name": "f", "argu',
        '{"name" "f"}',
        '{name: "f"}',
        '{"name": "f",}',
        "<tool_call>",
        " \n ",
    ],
)
@pytest.mark.parametrize("end", ["</tool_call>", " and so on", ""])
def test_what_is_no_call_is_content(body: str, end: str) -> None:
    text = f"Before \n<tool_call>{body}{end}"
    assert parse(HERMES, text) == [text]


def test_a_call_behind_what_was_none() -> None:
    text = f"<tool_call>oops <tool_call>{CALL}</tool_call>"
    assert parse(HERMES, text) == ["<tool_call>oops", GOT]


def test_arguments_stream_as_they_come() -> None:
    parser = make_parser(HERMES, None)
    assert parser.push('Hm. <tool_call>{"name": "f", "argum') == [Content("Hm.")]
    assert parser.push('ents": {"city": "Par') == [
        ToolCallStart(0, "f"),
        ToolCallArguments(0, '{"city": "Par'),
    ]
    assert parser.push('is"') == [ToolCallArguments(0, 'is"')]
    assert parser.push("}}</tool_call>") == [ToolCallArguments(0, "}")]
    assert parser.num_tool_calls == 1


def test_content_streams_as_it_comes() -> None:
    parser = make_parser(HERMES, None)
    assert parser.push("Hello") == [Content("Hello")]
    assert parser.push(" ") == []
    assert parser.push("you <tool") == [Content(" you")]
    assert parser.push("box>") == [Content(" <toolbox>")]


def test_without_formats_all_is_content() -> None:
    text = f"<think>hm</think> <tool_call>{CALL}</tool_call>\n"
    assert parse(None, text) == [text]
    assert OutputParser().push(text) == [Content(text)]
    assert OutputParser().push("") == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\nHm.\n\nSo.\n</think>\n\nYes.\n", [("think", "Hm.\n\nSo."), "Yes.\n"]),
        ("\n <think>Hm.</think>Yes.", [("think", "Hm."), "Yes."]),
        ("<think>\n\n</think>\n\nYes.", ["Yes."]),
        ("<think>cut off </thi", [("think", "cut off </thi")]),
        ("<think>cut off\n\n", [("think", "cut off")]),
        ("Yes. <think>no</think>", ["Yes. <think>no</think>"]),
        ("\n\nYes.", ["\n\nYes."]),
        ("<thin", ["<thin"]),
        (" " * 65 + "<think>late</think>", [" " * 65 + "<think>late</think>"]),
        ("<think>a</think>\n\nb </think> c", [("think", "a"), "b </think> c"]),
        (
            f"<think><tool_call>{CALL}</think>\n<tool_call>{CALL}</tool_call>",
            [("think", f"<tool_call>{CALL}"), GOT],
        ),
    ],
)
def test_reasoning(text: str, expected: Told) -> None:
    assert parse(HERMES, text, thinks=True) == expected


def test_a_prompt_may_end_inside_a_thought() -> None:
    assert parse(None, "\nHm.\n</think>\n\nYes.", thinks=True, starts_in_reasoning=True) == [
        ("think", "Hm."),
        "Yes.",
    ]
    parser = make_parser(None, THINK, starts_in_reasoning=True)
    assert parser.in_reasoning
    parser.push("Hm.</think>Yes")
    assert not parser.in_reasoning
    assert not make_parser(None, None, starts_in_reasoning=True).in_reasoning


def test_reasoning_is_detected() -> None:
    assert detect_reasoning("{{ messages }}", []) is None
    assert detect_reasoning("<think>", []) == ReasoningFormat("<think>", "</think>")
    shown = ("<think>", "</think>")
    assert detect_reasoning("", shown) == ReasoningFormat("<think>", "</think>", shown)


PARTS = [
    *(
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "[CALL_ID]",
        "<|python_tag|>",
        "<|tool_call|>",
    ),
    *(CALL, LLAMA_CALL, '{"name": ', '"f"', ', "arguments": ', ', "parameters": ', '"{}"', '"{\\"a\\": 1}"'),
    *("{", "}", "[", "]", ",", ":", ";", '"', "\\", " ", "\n", "<", "</", "f", "1", "é", "Hello"),
]
answers = st.lists(st.sampled_from(PARTS), max_size=12).map("".join)


@FORMATS
@given(text=answers, cuts=st.lists(st.integers(0, 200), max_size=8), inside=st.booleans())
def test_any_cutting_gives_the_same(form: ToolFormat, text: str, cuts: list[int], inside: bool) -> None:
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(borders)]
    whole = feed(make_parser(form, THINK, starts_in_reasoning=inside), [text])
    assert feed(make_parser(form, THINK, starts_in_reasoning=inside), pieces) == whole
    assert feed(make_parser(form, THINK, starts_in_reasoning=inside), list(text)) == whole


@FORMATS
@given(text=answers)
def test_nothing_is_lost(form: ToolFormat, text: str) -> None:
    """An answer without a call is the text itself; with calls, its contents are parts of the text."""
    answer = parse(form, text)
    if all(isinstance(part, str) for part in answer):
        assert "".join(part for part in answer if isinstance(part, str)) == text
    for part in answer:
        if isinstance(part, str):
            assert part in text


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=8), values, max_size=3), st.booleans(), st.sampled_from([None, 1]))
def test_arguments_are_exact(arguments: dict[str, object], ascii_only: bool, indent: int | None) -> None:
    text = json.dumps(arguments, ensure_ascii=ascii_only, indent=indent)
    spellings = [
        (HERMES, f'<tool_call>{{"name": "f", "arguments": {text}}}</tool_call>'),
        (HERMES, f'<tool_call>{{"arguments": {text}, "name": "f"}}</tool_call>'),
        (HERMES, f'<tool_call>{{"name": "f", "arguments": {json.dumps(text)}}}</tool_call>'),
        (MISTRAL, f'[TOOL_CALLS] [{{"name": "f", "arguments": {text}}}]'),
        (MISTRAL, f"[TOOL_CALLS]f[ARGS]{text}"),
        (LLAMA3, f'{{"name": "f", "parameters": {text}}}'),
    ]
    for form, answer in spellings:
        assert parse(form, answer) == [("f", text)], answer


@pytest.mark.parametrize(
    "text",
    [
        " " * 200_000,
        "<" * 200_000,
        "<tool_call>" * 20_000,
        '<tool_call>{"x": "' + "y" * 200_000,
        '<tool_call>{"name": "f", "arguments": ' + "[" * 200_000,
        '<tool_call>{"name": "f", "arguments": "' + "[" * 200_000 + '"}',
        "</think>" * 20_000 + "\n" * 100_000,
    ],
)
def test_work_is_linear(text: str) -> None:
    """Quadratic work would take minutes here, and the suite's time limit ends it."""
    parser = make_parser(HERMES, THINK, starts_in_reasoning=True)
    parser.push("</think>")
    shown = [piece for at in range(0, len(text), 7) for piece in parser.push(text[at : at + 7])]
    assert told([*shown, *parser.flush()])


def test_what_is_held_back_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toptwo.text.calls._MOST_HELD", 100)
    parser = make_parser(HERMES, None)
    text = '<tool_call>{"x": "' + "y" * 100
    assert told(parser.push(text)) == [text]
    assert parser.flush() == []

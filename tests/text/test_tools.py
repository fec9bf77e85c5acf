"""Tool formats: detected from templates, forced by grammars, and read back by the parser."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tokenizers
from llguidance import LLMatcher, LLTokenizer

from fakes import CHATML, byte_fallback_vocabulary, byte_level_vocabulary
from toptwo.text.grammar import GrammarError
from toptwo.text.parsers import Content, Piece, ToolCallArguments, ToolCallStart, make_parser
from toptwo.text.tools import MARKER_TOKENS, Tool, ToolFormat, detect_tool_format

TEMPLATES = Path(__file__).parent / "templates"

WEATHER = Tool(
    "get_weather",
    "The weather.",
    {
        "type": "object",
        "properties": {
            "unit": {"$ref": "#/$defs/unit"},
            "days": {"type": "integer", "minimum": 0, "maximum": 9},
        },
        "required": ["unit", "days"],
        "additionalProperties": False,
        "$defs": {"unit": {"enum": ["°C", "°F"]}},
    },
)
LONGER = Tool(
    "get_weather_2", None, {"properties": {"now": {"type": "boolean"}}, "additionalProperties": False}
)
NO_ARGUMENTS = Tool("stop-all", None, {})
TOOLS = [WEATHER, LONGER, NO_ARGUMENTS]


def vocabulary(tokens: tuple[str, ...], *, special: bool, fallback: bool = False) -> tokenizers.Tokenizer:
    """A vocabulary that has the tokens."""
    inner = byte_fallback_vocabulary() if fallback else byte_level_vocabulary()
    added = [tokenizers.AddedToken(token, special=special, normalized=False) for token in tokens]
    inner.add_special_tokens(added) if special else inner.add_tokens(added)
    return inner


def ids_of(inner: tokenizers.Tokenizer) -> dict[str, int]:
    ids = {token: inner.token_to_id(token) for token in MARKER_TOKENS}
    return {token: token_id for token, token_id in ids.items() if token_id is not None}


def write(form: ToolFormat, inner: tokenizers.Tokenizer, *, parallel: bool, seed: int) -> str:
    """What a model of no sense writes under the grammar, as a reader sees it."""
    end = inner.get_vocab_size() - 1
    matcher = LLMatcher(LLTokenizer(inner.to_str(), eos_token=end), form.grammar(TOOLS, parallel=parallel))
    chance = random.Random(seed)
    ids: list[int] = []
    while not matcher.is_stopped():
        assert not matcher.is_error(), matcher.get_error()
        mask = matcher.compute_bitmask()
        allowed = [i for i in range(end + 1) if mask[i // 8] >> (i % 8) & 1]
        ids.append(chance.choice(allowed))
        assert matcher.consume_token(ids[-1])
        assert len(ids) < 5000
    return inner.decode([i for i in ids if i != end], skip_special_tokens=False)


def read(form: ToolFormat, text: str) -> list[tuple[str, dict[str, object]]]:
    """The calls in the text, in which there must be nothing else."""
    parser = make_parser(form, None)
    pieces: list[Piece] = [*parser.push(text), *parser.flush()]
    calls: list[tuple[str, str]] = []
    for piece in pieces:
        assert not isinstance(piece, Content), (text, piece)
        if isinstance(piece, ToolCallStart):
            calls.append((piece.name, ""))
        elif isinstance(piece, ToolCallArguments):
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.text)
    return [(name, json.loads(arguments)) for name, arguments in calls]


def is_right(name: str, arguments: dict[str, object]) -> bool:
    if name == WEATHER.name:
        return arguments.keys() == {"unit", "days"} and arguments["unit"] in ("°C", "°F")
    if name == LONGER.name:
        return arguments in ({}, {"now": True}, {"now": False})
    return name == NO_ARGUMENTS.name and not arguments


END = "<eos>"
VOCABULARIES = {
    "no tokens": vocabulary((END,), special=True),
    "plain tokens": vocabulary(("<tool_call>", "</tool_call>", "[TOOL_CALLS]", END), special=False),
    "control tokens": vocabulary(("<tool_call>", "</tool_call>", "[TOOL_CALLS]", END), special=True),
    "names first": vocabulary(("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "<|python_tag|>", END), special=True),
    "granite's token": vocabulary(("<|tool_call|>", END), special=True),
    "fallback": vocabulary(("[TOOL_CALLS]", END), special=True, fallback=True),
}


@pytest.mark.parametrize("inner", VOCABULARIES.values(), ids=VOCABULARIES)
@pytest.mark.parametrize("name", ["hermes", "mistral", "llama3", "granite"])
@pytest.mark.parametrize("parallel", [False, True])
def test_forced_calls_are_read_back(inner: tokenizers.Tokenizer, name: str, parallel: bool) -> None:
    form = ToolFormat(name, ids_of(inner))  # type: ignore[arg-type]
    counts, names = set(), set()
    for seed in range(12 if parallel else 30):
        calls = read(form, write(form, inner, parallel=parallel, seed=seed))
        assert all(is_right(called, arguments) for called, arguments in calls), calls
        counts.add(len(calls))
        names |= {called for called, _ in calls}
    assert names == {tool.name for tool in TOOLS}
    assert counts == {1} if not parallel else (1 in counts and max(counts) > 1)


def test_calls_come_to_an_end() -> None:
    form = ToolFormat("llama3")
    grammar = form.grammar([NO_ARGUMENTS], parallel=True)
    call = '{"name": "stop-all", "parameters": {}}'
    matcher = LLMatcher(LLTokenizer("byte"), grammar)
    text = "; ".join([call] * 16).encode()
    assert matcher.try_consume_tokens(list(text)) == len(text)
    assert matcher.is_stopped()


@pytest.mark.parametrize(
    ("name", "token_ids", "expected"),
    [
        ("hermes", {}, '<tool_call>\n{"name": "stop-all", "arguments": {}}\n</tool_call>'),
        ("mistral", {}, '[TOOL_CALLS] [{"name": "stop-all", "arguments": {}}]'),
        ("llama3", {}, '{"name": "stop-all", "parameters": {}}'),
        ("granite", {}, '<|tool_call|>[{"name": "stop-all", "arguments": {}}]'),
    ],
)
def test_the_spelling(name: str, token_ids: dict[str, int], expected: str) -> None:
    form = ToolFormat(name, token_ids)  # type: ignore[arg-type]
    matcher = LLMatcher(LLTokenizer("byte"), form.grammar([NO_ARGUMENTS], parallel=False))
    assert matcher.try_consume_tokens(list(expected.encode())) == len(expected)
    assert matcher.is_stopped()


def test_a_grammar_needs_tools_that_take_objects() -> None:
    form = ToolFormat("hermes")
    with pytest.raises(GrammarError, match="no tool"):
        form.grammar([], parallel=True)
    with pytest.raises(GrammarError, match="'f' must be an object"):
        form.grammar([Tool("f", None, {"type": "string"})], parallel=True)
    assert form.grammar([Tool("f", None, {"type": ["object", "null"]})], parallel=True)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("tools-hermes", "hermes"),
        ("tools-mistral", "mistral"),
        ("tools-llama3", "llama3"),
        ("tools-text-arguments", "hermes"),
        ("mixtral-8x7b-instruct-v0.1", "hermes"),
        ("nous-hermes-2-mixtral-8x7b-dpo", "hermes"),
    ],
)
def test_formats_are_detected(source: str, name: str) -> None:
    assert detect_tool_format((TEMPLATES / f"{source}.jinja").read_text(), {}).name == name


def test_detection_by_a_marker() -> None:
    assert detect_tool_format("{{ tools }} <|python_tag|>", {}).name == "llama3"
    assert detect_tool_format("{{ tools }} <|tool_call|>", {}).name == "granite"
    assert detect_tool_format(CHATML, {"[TOOL_CALLS]": 7}) == ToolFormat("hermes", {"[TOOL_CALLS]": 7})


def test_only_tokens_of_the_format_are_shown() -> None:
    ids = {"[TOOL_CALLS]": 5, "<tool_call>": 6}
    assert ToolFormat("mistral", ids).shown_tokens == ("[TOOL_CALLS]",)
    assert ToolFormat("hermes", ids).shown_tokens == ("<tool_call>",)
    assert ToolFormat("llama3", ids).shown_tokens == ()


def test_the_form_that_templates_know() -> None:
    assert NO_ARGUMENTS.as_openai() == {
        "type": "function",
        "function": {"name": "stop-all", "parameters": {"type": "object", "properties": {}}},
    }
    described = WEATHER.as_openai()["function"]
    assert list(described) == ["name", "description", "parameters"]
    assert described["parameters"] == WEATHER.parameters

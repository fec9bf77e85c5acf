"""What may not be chosen is not: biases, shortest lengths, and grammars, also after a preemption."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import llguidance
import msgspec
import pytest
import tokenizers

import schedules
from schedules import Run
from tiny import write_chat_mixtral
from toptwo.messages import GenerateRequest, Grammar, NewSequence, SamplingParams
from toptwo.runtime.constraints import GrammarStates
from toptwo.text.grammar import json_schema_grammar
from toptwo_kernels.registry import BACKENDS

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "size": {"enum": [1, 20, 300]}},
    "required": ["name", "size"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("chat")
    write_chat_mixtral(directory)
    return directory


@pytest.fixture(scope="module")
def vocabulary(checkpoint: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))


@pytest.fixture(scope="module")
def end(vocabulary: tokenizers.Tokenizer) -> int:
    return int(vocabulary.token_to_id("<|im_end|>"))


def request(name: str = "it", seed: int = 1, max_tokens: int = 60, **sampling: Any) -> GenerateRequest:
    plain = schedules.request(name, seed=seed, length=40, max_tokens=max_tokens, **sampling)
    return msgspec.structs.replace(plain, prompt_ids=[i % 260 for i in plain.prompt_ids])


def with_grammar(source: str, end: int, *, seed: int = 1, name: str = "it") -> GenerateRequest:
    return msgspec.structs.replace(
        request(name, seed, temperature=1.0), grammar=Grammar(source, (end,)), stop_token_ids=[end]
    )


def run(checkpoint: Path, *requests: GenerateRequest, **options: Any) -> Run:
    return schedules.run(checkpoint, list(requests), **{"backend": "cpu", **options})


def text_of(got: Run, vocabulary: tokenizers.Tokenizer, name: str = "it") -> str:
    assert got.ends[name] == "stop"
    return str(vocabulary.decode(got.tokens[name][:-1]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_forces_and_bans(checkpoint: Path, backend: str) -> None:
    plain = run(checkpoint, request(), backend=backend).tokens["it"]
    forced = run(checkpoint, request(logit_bias={77: 100.0}), backend=backend)
    assert forced.tokens["it"] == [77] * 60
    banned = run(checkpoint, request(logit_bias={plain[0]: -100.0}), backend=backend)
    assert plain[0] not in banned.tokens["it"]
    assert banned.tokens["it"][0] != plain[0]


def test_a_bias_is_not_a_strangers(checkpoint: Path) -> None:
    alone = run(checkpoint, request())
    company = run(checkpoint, request(), request("other", seed=2, logit_bias={77: 100.0}))
    assert company.tokens["it"] == alone.tokens["it"]
    assert company.tokens["other"] == [77] * 60


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_end_before_the_shortest_length(checkpoint: Path, end: int, backend: str) -> None:
    eager = request(logit_bias={end: 100.0}, min_tokens=7)
    got = run(checkpoint, msgspec.structs.replace(eager, stop_token_ids=[end]), backend=backend)
    assert got.ends["it"] == "stop"
    assert len(got.tokens["it"]) == 8
    assert end not in got.tokens["it"][:-1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_an_answer_matches_its_expression(
    checkpoint: Path, vocabulary: tokenizers.Tokenizer, end: int, backend: str, seed: int
) -> None:
    source = llguidance.LLMatcher.grammar_from_regex("(yes|no), [0-9]{3}( sir)?")
    got = run(checkpoint, with_grammar(source, end, seed=seed), backend=backend)
    assert re.fullmatch("(yes|no), [0-9]{3}( sir)?", text_of(got, vocabulary))


def test_an_answer_obeys_its_schema_in_any_company(
    checkpoint: Path, vocabulary: tokenizers.Tokenizer, end: int
) -> None:
    source = llguidance.LLMatcher.grammar_from_json_schema(SCHEMA, overrides={"whitespace_flexible": False})
    wanted = with_grammar(source, end)
    alone = run(checkpoint, wanted)
    answer = json.loads(text_of(alone, vocabulary))
    assert list(answer) == ["name", "size"]
    assert answer["size"] in (1, 20, 300)
    others = [with_grammar(source, end, seed=9, name="rival"), request("free", seed=4)]
    assert run(checkpoint, *others, wanted).tokens["it"] == alone.tokens["it"]


def test_a_preempted_answer_goes_on_where_it_was(
    checkpoint: Path, vocabulary: tokenizers.Tokenizer, end: int
) -> None:
    source = llguidance.LLMatcher.grammar_from_regex("[a-z ]{50}")
    wanted = with_grammar(source, end)
    older = [request(f"s{i}", seed=i, temperature=1.0) for i in range(3)]
    got = run(checkpoint, *older, wanted, num_blocks=16)
    assert "it" in got.preempted
    assert re.fullmatch("[a-z ]{50}", text_of(got, vocabulary))
    assert got.tokens["it"] == run(checkpoint, wanted).tokens["it"]


def test_a_grammar_that_fails_ends_its_own_answer_only(checkpoint: Path, end: int) -> None:
    broken = with_grammar("not a grammar", end)
    got = run(checkpoint, broken, request("other", seed=2))
    assert got.ends["it"] == "error"
    assert got.tokens["other"] == run(checkpoint, request("other", seed=2)).tokens["other"]


def wait_until_prepared(states: GrammarStates, grammar: Grammar) -> float:
    """The longest that this thread was kept from looking, in seconds."""
    longest, before = 0.0, time.perf_counter()
    while not states.prepare(grammar):
        time.sleep(0.001)
        longest, before = max(longest, time.perf_counter() - before), time.perf_counter()
    return longest


def admit(states: GrammarStates, slot: int, grammar: Grammar) -> float:
    """How many seconds it takes."""
    began = time.perf_counter()
    states.admit(NewSequence(slot, [1, 2], 2, SamplingParams(seed=0), [], grammar=grammar))
    return time.perf_counter() - began


def test_a_large_grammar_is_compiled_beside_the_steps(checkpoint: Path, end: int) -> None:
    date = {"type": "string", "format": "date-time"}
    fields = {f"field_{number}": date for number in range(2000)}
    schema = {"type": "object", "properties": fields, "additionalProperties": False}
    large = Grammar(json_schema_grammar(schema), (end,))
    in_place = GrammarStates(checkpoint, schedules.VOCAB)
    compiling = admit(in_place, 0, large)
    states = GrammarStates(checkpoint, schedules.VOCAB)
    states.load_vocabulary([end])
    assert not states.prepare(large)
    kept_waiting = wait_until_prepared(states, large)
    admitting = admit(states, 0, large)
    print(f"{compiling * 1e3:.0f} ms; beside: {kept_waiting * 1e3:.1f} and {admitting * 1e3:.1f} ms")
    assert kept_waiting < compiling / 4
    assert admitting < compiling / 10
    assert states.allowed(0).equal(in_place.allowed(0))


def test_sequences_of_one_grammar_are_apart(
    checkpoint: Path, vocabulary: tokenizers.Tokenizer, end: int
) -> None:
    states = GrammarStates(checkpoint, schedules.VOCAB)
    grammar = Grammar(llguidance.LLMatcher.grammar_from_regex("[ab]c"), (end,))
    wait_until_prepared(states, grammar)
    a, c = (int(vocabulary.token_to_id(letter)) for letter in "ac")
    admit(states, 0, grammar)
    states.advance(0, a)
    admit(states, 1, grammar)
    assert states.allowed(0).nonzero().flatten().tolist() == [c]
    assert states.allowed(1).nonzero().flatten().tolist() == [a, a + 1]


def test_few_compiled_grammars_are_kept(checkpoint: Path, end: int) -> None:
    states = GrammarStates(checkpoint, schedules.VOCAB)
    grammars = [
        Grammar(llguidance.LLMatcher.grammar_from_regex(f"a{{{number}}}"), (end,)) for number in range(1, 40)
    ]
    for grammar in grammars:
        wait_until_prepared(states, grammar)
    assert len(states._compiled) < 10
    assert states.prepare(grammars[-1])
    assert not states.prepare(grammars[0])

"""What decides which token comes next, where an answer ends, and what is told about its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx2
import openai
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from strict import ask, events, validate

Tokenize = Callable[[str], list[int]]

END_OF_TURN = 265  # <|im_end|>, the last id of the tiny model's vocabulary


def answer(client: openai.OpenAI, model: str, **options: Any) -> tuple[str, str, int]:
    """Text, finish reason and number of tokens."""
    given = {"max_tokens": 16, "temperature": 0, **options}
    body = client.chat.completions.create(model=model, messages=ask("tell me"), **given)
    assert body.usage is not None
    choice = body.choices[0]
    return choice.message.content or "", choice.finish_reason, body.usage.completion_tokens


def test_a_seed_repeats_an_answer(client: openai.OpenAI, model: str) -> None:
    first, second, other = (answer(client, model, temperature=1, seed=seed) for seed in (7, 7, 8))
    assert first == second
    assert first != other


def test_a_fingerprint_goes_with_the_seed(client: openai.OpenAI, model: str) -> None:
    bodies = [
        client.chat.completions.create(model=model, messages=ask(text), max_tokens=1, seed=1)
        for text in ("one", "two")
    ]
    assert bodies[0].system_fingerprint
    assert bodies[0].system_fingerprint == bodies[1].system_fingerprint


def test_logprobs(http: httpx2.Client, model: str) -> None:
    wanted = {"model": model, "messages": ask("hello"), "max_tokens": 8, "temperature": 0}
    told = {"logprobs": True, "top_logprobs": 5}
    reply = http.post("/chat/completions", json=wanted | told)
    assert reply.status_code == 200, reply.text
    body = validate(ChatCompletion, reply.content)
    logprobs = body.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 8
    for token in logprobs.content:
        best = [top.logprob for top in token.top_logprobs]
        assert len(best) == 5
        assert best == sorted(best, reverse=True)
        assert token.logprob <= 0
        assert (token.token, token.logprob) == (token.top_logprobs[0].token, best[0])  # greedy
    data = b"".join(bytes(token.bytes or []) for token in logprobs.content)
    assert data.decode(errors="replace") == body.choices[0].message.content
    streamed = http.post("/chat/completions", json=wanted | told | {"stream": True})
    chunks = [validate(ChatCompletionChunk, event) for event in events(streamed)]
    seen = [
        c.logprobs.content for chunk in chunks for c in chunk.choices if c.logprobs and c.logprobs.content
    ]
    assert [token for tokens in seen for token in tokens] == logprobs.content


def test_logprobs_without_alternatives(client: openai.OpenAI, model: str) -> None:
    body = client.chat.completions.create(model=model, messages=ask("hi"), max_tokens=3, logprobs=True)
    logprobs = body.choices[0].logprobs
    assert logprobs is not None
    assert [token.top_logprobs for token in logprobs.content or ()] == [[], [], []]


def test_a_bias_of_100_decides(client: openai.OpenAI, model: str, token_ids: Tokenize) -> None:
    (token,) = token_ids("x")
    assert answer(client, model, max_tokens=5, logit_bias={str(token): 100})[0] == "xxxxx"


def test_a_bias_of_minus_100_bans(client: openai.OpenAI, model: str, token_ids: Tokenize) -> None:
    (x,), (y,) = token_ids("x"), token_ids("y")
    both = {str(x): 100, str(y): 90}
    assert answer(client, model, max_tokens=3, logit_bias=both)[0] == "xxx"
    assert answer(client, model, max_tokens=3, logit_bias=both | {str(x): -100})[0] == "yyy"


def test_four_stop_strings(client: openai.OpenAI, model: str) -> None:
    said = {"guided_regex": "one two three four five six seven"}
    stops = ["seven", "six", "four", "eight"]
    text, reason, _ = answer(client, model, max_tokens=50, stop=stops, extra_body=said)
    assert (text, reason) == ("one two three ", "stop")


def test_a_regex_is_matched(client: openai.OpenAI, model: str) -> None:
    said = {"guided_regex": r"[A-Z]{3}-[0-9]{4}"}
    text, reason, _ = answer(client, model, max_tokens=50, temperature=1, extra_body=said)
    assert reason == "stop"
    assert text[3] == "-"
    assert text[:3].isupper()
    assert text[4:].isdigit()
    assert len(text) == 8


def test_one_candidate_is_the_greedy_one(client: openai.OpenAI, model: str) -> None:
    greedy = answer(client, model)
    for only in ({"top_k": 1}, {"min_p": 1.0}):
        assert answer(client, model, temperature=2, extra_body=only) == greedy
    assert answer(client, model, temperature=2, top_p=0) == greedy


def test_penalties_change_the_answer(client: openai.OpenAI, model: str, token_ids: Tokenize) -> None:
    (x,) = token_ids("x")
    bias = {str(x): 30}
    assert answer(client, model, logit_bias=bias)[0] == "x" * 16
    assert (
        answer(client, model, logit_bias={str(x): 3}, extra_body={"repetition_penalty": 2.0})[0] != "x" * 16
    )
    told = answer(client, model, max_tokens=100, logit_bias={str(x): 30}, frequency_penalty=2)[0]
    assert told.startswith("x")
    assert told != "x" * 100


def test_an_end_can_be_put_off(client: openai.OpenAI, model: str) -> None:
    ending = {str(END_OF_TURN): 100}
    text, reason, tokens = answer(client, model, logit_bias=ending)
    assert (text, reason) == ("", "stop")
    assert tokens <= 1
    text, reason, tokens = answer(client, model, logit_bias=ending, extra_body={"min_tokens": 6})
    assert reason == "stop"
    assert 6 <= tokens <= 7
    text, reason, tokens = answer(client, model, logit_bias=ending, extra_body={"ignore_eos": True})
    assert (reason, tokens) == ("length", 16)


def test_a_token_can_end_an_answer(client: openai.OpenAI, model: str, token_ids: Tokenize) -> None:
    (x,) = token_ids("x")
    ends = {"stop_token_ids": [x]}
    text, reason, tokens = answer(client, model, logit_bias={str(x): 100}, extra_body=ends)
    assert reason == "stop"
    assert text in ("", "x")
    assert tokens == 1

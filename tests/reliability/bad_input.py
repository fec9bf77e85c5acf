"""Bad requests: good ones harmed by Hypothesis, and bytes that are hardly a request at all.

Knows the endpoints' formats and HTTP; must not know how a server takes it.
"""

from __future__ import annotations

import copy
import json
import random
from typing import Any

from hypothesis import strategies as st

from reliability.mixture import PATHS, draw
from reliability.wire import Json, Target

PREFIXES = ("/v1", "/v3/openai", "/openai/v1")
# fmt: off
JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 7, 0.5, -0.0, 2**31, 2**53, 2**63, 2**64, 10**40, -(2**63), 1e308, 1e-320,
    "", " ", "\x00", "\ufeff", "null", "-1", "x" * 300, "é" * 5000, "<|im_start|>", "../etc", "{{7*7}}",
    [], {}, [None], [[]], [{}], {"": None}, {"type": "text"}, {"type": "image_url"}, {"$ref": "#"},
    ["a"] * 1000, [0] * 5000, {str(n): n for n in range(400)},
]
_TOKENS = [
    b"NaN", b"-Infinity", b"1e999", b"1E400", b"9" * 400, b'"\\ud800"', b'"\\u0000"', b"\xed\xa0\x80",
    b"\xff\xfe", b"\xef\xbb\xbf", b"\x00", b"[" * 200, b"{" * 5000, b'{"a":' * 100, b"//", b",", b'"', b"'",
]
_METHODS = ["GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "post", "FOO"]
_HEADERS = [
    "Content-Type: text/plain", "Content-Type: multipart/form-data; boundary=x", "Content-Encoding: gzip",
    "Authorization: Bearer wrong", "Authorization: Basic eDp5", "Authorization: \xff",
    "Transfer-Encoding: chunked", "Content-Length: 5", "Content-Length: -1", "Content-Length: 1e3",
    "Accept: application/xml", "Expect: 100-continue", "Upgrade: websocket", "Host: a/v1/models?",
    "Range: bytes=0-,0-", "X-Request-Id: " + "a" * 4000, "Cookie: " + "c=d;" * 900,
]
_ODD_PATHS = [
    "/", "//", "/../", "/%2e%2e/", "/%00", "?x=1", "#", "/;a", "%", "/%ff", "/models/" + "a" * 3000,
]
_FIELDS = [
    "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "n", "best_of",
    "seed", "stop", "logprobs", "top_logprobs", "logit_bias", "tools", "tool_choice",
    "response_format", "stream", "stream_options", "prompt", "messages", "input", "suffix", "echo",
    "user", "metadata", "chat_template", "chat_template_kwargs", "guided_json", "guided_regex",
    "prompt_embeds", "ignore_eos", "stop_token_ids", "min_tokens", "reasoning", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "system", "thinking", "tokens", "text",
]
# fmt: on
_VALUES = st.one_of(
    st.sampled_from(JUNK),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=20)),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
        max_leaves=8,
    ),
)


@st.composite
def bad_requests(draw_from: st.DrawFn, target: Target) -> bytes:
    """The bytes of one request: a good one with one to three things changed."""
    source = random.Random(draw_from(st.integers(0, 2**32)))
    path, body = draw(target, source)
    kind = draw_from(st.sampled_from(("value", "value", "value", "value", "bytes", "bytes", "head")))
    for _ in range(draw_from(st.integers(1, 3))):
        if kind == "value":
            _change_value(draw_from, body)
    payload = json.dumps(body).encode()
    if kind == "bytes":
        payload = _change_bytes(draw_from, payload)
    if kind != "head":
        return target.post(path, None).partition(b"Content-Length")[0] + _rest(payload)
    return _harmed_head(draw_from, target, path, payload)


def _rest(payload: bytes) -> bytes:
    return f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n".encode() + payload


def _change_value(draw_from: st.DrawFn, body: Json) -> None:
    """Anywhere in the body: another value, one less, or one more."""
    places: list[tuple[Any, Any]] = []

    def visit(value: Any) -> None:
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for key, one in list(inner):
            places.append((value, key))
            if isinstance(one, dict | list):
                visit(one)

    visit(body)
    if not places:
        return
    holder, key = draw_from(st.sampled_from(places))
    deed = draw_from(st.sampled_from(("replace", "replace", "replace", "remove", "add")))
    if deed == "remove":
        del holder[key]
    elif deed == "replace":
        holder[key] = _value(draw_from)
    elif isinstance(holder, dict):
        holder[draw_from(st.sampled_from(_FIELDS) | st.text(max_size=10))] = _value(draw_from)
    else:
        holder.append(_value(draw_from))


def _value(draw_from: st.DrawFn) -> Any:
    """A copy, since the next change may be inside it."""
    return copy.deepcopy(draw_from(_VALUES))


def _change_bytes(draw_from: st.DrawFn, payload: bytes) -> bytes:
    at = draw_from(st.integers(0, len(payload)))
    deed = draw_from(st.sampled_from(("insert", "insert", "replace", "cut", "flip", "append")))
    token = draw_from(st.sampled_from(_TOKENS) | st.binary(min_size=1, max_size=8))
    match deed:
        case "insert":
            return payload[:at] + token + payload[at:]
        case "replace":
            return payload[:at] + token + payload[at + len(token) :]
        case "cut":
            return payload[:at]
        case "flip":
            return payload[:at] + bytes(byte ^ 0x55 for byte in payload[at : at + 3]) + payload[at + 3 :]
    return payload + token


def _harmed_head(draw_from: st.DrawFn, target: Target, path: str, payload: bytes) -> bytes:
    """Another method, path, or header; the rest is right."""
    method, route = "POST", draw_from(st.sampled_from(PREFIXES)) + path
    headers = [f"Host: localhost\r\nAuthorization: Bearer {target.key}\r\nConnection: close"]
    headers.append(f"Content-Length: {len(payload)}")
    match draw_from(st.sampled_from(("method", "path", "header", "no length"))):
        case "method":
            method = draw_from(st.sampled_from(_METHODS))
        case "path":
            route = draw_from(st.sampled_from([route, "/v1", *PATHS])) + draw_from(
                st.sampled_from(_ODD_PATHS)
            )
        case "header":
            headers.append(draw_from(st.sampled_from(_HEADERS)))
        case _:
            del headers[-1]
    head = f"{method} {route} HTTP/1.1\r\n" + "\r\n".join(headers) + "\r\n\r\n"
    return head.encode("latin-1") + payload


def garbage(target: Target, source: random.Random) -> bytes:
    """Bytes for a connection, at the end of which nothing more comes."""
    path, body = draw(target, source)
    good = target.post(path, body)
    match source.randrange(8):
        case 0:
            return source.randbytes(source.randrange(1, 3000))
        case 1:
            return source.choice(_PROTOCOLS)
        case 2:  # cut anywhere
            return good[: source.randrange(len(good))]
        case 3:  # some bytes are others
            harmed = bytearray(good)
            for _ in range(source.randrange(1, 10)):
                harmed[source.randrange(len(harmed))] = source.randrange(256)
            return bytes(harmed)
        case 4:  # lines too many, too long, or none
            lines = source.choice(
                [b"X: y\r\n" * 3000, b"X" * 100_000, b"X: " + b"y" * 100_000, b"\r\n" * 50, b": \r\n"]
            )
            return b"GET /v1/models HTTP/1.1\r\n" + lines + b"\r\n"
        case 5:  # a body in chunks that are none
            sizes = source.choice(
                [b"-1", b"FFFFFFFFFFFFFFFF", b"5", b"zz", b"0x5", b"", b"5;" + b"a" * 9000, b"1 1"]
            )
            head = good.partition(b"Content-Length")[0]
            return head + b"Transfer-Encoding: chunked\r\n\r\n" + sizes + b"\r\nhello\r\n0\r\n\r\n"
        case 6:  # two lengths, or two ways to say it
            two = source.choice(
                [b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"Content-Length: +9\r\n"]
            )
            return good.replace(b"Content-Type", two + b"Content-Type", 1)
    return good + good[: source.randrange(len(good))]


_PROTOCOLS = (
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    b"GET /\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"SSH-2.0-OpenSSH_9\r\n",
    b"CONNECT localhost:22 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET http://169.254.169.254/ HTTP/1.1\r\nHost: a\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.0\r\n\r\n",
    b"\r\n\r\n\r\n",
    b"\x00" * 4096,
)

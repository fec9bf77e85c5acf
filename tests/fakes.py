"""Stand-ins for tests: a scripted engine, small vocabularies, a served model, and an ASGI caller.

Nothing here reads files from outside the tests or needs torch.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from toptwo.messages import EngineInfo, EngineStats, GenerateRequest, TokenEvent, TokenLogprobs
from toptwo.text.grammar import GrammarError
from toptwo.text.model import ServedModel
from toptwo.text.template import ChatTemplate
from toptwo.text.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>")
KEY = "test-key"


def chat(**fields: object) -> dict[str, object]:
    """A valid chat completion request for `served_model()`, with the fields added."""
    return {"model": "org/tiny-moe", "messages": [{"role": "user", "content": "hello"}], **fields}


def payloads(text: str) -> list[dict[str, object]]:
    """The JSON of all events but the last, which must be [DONE]; comments are skipped."""
    events = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    assert events[-1] == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


def engine_info(*, max_model_len: int = 2048) -> EngineInfo:
    """An EngineInfo of a tiny model."""
    return EngineInfo(
        architecture="mixtral",
        device="cpu",
        dtype="float32",
        kv_dtype="float32",
        quantization="none",
        backend="reference",
        num_threads=1,
        vocab_size=266,
        max_model_len=max_model_len,
        max_num_seqs=16,
        max_step_tokens=512,
        block_size=16,
        num_blocks=512,
        prefix_caching=True,
        num_parameters=1000,
        weight_bytes=4000,
        kv_cache_bytes=4096,
        load_seconds=0.1,
    )


@dataclass
class Script:
    """What a FakeEngine does with a request.

    token_ids: generated one per event. finish: the terminal event's reason; None ends without one.
    pause: seconds before each event. error: sentence of a terminal "error".
    raises: raised at the first iteration, or, with `raises_after`, after so many tokens.
    hang_after: generate so many tokens, then wait forever. burst: all events at once.
    """

    token_ids: Sequence[int] = ()
    finish: str | None = "stop"
    pause: float = 0.0
    num_cached_tokens: int = 0
    error: str | None = None
    raises: Exception | None = None
    raises_after: int = 0
    hang_after: int | None = None
    burst: bool = False


@dataclass
class FakeEngine:
    """An `Engine` that follows a script and keeps count.

    requests: every request that was started. aborted: ids of those closed before their terminal event.
    num_open: generators running now. slow_close: seconds that closing takes.
    script_of: chooses another script for a request, say by its id.
    Where log-probabilities are asked for, that of token i is -i / 100, and the likeliest are 0, 1, 2, ...
    """

    script: Script = field(default_factory=Script)
    script_of: Callable[[GenerateRequest], Script] | None = None
    info: EngineInfo | None = field(default_factory=engine_info)
    requests: list[GenerateRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    num_open: int = 0
    num_tokens: int = 0
    slow_close: float = 0.0
    engine_stats: EngineStats | None = None
    num_restarts: int = 0
    started: asyncio.Event = field(default_factory=asyncio.Event)
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    async def stats(self) -> EngineStats | None:
        return self.engine_stats

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        script = self.script_of(request) if self.script_of else self.script
        self.requests.append(request)
        self.num_open += 1
        self.started.set()
        finished = False
        try:
            for count, token_id in enumerate(script.token_ids):
                if script.raises is not None and count >= script.raises_after:
                    raise script.raises
                if script.hang_after == count:
                    await asyncio.Event().wait()
                if not script.burst:
                    await asyncio.sleep(script.pause)
                self.num_tokens += 1
                last = count + 1 == len(script.token_ids) and script.finish not in (None, "error")
                finished = last
                reason = script.finish if last else None
                yield TokenEvent(
                    request.request_id,
                    [token_id],
                    reason,
                    script.num_cached_tokens,
                    logprobs=_judge([token_id], request.logprobs.output),
                    prompt_logprobs=[] if count else _judge(request.prompt_ids[1:], request.logprobs.prompt),
                )
            if script.raises is not None:
                raise script.raises
            if script.hang_after is not None:
                await asyncio.Event().wait()
            if not finished and script.finish is not None:
                finished = True
                yield TokenEvent(
                    request.request_id, [], script.finish, script.num_cached_tokens, script.error
                )
            finished = True
        finally:
            if not finished:
                self.aborted.append(request.request_id)
            if self.slow_close:
                await asyncio.sleep(self.slow_close)
            self.num_open -= 1
            self.closed.set()


def _judge(token_ids: Sequence[int], num_top: int | None) -> list[TokenLogprobs]:
    if num_top is None:
        return []
    top = list(range(num_top))
    return [TokenLogprobs(-token / 100, top, [-i / 100 for i in top]) for token in token_ids]


@dataclass
class FakeGrammars:
    """A grammar checker that refuses what is in `bad`, by a word in it, and keeps what it was shown."""

    bad: tuple[str, ...] = ()
    checked: list[str] = field(default_factory=list)

    def check(self, grammar: str) -> None:
        self.checked.append(grammar)
        for word in self.bad:
            if word in grammar:
                raise GrammarError("it cannot be compiled")


def byte_level_vocabulary() -> tokenizers.Tokenizer:
    """A byte-level BPE like that of GPT-2: 256 bytes, a few merges, ChatML's control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    merges = [
        ("h", "e"),
        ("l", "l"),
        ("he", "ll"),
        ("hell", "o"),
        ("Ġ", "w"),
        ("Ġw", "o"),
        ("i", "m"),
        ("|", "im"),
    ]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(
        [tokenizers.AddedToken(t, special=True, normalized=False) for t in CONTROL_TOKENS]
    )
    return inner


def byte_fallback_vocabulary() -> tokenizers.Tokenizer:
    """A vocabulary like Llama's: a space is "▁", one is put before every text, bytes are tokens."""
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    texts += ["▁", *"abcdefghijklmnopqrstuvwxyz.,[]/<>!", "he", "ll", "▁he", "hell", "▁hell"]
    merges = [("h", "e"), ("l", "l"), ("▁", "he"), ("he", "ll"), ("▁he", "ll")]
    vocabulary = {text: index for index, text in enumerate(texts)}
    inner = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(
        [tokenizers.AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")]
    )
    return inner


def chat_tokenizer() -> Tokenizer:
    """The byte-level vocabulary; answers end with <|im_end|>."""
    inner = byte_level_vocabulary()
    return Tokenizer(
        inner,
        stop_token_ids=[inner.token_to_id("<|im_end|>")],
        named_tokens={"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
    )


def served_model(name: str = "org/tiny-moe") -> ServedModel:
    """A ChatML model without weights."""
    tokenizer = chat_tokenizer()
    return ServedModel(name, 1_700_000_000, tokenizer, ChatTemplate(CHATML, tokenizer.named_tokens))


@dataclass
class AsgiCall:
    """One request to an ASGI app that the test ends when it likes, as a client that hangs up does.

    status, answer and answer_headers fill as the app answers; `leave()` is the client's disconnect.
    The body is sent `repeat_body` times, in a chunk each; with `more_body` it never ends.
    """

    method: str
    path: str
    headers: Sequence[tuple[str, str]] = ()
    body: bytes = b""
    status: int | None = None
    answer: bytearray = field(default_factory=bytearray)
    answer_headers: dict[str, str] = field(default_factory=dict)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    first_bytes: asyncio.Event = field(default_factory=asyncio.Event)
    more_body: bool = False
    repeat_body: int = 1
    num_received: int = 0

    @classmethod
    def post_json(cls, path: str, value: object, headers: Sequence[tuple[str, str]] = ()) -> AsgiCall:
        """A POST with a JSON body."""
        headers = [("content-type", "application/json"), *headers]
        return cls("POST", path, headers, json.dumps(value).encode())

    def leave(self) -> None:
        """Hang up."""
        self.gone.set()

    async def run(self, app: object) -> None:
        """Hand the request to the app; returns when the app is done with it."""
        path = self.path.partition("?")[0]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": self.path.partition("?")[2].encode(),
            "root_path": "",
            "headers": [(k.lower().encode("latin-1"), v.encode("latin-1")) for k, v in self.headers],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        await app(scope, self._receive, self._send)  # type: ignore[operator]

    async def _receive(self) -> dict[str, object]:
        if self.num_received < self.repeat_body:
            self.num_received += 1
            more_body = self.more_body or self.num_received < self.repeat_body
            return {"type": "http.request", "body": self.body, "more_body": more_body}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, object]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]  # type: ignore[assignment]
            pairs: Sequence[tuple[bytes, bytes]] = message["headers"]  # type: ignore[assignment]
            self.answer_headers = {k.decode(): v.decode() for k, v in pairs}
        elif message["type"] == "http.response.body" and message.get("body"):
            self.answer += message["body"]  # type: ignore[arg-type]
            self.first_bytes.set()

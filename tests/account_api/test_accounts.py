"""Accounts over HTTP: what a key may do, what limits say, what is charged, and who may manage it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from fastapi import FastAPI

from fakes import KEY, AsgiCall, FakeEngine, FakeGrammars, Script, chat, served_model
from toptwo.accounts import database as database_module
from toptwo.accounts import key_store, store
from toptwo.accounts.audit import Actor
from toptwo.accounts.book import AccountBook
from toptwo.accounts.caller import Limits
from toptwo.accounts.database import Database, create_directory, open_engine
from toptwo.accounts.key_store import KeyRequest
from toptwo.accounts.keys import make_key
from toptwo.accounts.migrations import migrate
from toptwo.accounts.money import Price
from toptwo.accounts.store import Account, NewAccount
from toptwo.accounts.usage import UsageQuery, UsageRow, summarise
from toptwo.api.health import Lifecycle
from toptwo.api.security import WRONG_KEYS_PER_MINUTE, KeyRing
from toptwo.app import AppOptions, create_app
from toptwo.identity.opening import SignIn

URL = "/v3/openai/chat/completions"
ADMIN_KEY = "the-admin-key"
TOKENS = [65, 66, 67]
ME = Actor("a test")
NOW = 1_800_000_000
MODEL = "org/tiny-moe"


@dataclass
class Shop:
    """An app with accounts, over an engine that answers three tokens."""

    path: Path
    engine: FakeEngine = field(default_factory=lambda: FakeEngine(Script(token_ids=TOKENS)))
    clock: float = 0.0
    sign_in: SignIn | None = None

    def __post_init__(self) -> None:
        url = f"sqlite:///{self.path}"
        create_directory(url)
        engine = open_engine(url)
        migrate(engine)
        self.database = Database(engine)
        self.book = AccountBook(self.database, clock=lambda: self.clock, now=lambda: NOW + self.clock)
        options = AppOptions(
            book=self.book,
            admin_keys=KeyRing.from_keys([ADMIN_KEY]),
            account_grant=500_000,
            sign_in=self.sign_in,
        )
        keys = KeyRing.from_keys([KEY])
        self.app: FastAPI = create_app(
            self.engine, served_model(), FakeGrammars(), keys, Lifecycle(), options
        )

    async def account(self, **fields: Any) -> Account:
        new = NewAccount("team", **{"grant": 500_000, **fields})
        return await self.book.write(lambda c: store.create_account(c, ME, new, NOW))

    async def key(self, account: Account | None = None, **fields: Any) -> str:
        account = account or await self.account()
        wanted = KeyRequest("k", account.id, **fields)
        _, new = await self.book.write(lambda c: key_store.create_key(c, ME, wanted, NOW))
        return new.text

    async def price(self, prompt: int, cached: int, completion: int) -> None:
        price = Price(prompt, cached, completion)
        await self.book.write(lambda c: store.set_price(c, ME, MODEL, price, NOW))

    async def balance(self, account: Account) -> int:
        await self.book.write(lambda _: None)  # behind what waits to be settled
        return (await self.book.read(lambda c: store.get_account(c, account.id))).balance

    async def usage(self) -> UsageRow:
        await self.book.write(lambda _: None)
        return (await self.book.read(lambda c: summarise(c, UsageQuery(by=()))))[0]

    def client(self, key: str | None) -> httpx2.AsyncClient:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        transport = httpx2.ASGITransport(app=self.app)
        return httpx2.AsyncClient(transport=transport, base_url="http://test", headers=headers)

    async def ask(self, key: str, **fields: Any) -> httpx2.Response:
        async with self.client(key) as client:
            return await client.post(URL, json=chat(**fields))


@pytest.fixture
async def shop(tmp_path: Path) -> AsyncIterator[Shop]:
    made = Shop(tmp_path / "accounts.db")
    yield made
    made.book.close()


def error_of(answer: httpx2.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


async def test_keys_of_accounts_and_of_the_settings_are_accepted(shop: Shop) -> None:
    for key in (await shop.key(), KEY):
        answer = await shop.ask(key)
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == 3
    assert (await shop.usage()).requests == 1  # the other one belongs to nobody


async def test_one_answer_for_all_that_is_not_accepted(shop: Shop) -> None:
    account = await shop.account()
    revoked, expired, suspended = [await shop.key(account) for _ in range(2)] + [
        await shop.key(other := await shop.account())
    ]
    ids = [text.split("_")[2] for text in (revoked, expired)]
    await shop.book.write(lambda c: key_store.revoke_key(c, ME, ids[0], NOW))
    await shop.book.write(lambda c: key_store.change_key(c, ME, ids[1], {"expires_at": NOW - 1}, NOW))
    await shop.book.write(lambda c: store.change_account(c, ME, other.id, {"status": "suspended"}, NOW))
    answers = [
        await shop.ask(key)
        for key in (revoked, expired, suspended, make_key("inference").text, "nonsense", revoked[:-1])
    ]
    assert {answer.status_code for answer in answers} == {401}
    assert len({answer.text for answer in answers}) == 1
    fixed = ("x-request-id", "openai-processing-ms")
    headers = [{k: v for k, v in a.headers.items() if k not in fixed} for a in answers]
    assert all(each == headers[0] for each in headers)


async def test_management_keys_and_inference_keys_do_not_mix(shop: Shop) -> None:
    inference = await shop.key()
    _, made = await shop.book.write(lambda c: key_store.create_key(c, ME, KeyRequest("m", None), NOW))
    for management in (made.text, ADMIN_KEY):
        assert error_of(await shop.ask(management)) == (403, "wrong_key_kind")
        async with shop.client(management) as client:
            assert (await client.get("/v3/admin/accounts")).status_code == 200
            assert (await client.get("/metrics")).status_code == 200
            assert (await client.get("/no/such/path")).status_code == 404
    for key in (inference, KEY):
        async with shop.client(key) as client:
            assert error_of(await client.get("/v3/admin/accounts")) == (403, "wrong_key_kind")
    async with shop.client(inference) as client:
        assert error_of(await client.get("/metrics")) == (403, "wrong_key_kind")
    async with shop.client(None) as client:
        assert (await client.get("/v3/admin/accounts")).status_code == 401


async def test_a_key_is_for_its_scopes_and_models(shop: Shop) -> None:
    reader = await shop.key(scopes=("models:read",))
    assert error_of(await shop.ask(reader)) == (403, "insufficient_scope")
    async with shop.client(reader) as client:
        assert len((await client.get("/v1/models")).json()["data"]) == 1
        assert error_of(await client.get("/v1/usage")) == (403, "insufficient_scope")
    other = await shop.key(models=("another",))
    assert error_of(await shop.ask(other)) == (403, "model_access_denied")
    assert error_of(await shop.ask(other, model="another")) == (404, "model_not_found")
    async with shop.client(other) as client:
        assert (await client.get("/v1/models")).json()["data"] == []
        assert error_of(await client.get(f"/v1/models/{MODEL}")) == (403, "model_access_denied")
    assert (await shop.ask(await shop.key(models=(MODEL,)))).status_code == 200


async def test_requests_a_minute(shop: Shop) -> None:
    key = await shop.key(limits=Limits(requests_per_minute=3))
    for left in (2, 1, 0):
        answer = await shop.ask(key)
        assert answer.status_code == 200
        assert answer.headers["x-ratelimit-limit-requests"] == "3"
        assert answer.headers["x-ratelimit-remaining-requests"] == str(left)
        assert answer.headers["x-ratelimit-reset-requests"] == f"{20 * (3 - left):.3f}s"
    refused = await shop.ask(key)
    assert error_of(refused) == (429, "rate_limit_exceeded")
    assert refused.headers["retry-after"] == "20"
    assert "x-ratelimit-remaining-requests" in refused.headers
    shop.clock += 19
    assert (await shop.ask(key)).status_code == 429
    shop.clock += 1
    assert (await shop.ask(key)).status_code == 200


async def test_tokens_a_minute_are_reserved_and_given_back(shop: Shop) -> None:
    account = await shop.account(limits=Limits(tokens_per_minute=100))
    key = await shop.key(account)
    prompt = (await shop.ask(key, max_tokens=50)).json()["usage"]["prompt_tokens"]
    answer = await shop.ask(key, max_tokens=50)
    left = 100 - (prompt + 3)  # of the first; that of the second is still reserved as its answer begins
    assert answer.headers["x-ratelimit-remaining-tokens"] == str(left - prompt - 50)
    too_many = await shop.ask(key, max_tokens=100)
    assert error_of(too_many) == (429, "rate_limit_exceeded")
    assert too_many.headers["x-should-retry"] == "false"
    assert "retry-after" not in too_many.headers
    soon = await shop.ask(key, max_tokens=99 - prompt)
    assert error_of(soon) == (429, "rate_limit_exceeded")
    shop.clock += int(soon.headers["retry-after"])
    assert (await shop.ask(key, max_tokens=99 - prompt)).status_code == 200


@pytest.mark.parametrize("whose", ["key", "account"])
async def test_requests_at_once(shop: Shop, whose: str) -> None:
    shop.engine.script = Script(token_ids=TOKENS, hang_after=0)
    limits = Limits(concurrent_requests=2)
    account = await shop.account(limits=limits if whose == "account" else Limits())
    keys = [await shop.key(account, limits=limits if whose == "key" else Limits()) for _ in range(2)]
    keys = keys if whose == "account" else keys[:1] * 2
    calls = [AsgiCall.post_json(URL, chat(), [("authorization", f"Bearer {key}")]) for key in keys]
    running = [asyncio.create_task(call.run(shop.app)) for call in calls]
    async with asyncio.timeout(5):
        while shop.engine.num_open < 2:
            await asyncio.sleep(0.001)
    refused = await shop.ask(keys[0])
    assert error_of(refused) == (429, "rate_limit_exceeded")
    assert f"Your {whose}'s limit of 2 requests at once" in refused.text
    for call in calls:
        call.leave()
    await asyncio.gather(*running)


async def test_a_request_costs_what_it_used(shop: Shop) -> None:
    await shop.price(1_000_000, 0, 10_000_000)
    account = await shop.account()
    answer = (await shop.ask(await shop.key(account), max_tokens=100)).json()["usage"]
    assert await shop.balance(account) == 500_000 - answer["prompt_tokens"] - 30
    assert (await shop.usage()).cost_microcredits == answer["prompt_tokens"] + 30


async def test_what_cannot_be_paid_is_not_begun(shop: Shop) -> None:
    await shop.price(0, 0, 1_000_000)
    account = await shop.account(grant=50)
    refused = await shop.ask(await shop.key(account), max_tokens=51)
    assert error_of(refused) == (429, "insufficient_quota")
    assert refused.headers["x-should-retry"] == "false"
    assert "your account has 0.00005" in refused.text
    assert shop.engine.requests == []
    assert (await shop.ask(await shop.key(account), max_tokens=50)).status_code == 200
    assert await shop.balance(account) == 47


async def test_a_stream_that_is_left_costs_what_came(shop: Shop) -> None:
    await shop.price(0, 0, 1_000_000)
    account = await shop.account()
    key = await shop.key(account)
    for stream, cost in ((True, 2), (False, 0)):
        before = await shop.balance(account)
        shop.engine.script = Script(token_ids=TOKENS, hang_after=2)
        shop.engine.num_tokens = 0
        call = AsgiCall.post_json(URL, chat(stream=stream), [("authorization", f"Bearer {key}")])
        running = asyncio.create_task(call.run(shop.app))
        async with asyncio.timeout(5):
            while shop.engine.num_tokens < 2:
                await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        call.leave()
        await running
        assert await shop.balance(account) == before - cost


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_fails_costs_what_came(shop: Shop, stream: bool) -> None:
    await shop.price(0, 0, 1_000_000)
    account = await shop.account()
    shop.engine.script = Script(token_ids=TOKENS, finish="error", error="no")
    await shop.ask(await shop.key(account), stream=stream)
    assert await shop.balance(account) == 500_000 - (3 if stream else 0)


async def test_all_sums_are_the_same(shop: Shop) -> None:
    """Usage in answers = usage rows = ledger = metrics, over every endpoint and form of answer."""
    await shop.price(3_000_000, 1_000_000, 5_000_000)
    shop.engine.script = Script(token_ids=TOKENS, num_cached_tokens=2)
    account = await shop.account()
    prompt_sum = completion_sum = 0
    async with shop.client(await shop.key(account)) as client:
        for path, body in (
            ("chat/completions", chat()),
            ("chat/completions", chat(n=3)),
            ("chat/completions", chat(stream=True, stream_options={"include_usage": True})),
            ("completions", {"model": MODEL, "prompt": ["hello", "hell"], "n": 2}),
            ("completions", {"model": MODEL, "prompt": "hello", "max_tokens": 0, "echo": True}),
            ("completions", {"model": MODEL, "prompt": "hello", "best_of": 3, "n": 1}),
            ("responses", {"model": MODEL, "input": "hello"}),
            ("messages", {"model": MODEL, "messages": chat()["messages"], "max_tokens": 10}),
        ):
            answer = await client.post(f"/v3/openai/{path}", json=body)
            assert answer.status_code == 200, answer.text
            if answer.headers["content-type"].startswith("text/event-stream"):
                last = answer.text.strip().split("\n\n")[-2].removeprefix("data: ")
                used = json.loads(last)["usage"]
            else:
                used = answer.json()["usage"]
            prompt_sum += used.get("prompt_tokens", used.get("input_tokens"))
            prompt_sum += used.get("cache_read_input_tokens") or 0
            completion_sum += used.get("completion_tokens", used.get("output_tokens"))
    row = await shop.usage()
    assert (row.prompt_tokens, row.completion_tokens) == (prompt_sum, completion_sum)
    assert 500_000 - await shop.balance(account) == row.cost_microcredits > 0
    async with shop.client(ADMIN_KEY) as client:
        metrics = (await client.get("/metrics")).text
    for name, total in (("prompt", prompt_sum), ("generation", completion_sum)):
        assert f'toptwo:request_{name}_tokens_sum{{model_name="{MODEL}"}} {float(total)}' in metrics


async def test_64_clients_never_exceed_the_limits_of_their_key(shop: Shop) -> None:
    limits = Limits(requests_per_minute=120, tokens_per_minute=3000, concurrent_requests=8)
    key = await shop.key(limits=limits)
    shop.engine.script = Script(token_ids=TOKENS, pause=0.001)
    answered = most_open = tokens = 0

    async def client() -> None:
        nonlocal answered, most_open, tokens
        for _ in range(10):
            answer = await shop.ask(key, max_tokens=20)
            most_open = max(most_open, shop.engine.num_open)
            if answer.status_code == 200:
                answered += 1
                tokens += answer.json()["usage"]["total_tokens"]
            else:
                assert error_of(answer) == (429, "rate_limit_exceeded")
            shop.clock += 0.05

    await asyncio.gather(*(client() for _ in range(64)))
    minutes = shop.clock / 60
    assert 0 < answered <= 120 * (1 + minutes)
    assert tokens <= 3000 * (1 + minutes)
    assert most_open <= 8
    assert (await shop.usage()).requests == answered


async def test_wrong_keys_of_one_address_are_only_looked_up_so_often(shop: Shop) -> None:
    good = await shop.key()
    answers = [await shop.ask(make_key("inference").text) for _ in range(WRONG_KEYS_PER_MINUTE + 5)]
    statuses = [answer.status_code for answer in answers]
    assert statuses == [401] * WRONG_KEYS_PER_MINUTE + [429] * 5
    assert int(answers[-1].headers["retry-after"]) >= 1
    assert (await shop.ask(KEY)).status_code == 200
    assert (await shop.ask(good)).status_code == 429  # it has not been seen yet, and is looked up later


INJECTIONS = [
    pattern.replace("@", str(number))
    for number in range(20)
    for pattern in (
        "' OR @=@ --", "toptwo_sk_'; DROP TABLE keys; --@", '" OR ""="@', "1; SELECT pg_sleep(@)", "%27 OR @",
        "toptwo_sk_aaaaaaaa_' UNION SELECT @", "\\'; --@", "admin'--@", "${@}", "{{@}}",
    )
]  # fmt: skip


async def test_200_injections_get_401_and_change_nothing(shop: Shop) -> None:
    account = await shop.account()
    assert len(INJECTIONS) == 200
    answers = [await shop.ask(text) for text in INJECTIONS]
    assert {answer.status_code for answer in answers} == {401}
    assert await shop.balance(account) == 500_000


@pytest.mark.parametrize(
    "break_it",
    [
        lambda path: path.rename(path.with_suffix(".gone")),
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=["gone", "a directory"],
)
async def test_without_the_database_inference_answers_503(
    shop: Shop, break_it: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "CLOSE_SECONDS", 0.2)  # for what can never be written here
    key = await shop.key()
    assert (await shop.ask(key)).status_code == 200
    requests = len(shop.engine.requests)
    break_it(shop.path)
    refused = await shop.ask(key)
    assert error_of(refused) == (503, "accounts_unavailable")
    assert refused.headers["retry-after"] == "5"
    assert len(shop.engine.requests) == requests
    assert (await shop.ask(KEY)).status_code == 200  # which needs no database
    async with shop.client(ADMIN_KEY) as client:
        assert error_of(await client.get("/v3/admin/accounts")) == (503, "accounts_unavailable")


async def test_openais_client_says_what_is_wrong(shop: Shop) -> None:
    await shop.price(0, 0, 1_000_000)
    account = await shop.account(grant=1)
    async with openai.AsyncOpenAI(
        base_url="http://test/v3/openai",
        api_key=await shop.key(account),
        http_client=httpx2.AsyncClient(transport=httpx2.ASGITransport(app=shop.app)),
    ) as client:
        with pytest.raises(openai.RateLimitError) as caught:
            await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hello"}])
    assert caught.value.code == "insufficient_quota"
    async with shop.client(ADMIN_KEY) as admin:
        metrics = (await admin.get("/metrics")).text
    assert 'outcome="refused",status="429"} 1.0' in metrics  # it did not try again

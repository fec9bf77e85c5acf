"""Who gets in, who is told to come back and when, and that nobody is forgotten inside."""

from __future__ import annotations

import asyncio
import heapq
import json
from dataclasses import dataclass, field

import httpx2
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import KEY, AsgiCall, FakeEngine, FakeGrammars, Script, chat, engine_info, served_model
from toptwo.accounts.caller import Caller
from toptwo.api.admission import LONGEST_RETRY_SECONDS, Admission, AdmissionLimits, Permit, Places
from toptwo.api.health import Lifecycle
from toptwo.api.job import GenerationJob, OutputForm, num_together
from toptwo.api.security import KeyRing
from toptwo.app import AppOptions, create_app
from toptwo.errors import ApiError
from toptwo.messages import GenerateRequest, LogprobsWanted, SamplingParams

URL = "/v1/chat/completions"
OTHER_KEY = "other-key"
TOKENS = [65, 66, 67]


def bearer(key: str = KEY) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {key}")]


@dataclass
class House:
    """An app whose engine answers only when it is told to, with two places and one to wait in."""

    limits: AdmissionLimits = field(default_factory=lambda: AdmissionLimits(max_running=2, max_queue=1))
    engine: FakeEngine = field(default_factory=FakeEngine)
    lifecycle: Lifecycle = field(default_factory=Lifecycle)

    def __post_init__(self) -> None:
        self.engine.script = Script(token_ids=TOKENS, hang_after=0)
        keys = KeyRing.from_keys([KEY, OTHER_KEY])
        self.app = create_app(
            self.engine, served_model(), FakeGrammars(), keys, self.lifecycle, AppOptions(self.limits)
        )

    async def start(
        self, count: int, key: str = KEY, **fields: object
    ) -> list[tuple[AsgiCall, asyncio.Task[None]]]:
        """Requests that the engine has been asked for, and is silent about."""
        started = self.engine.num_open + count
        calls = [AsgiCall.post_json(URL, chat(**fields), bearer(key)) for _ in range(count)]
        running = [(call, asyncio.create_task(call.run(self.app))) for call in calls]
        async with asyncio.timeout(5):
            while self.engine.num_open < started:
                await asyncio.sleep(0.001)
        return running

    async def ask(self, key: str = KEY, path: str = URL, body: object = None) -> AsgiCall:
        """A request to its end."""
        call = AsgiCall.post_json(path, chat() if body is None else body, bearer(key))
        await asyncio.wait_for(call.run(self.app), 5)
        return call

    async def ask_answered(self) -> int | None:
        """The status of a request that the engine answers at once."""
        before, self.engine.script = self.engine.script, Script(token_ids=TOKENS)
        try:
            return (await self.ask()).status
        finally:
            self.engine.script = before


async def leave(running: list[tuple[AsgiCall, asyncio.Task[None]]]) -> None:
    for call, task in running:
        call.leave()
        await asyncio.wait_for(task, 5)


@pytest.fixture
async def house() -> House:
    return House()


def refusal(call: AsgiCall) -> tuple[int | None, object, int]:
    """Status, code, and the seconds after which to try again."""
    error = json.loads(call.answer)["error"]
    seconds = int(call.answer_headers["retry-after"])
    assert 1 <= seconds <= LONGEST_RETRY_SECONDS
    assert call.answer_headers["x-should-retry"] == "true"
    return call.status, error.get("code", error["type"]), seconds


@pytest.mark.parametrize("stream", [True, False])
async def test_a_full_house_refuses_with_the_time_to_come_back(house: House, stream: bool) -> None:
    inside = await house.start(3, stream=stream)
    call = await house.ask(OTHER_KEY, body=chat(stream=stream))
    assert refusal(call)[:2] == (503, "overloaded")
    assert house.engine.num_open == 3
    await leave(inside)
    assert await house.ask_answered() == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "org/tiny-moe", "prompt": "a"}),
        ("/v1/responses", {"model": "org/tiny-moe", "input": "a"}),
        ("/v1/messages", {"model": "org/tiny-moe", "max_tokens": 3, "messages": []}),
        ("/v1/tokenize", {"prompt": "a"}),
        ("/v1/detokenize", {"tokens": [65]}),
    ],
)
async def test_every_route_that_takes_a_body_has_the_same_door(
    house: House, path: str, body: dict[str, object]
) -> None:
    inside = await house.start(3)
    call = await house.ask(path=path, body=body)
    wanted = "overloaded_error" if path == "/v1/messages" else "overloaded"
    assert refusal(call)[:2] == (503, wanted)
    await leave(inside)


async def test_models_and_health_are_answered_by_a_full_house(house: House) -> None:
    inside = await house.start(3)
    for path in ("/v1/models", "/health/live", "/health/ready"):
        call = AsgiCall("GET", path, bearer())
        await call.run(house.app)
        assert call.status == 200
    await leave(inside)


async def test_a_stream_keeps_its_place_to_its_end_and_no_longer(house: House) -> None:
    house.engine.script = Script(token_ids=TOKENS, hang_after=2)
    inside = await house.start(3, stream=True)
    await asyncio.wait_for(inside[0][0].first_bytes.wait(), 5)
    assert (await house.ask()).status == 503
    await leave(inside[:1])
    assert await house.ask_answered() == 200
    await leave(inside[1:])


@pytest.mark.parametrize("body", [b"{", b"[]", json.dumps(chat(model="other")).encode()])
async def test_a_bad_request_leaves_no_trace(house: House, body: bytes) -> None:
    for _ in range(9):
        call = AsgiCall("POST", URL, bearer(), body)
        await call.run(house.app)
        assert call.status in (400, 404)
    assert await house.ask_answered() == 200


async def test_failures_and_cancelled_tasks_leave_no_trace(house: House) -> None:
    house.engine.script = Script(finish="error", error="Lost.")
    for stream in (True, False) * 4:
        await house.ask(body=chat(stream=stream))
    house.engine.script = Script(hang_after=0)
    for _, task in await house.start(3):
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert await house.ask_answered() == 200


async def test_a_slow_sender_takes_no_place(house: House) -> None:
    slow = []
    for _ in range(5):
        call = AsgiCall("POST", URL, bearer(), b'{"model": ', more_body=True)
        slow.append((call, asyncio.create_task(call.run(house.app))))
    await asyncio.sleep(0.01)
    assert await house.ask_answered() == 200
    await leave(slow)


async def test_a_full_house_does_not_wait_for_the_body(house: House) -> None:
    inside = await house.start(3)
    call = AsgiCall("POST", URL, bearer(), b'{"model": ', more_body=True)
    await asyncio.wait_for(call.run(house.app), 5)
    assert (call.status, call.num_received) == (503, 0)
    await leave(inside)


async def test_a_stranger_is_not_told_whether_the_house_is_full(house: House) -> None:
    inside = await house.start(3)
    assert (await house.ask("no-such-key")).status == 401
    await leave(inside)


async def test_choices_take_a_place_each(house: House) -> None:
    inside = await house.start(1, n=2, max_tokens=5)
    assert refusal(await house.ask(body=chat(n=2)))[1] == "overloaded"
    assert await house.ask_answered() == 200
    await leave(inside)
    answer = await house.ask(body=chat(n=4))
    assert (answer.status, json.loads(answer.answer)["error"]["code"]) == (400, "invalid_value")
    assert "at most 3" in json.loads(answer.answer)["error"]["message"]
    body = {"model": "org/tiny-moe", "prompt": ["a", "b"], "best_of": 2}
    assert (await house.ask(path="/v1/completions", body=body)).status == 400


async def test_a_key_has_a_limit_of_its_own() -> None:
    house = House(AdmissionLimits(max_running=4, max_queue=0, max_per_key=2))
    inside = await house.start(2)
    assert refusal(await house.ask())[:2] == (429, "rate_limit_exceeded")
    more = await house.start(2, OTHER_KEY)
    assert refusal(await house.ask())[:2] == (429, "rate_limit_exceeded")  # its own limit is named first
    await leave([*inside, *more])
    assert await house.ask_answered() == 200


async def test_the_official_client_comes_back_when_it_was_told_to(house: House) -> None:
    inside = await house.start(3)
    transport = httpx2.ASGITransport(app=house.app)
    async with openai.AsyncOpenAI(
        base_url="http://test/v1",
        api_key=KEY,
        max_retries=1,
        http_client=httpx2.AsyncClient(transport=transport),
    ) as client:
        asking = asyncio.create_task(
            client.chat.completions.create(model="org/tiny-moe", messages=[{"role": "user", "content": "x"}])
        )
        await asyncio.sleep(0.2)
        house.engine.script = Script(token_ids=TOKENS)
        await leave(inside)
        assert (await asyncio.wait_for(asking, 5)).choices[0].finish_reason == "stop"


@pytest.mark.parametrize("path", [URL, "/v1/completions", "/v1/responses", "/v1/messages"])
async def test_who_waited_too_long_in_the_engine_is_told_the_same(house: House, path: str) -> None:
    house.engine.script = Script(finish="overload")
    body: dict[str, object] = {"model": "org/tiny-moe"}
    body |= {"prompt": "a"} if path.endswith("/completions") and path != URL else {}
    body |= {"input": "a"} if path.endswith("responses") else {}
    if not set(body) & {"prompt", "input"}:
        body |= {"messages": [{"role": "user", "content": "a"}], "max_tokens": 5}
    call = await house.ask(path=path, body=body)
    wanted = "overloaded_error" if path == "/v1/messages" else "overloaded"
    assert refusal(call)[:2] == (503, wanted)
    streamed = (await house.ask(path=path, body=body | {"stream": True})).answer.decode()
    assert "The server has as many requests as it takes." in streamed
    assert '"finish_reason":"' not in streamed


async def test_draining_and_a_missing_engine_say_when_to_come_back(house: House) -> None:
    house.lifecycle.draining = True
    call = await house.ask()
    assert (call.status, call.answer_headers["retry-after"]) == (503, "5")
    house.lifecycle.draining = False
    house.engine.info = None
    call = await house.ask()
    assert (call.status, call.answer_headers["retry-after"]) == (503, "5")


class TestChoicesAndMemory:
    """Choices that find no room in the KV cache together wait for one another."""

    @staticmethod
    def job(num_prompt: int, max_tokens: int, n: int = 8, prompt: int | None = None) -> GenerationJob:
        one = GenerateRequest(
            "r", [1] * num_prompt, SamplingParams(0), max_tokens, logprobs=LogprobsWanted(prompt=prompt)
        )
        return GenerationJob((one,) * n, OutputForm())

    @pytest.mark.parametrize(
        ("num_prompt", "max_tokens", "most"),
        [
            (1, 15, 512),
            (1, 16, 256),
            (16, 16, 256),
            (17, 15, 511),
            (1025, 15, 448),
            (1, 2047, 4),
            (2000, 48, 97),
        ],
    )
    def test_what_fits_is_counted_in_blocks(self, num_prompt: int, max_tokens: int, most: int) -> None:
        assert num_together(self.job(num_prompt, max_tokens), engine_info()) == most

    def test_prompts_that_are_scored_are_not_shared(self) -> None:
        assert num_together(self.job(1025, 15, prompt=0), engine_info()) == 512 // 65

    def test_one_always_fits(self) -> None:
        assert num_together(self.job(2000, 100_000), engine_info()) == 1

    async def test_the_others_wait_for_those(self) -> None:
        house = House(AdmissionLimits(max_running=16))
        most_open = 0

        def script_of(request: GenerateRequest) -> Script:
            nonlocal most_open
            most_open = max(most_open, house.engine.num_open + 1)
            return Script(token_ids=TOKENS, pause=0.002)

        house.engine.script_of = script_of
        call = await house.ask(body=chat(n=8, max_tokens=1000))
        choices = json.loads(call.answer)["choices"]
        assert [choice["finish_reason"] for choice in choices] == ["stop"] * 8
        assert 1 < most_open == 512 // 63


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Simulation:
    """An engine that runs four sequences, each for so long, behind a door; who is refused comes back once."""

    seconds: float
    clock: FakeClock = field(default_factory=FakeClock)
    num_refused: int = 0
    num_back_inside: int = 0

    def __post_init__(self) -> None:
        self.admission = Admission(AdmissionLimits(max_running=4, max_queue=4), self.clock)

    def burst(self, count: int) -> None:
        """So many at nearly the same time, until all have been served."""
        self.num_refused = self.num_back_inside = self.num_running = 0
        self.waiting: list[Permit] = []
        start = self.clock.now
        self.events: list[tuple[float, int, Permit | None]] = [
            (start + i / 200, i, None) for i in range(count)
        ]
        while self.events:
            self.clock.now, number, permit = heapq.heappop(self.events)
            if permit is None:
                self.arrive(number)
            else:
                permit.release()
                self.num_running -= 1
            while self.waiting and self.num_running < 4:
                self.num_running += 1
                end = self.clock.now + self.seconds
                heapq.heappush(self.events, (end, -len(self.events), self.waiting.pop(0)))

    def arrive(self, number: int) -> None:
        permit, is_back = Permit(self.admission, Caller("key")), number >= 1000
        try:
            permit.take(1)
        except ApiError as error:
            if not is_back:
                self.num_refused += 1
                later = self.clock.now + int(error.headers["Retry-After"])
                heapq.heappush(self.events, (later, number + 1000, None))
            return
        self.num_back_inside += is_back
        self.waiting.append(permit)


@pytest.mark.parametrize("seconds", [0.2, 1.0, 3.0])
def test_who_comes_back_when_told_mostly_gets_in(seconds: float) -> None:
    simulation = Simulation(seconds)
    simulation.burst(12)  # the pace is known after some busy time
    simulation.clock.now += 100
    simulation.burst(40)
    assert simulation.num_refused > 10
    assert simulation.num_back_inside >= 0.9 * simulation.num_refused
    assert simulation.admission.num_open == 0


def test_the_pace_is_that_of_busy_times_alone() -> None:
    clock = FakeClock()
    places = Places(4, 2, clock)
    for _ in range(10):  # a quiet hour: one request at a time
        places.take(1)
        clock.now += 1
        places.free(1)
        clock.now += 360
    places.take(4)
    clock.now += 0.5
    places.free(1)
    places.take(1)
    assert places.promise(1) == 1
    clock.now += 20  # nothing has come free since, so it may take as long again
    assert places.promise(1) >= 10


def test_each_who_is_refused_is_told_of_another_place() -> None:
    clock = FakeClock()
    places = Places(2, 2, clock)
    places.take(2)
    clock.now += 3
    told = [places.promise(1) for _ in range(100)]
    assert told[:3] == [3, 6, 9]
    assert told == sorted(told)
    assert told[-1] == LONGEST_RETRY_SECONDS


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4), st.floats(0, 50)), max_size=60))
def test_no_count_goes_astray(script: list[tuple[int, int, float]]) -> None:
    """Callers come and go in any order; never are more inside than may be, and in the end nobody is."""
    clock = FakeClock()
    admission = Admission(AdmissionLimits(max_running=3, max_queue=2, max_per_key=3), clock)
    permits = {number: Permit(admission, Caller(f"key {number % 2}")) for number in range(4)}
    held = dict.fromkeys(permits, 0)
    for number, count, seconds in script:
        clock.now += seconds
        if count == 4:
            permits[number].release()
            held[number] = 0
            continue
        own = held[number] + held[(number + 2) % 4]
        fits = own + count <= 3 and sum(held.values()) + count <= 5
        if fits:
            permits[number].take(count)
            held[number] += count
        else:
            with pytest.raises(ApiError) as caught:
                permits[number].take(count)
            never = held[number] + count > 3
            assert caught.value.status == (400 if never else 429 if own + count > 3 else 503)
            assert 1 <= int(caught.value.headers.get("Retry-After", 1)) <= LONGEST_RETRY_SECONDS
        assert admission.num_open == sum(held.values())
    for permit in permits.values():
        permit.release()
        permit.release()
    assert admission.num_open == 0

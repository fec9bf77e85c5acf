"""Preemption forced every few steps, on a runner that checks every block: nothing of it can be seen."""

from __future__ import annotations

import random

import pytest

from fake_runner import VOCAB, CheckingRunner, generate
from fault_switch.injected_faults import parse, preempt_every
from toptwo.engine.blocks import BlockPool
from toptwo.engine.scheduler import Scheduler, SchedulerLimits
from toptwo.messages import GenerateRequest, SamplingParams

NUM_BLOCKS, BLOCK = 32, 4


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("every", [1, 2, 5])
def test_a_thousand_requests_with_forced_preemption_get_their_tokens(every: int, caching: bool) -> None:
    dice = random.Random(every)
    scheduler = Scheduler(SchedulerLimits(VOCAB, 64, 6, 16, caching), BlockPool(NUM_BLOCKS, BLOCK))
    preempt_every(scheduler, every)
    runner = CheckingRunner(6, NUM_BLOCKS, BLOCK, 16)
    requests, tokens, ends = {}, {}, {}
    for number in range(1000):
        prompt = [dice.randrange(3) for _ in range(dice.randint(1, 40))]
        stop = [dice.randrange(VOCAB)] if dice.random() < 0.5 else []
        wanted = GenerateRequest(f"r{number}", prompt, SamplingParams(seed=0), dice.randint(1, 20), stop)
        requests[wanted.request_id] = wanted
        tokens[wanted.request_id] = []
    waiting = list(requests.values())
    steps = 0
    while waiting or scheduler.has_work:
        while waiting and scheduler.num_waiting < 4:
            assert scheduler.add(waiting.pop()) is None
        plan = scheduler.plan()
        assert plan, "work is left but nothing is planned"
        for event in scheduler.apply(runner.execute(plan)):
            tokens[event.request_id] += event.token_ids
            if event.finish_reason:
                assert event.request_id not in ends
                ends[event.request_id] = event.finish_reason
        steps += 1
        assert steps < 200_000, "no progress"
    assert set(ends) == set(requests)
    for name, wanted in requests.items():
        assert tokens[name] == generate(wanted.prompt_ids, wanted.max_tokens, wanted.stop_token_ids)
    assert scheduler.blocks.num_free == NUM_BLOCKS
    assert scheduler.num_preemptions > steps / every / 2


def test_a_fault_that_does_not_exist_is_no_silent_one() -> None:
    assert parse("slow@20,raise@7*") == {"slow": 20, "raise": 7}
    assert parse("slow@20,raise@7*", first=False) == {"raise": 7}
    for text in ("rise@7", "raise", "raise@0", "raise@7,", "raise@-1"):
        with pytest.raises(ValueError, match="is no fault"):
            parse(text)

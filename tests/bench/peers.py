"""toptwo beside llama.cpp's server, over HTTP: same weights, same prompts, turn by turn on one machine.

Both servers run all the time with the same number of threads; one is asked while the other is idle, and
which comes first changes from round to round, because a machine's speed drifts by more than what is to be
seen. Both sample alike (temperature 1, top-k 40, a seed per request): greedy answers of a random model run
into loops that visit few experts. Both reuse no prompt: even distinct ones begin with one system text.

Run: make bench-peers LLAMA_SERVER=path/to/llama-server [ARGS="--quantization int4 --rounds 5"]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import psutil  # type: ignore[import-untyped]
from rich.console import Console

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "kernels" / "bench")]

from machine import describe_machine  # type: ignore[import-not-found]  # noqa: E402

from server_process import ServerProcess  # noqa: E402
from toptwo.bench.client import Call, Outcome, Target, open_client, run_call  # noqa: E402
from toptwo.model_commands.export import export  # noqa: E402
from toptwo.settings import load_settings  # noqa: E402
from toptwo.source import ModelSource, find_model  # noqa: E402
from toptwo.text.model import ServedModel, load_served_model  # noqa: E402

KEY = "bench-key"
GGUF_TYPES = {"int8": "q8_0", "int4": "q4_0", "none": "bf16"}
STREAMS = 16
CONTEXT = 768  # of a stream: the longest prompt is 512 tokens, and llama.cpp rounds up to multiples of 256
SAMPLING: dict[str, object] = {"top_k": 40, "top_p": 1.0, "min_p": 0.0, "ignore_eos": True}
START_SECONDS = 600


@dataclass(frozen=True)
class Load:
    """What is asked of a server at once.

    prompt_tokens: of the whole prompt; 0 is as few as the template allows.
    repeats: so many times after each other; every time gives a value, and their median counts.
    """

    streams: int
    prompt_tokens: int
    new_tokens: int
    repeats: int = 1


@dataclass(frozen=True)
class Metric:
    """A figure taken from the answers to a load."""

    name: str
    unit: str
    load: str
    value: Callable[[Sequence[Outcome]], float]
    higher_is_better: bool = True


# Four tokens where only the first one counts: it may be half a character, which no server sends.
LOADS = {
    "single": Load(1, 94, 128),
    "burst": Load(STREAMS, 94, 64),
    "long": Load(1, 512, 4),
    "short": Load(1, 0, 4, repeats=5),
}


def decode_speed(outcomes: Sequence[Outcome]) -> float:
    """Tokens per second of one stream from its first token to its last."""
    (one,) = outcomes
    return ((one.completion_tokens or 0) - 1) / (one.token_times[-1] - one.token_times[0])


def steady_speed(outcomes: Sequence[Outcome]) -> float:
    """Tokens per second of all streams together, while all of them decode."""
    start, end = max(o.token_times[0] for o in outcomes), min(o.token_times[-1] for o in outcomes)
    if end <= start:
        return 0.0  # there was no moment at which all decoded
    # Some tokens carry no text, or wait for the rest of a character.
    tokens = (
        sum(start < moment <= end for moment in o.token_times)
        * (o.completion_tokens or 0)
        / len(o.token_times)
        for o in outcomes
    )
    return sum(tokens) / (end - start)


def prefill_speed(outcomes: Sequence[Outcome]) -> float:
    """Prompt tokens per second until the first token came."""
    (one,) = outcomes
    return (one.prompt_tokens or 0) / first_token(outcomes)


def first_token(outcomes: Sequence[Outcome]) -> float:
    """Seconds to the first token, median of the streams."""
    return statistics.median(o.token_times[0] - o.started for o in outcomes)


METRICS = [
    Metric("decode, 1 stream", "tok/s", "single", decode_speed),
    Metric(f"decode, {STREAMS} streams together", "tok/s", "burst", steady_speed),
    Metric("prefill, 512 tokens", "tok/s", "long", prefill_speed),
    Metric("TTFT, shortest prompt", "s", "short", first_token, higher_is_better=False),
    Metric(f"TTFT p50, burst of {STREAMS}", "s", "burst", first_token, higher_is_better=False),
]
MEMORY = Metric("memory, proportional set size", "GB", "", lambda _: 0.0, higher_is_better=False)


@dataclass
class Side:
    """A running server. extra: fields of a request that only it takes. values: per metric, one a round."""

    name: str
    target: Target
    pids: Callable[[], list[int]]
    extra: dict[str, object] = field(default_factory=dict)
    values: dict[str, list[float]] = field(default_factory=dict)
    idle_cpu: list[float] = field(default_factory=list)

    def processes(self) -> list[psutil.Process]:
        return [psutil.Process(pid) for pid in self.pids()]

    def cpu_seconds(self) -> float:
        """What all its threads have used since it started."""
        return float(sum(sum(process.cpu_times()[:2]) for process in self.processes()))

    def memory(self) -> float:
        """GB of all its processes; pages that several share are divided among them."""
        return float(sum(process.memory_full_info().pss for process in self.processes())) / 1e9


class Prompts:
    """Prompts of random common words, each different, with an exact number of tokens, template included."""

    def __init__(self, model: ServedModel, seed: int) -> None:
        self._model = model
        self._random = random.Random(seed)
        tokens = (model.tokenizer.decode([i]) for i in range(2000, 20_000))
        words = {t[1:] for t in tokens if t[:1] == " " and len(t) > 3 and t[1:].isascii() and t[1:].islower()}
        self._words = sorted(word for word in words if word.isalpha())
        self.shortest = self._count(self._text(1))

    def take(self, num_tokens: int) -> str:
        """num_tokens: of the whole prompt; 0 is one word."""
        if not num_tokens:
            return self._text(1)
        num_words = num_tokens - self.shortest + 1
        for _ in range(100):
            text = self._text(num_words)
            if (missing := num_tokens - self._count(text)) == 0:
                return text
            num_words += missing
        raise SystemExit(
            f"no prompt of {num_tokens} tokens was found; the template takes {self.shortest - 1}"
        )

    def _text(self, num_words: int) -> str:
        return " ".join(self._random.choices(self._words, k=num_words))

    def _count(self, text: str) -> int:
        return len(self._model.encode_chat([{"role": "user", "content": text}]))


@dataclass(frozen=True)
class Plan:
    """What a person asked for, with the model found."""

    source: ModelSource
    llama_server: Path | None
    only: str | None
    rounds: int
    threads: int
    work: Path
    console: Console

    def gguf(self, quantization: str) -> Path:
        """The model as a file for llama.cpp, written once and again when the checkpoint has changed."""
        kind = GGUF_TYPES[quantization]
        path = self.work / f"{self.source.name}-{kind}.gguf"
        newest = max(file.stat().st_mtime for file in self.source.directory.iterdir())
        if not path.exists() or path.stat().st_mtime < newest:
            export(str(self.source.directory), path, kind, True, self.console)
        return path


@contextlib.contextmanager
def run_ours(plan: Plan, quantization: str) -> Iterator[Side]:
    arguments = [str(plan.source.directory), "--quantization", quantization, "--api-key", KEY]
    arguments += ["--threads", str(plan.threads), "--no-prefix-caching", "--served-model-name", "model"]
    with tempfile.TemporaryDirectory() as directory:
        server = ServerProcess(Path(directory), arguments)
        try:
            server.wait_until_ready()
            target = Target(server.url, KEY, "model")
            yield Side("toptwo", target, lambda: [server.process.pid, server.engine_pid])
            server.stop()
        finally:
            server.kill()


@contextlib.contextmanager
def run_llama(plan: Plan, quantization: str) -> Iterator[Side]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(plan.llama_server), "-m", str(plan.gguf(quantization)), "--port", str(port), "--no-webui"]
    command += [
        "-t",
        str(plan.threads),
        "-np",
        str(STREAMS),
        "-c",
        str(STREAMS * CONTEXT),
        "--cache-ram",
        "0",
    ]
    log = plan.work / "llama-server.log"
    with log.open("wb") as file:
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not is_healthy(port):
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"llama-server did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)
        target = Target(f"http://127.0.0.1:{port}/v1", None, "model")
        yield Side("llama.cpp", target, lambda: [server.pid], {"cache_prompt": False})
    finally:
        server.kill()
        server.wait()


def is_healthy(port: int) -> bool:
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200
    except httpx2.TransportError:
        return False


async def ask(side: Side, load: Load, prompts: Sequence[str]) -> list[Outcome]:
    """One prompt per stream, all at once. Raises SystemExit where an answer is not what was asked for."""
    async with open_client(side.target.base_url) as http:
        calls = (
            Call(prompt, load.new_tokens, 1.0, {**SAMPLING, **side.extra, "seed": seed}, timeout=1800)
            for seed, prompt in enumerate(prompts)
        )
        outcomes = await asyncio.gather(*(run_call(http, side.target, call) for call in calls))
    for outcome in outcomes:
        if outcome.error:
            raise SystemExit(f"{side.name}: {outcome.error}: {outcome.detail}")
        if outcome.completion_tokens != load.new_tokens or not outcome.token_times:
            raise SystemExit(f"{side.name}: {outcome.completion_tokens} tokens instead of {load.new_tokens}")
        if load.prompt_tokens not in (0, outcome.prompt_tokens):
            raise SystemExit(f"{side.name} counts {outcome.prompt_tokens} tokens, not {load.prompt_tokens}")
    return outcomes


async def run_round(sides: Sequence[Side], prompts: Prompts) -> None:
    """Every load once on every side, and what the sides that were not asked spent meanwhile."""
    for name, load in LOADS.items():
        texts = [[prompts.take(load.prompt_tokens) for _ in range(load.streams)] for _ in range(load.repeats)]
        for side in sides:
            others = [other for other in sides if other is not side]
            before, began = [other.cpu_seconds() for other in others], time.perf_counter()
            answers = [await ask(side, load, some) for some in texts]
            seconds = time.perf_counter() - began
            for other, spent in zip(others, before, strict=True):
                other.idle_cpu.append((other.cpu_seconds() - spent) / seconds)
            for metric in METRICS:
                if metric.load == name:
                    value = statistics.median(metric.value(outcomes) for outcomes in answers)
                    side.values.setdefault(metric.name, []).append(value)
    for side in sides:
        side.values.setdefault(MEMORY.name, []).append(side.memory())


async def measure(sides: Sequence[Side], plan: Plan, prompts: Prompts) -> None:
    for side in sides:  # kernels chosen, pages touched, buffers grown
        await ask(side, dataclasses.replace(LOADS["burst"], new_tokens=4), [prompts.take(94)] * STREAMS)
        await ask(side, LOADS["long"], [prompts.take(512)])
    for number in range(plan.rounds):
        await run_round(sides if number % 2 == 0 else sides[::-1], prompts)
        latest = (f"{m.name} " + " / ".join(f"{s.values[m.name][-1]:.3g}" for s in sides) for m in METRICS)
        print(f"round {number + 1} of {plan.rounds}: " + "; ".join(latest))


def spread(values: Sequence[float]) -> str:
    """Median [min-max]."""
    middle = statistics.median(values)
    digits = 1 if middle >= 10 else 2 if middle >= 1 else 3
    return f"{middle:.{digits}f} [{min(values):.{digits}f}-{max(values):.{digits}f}]"


def ratios(metric: Metric, sides: Sequence[Side]) -> list[float]:
    """Ours to theirs, round by round; over 1 is better for us, whatever the metric."""
    if len(sides) < 2:
        return []
    pairs = zip(sides[0].values[metric.name], sides[1].values[metric.name], strict=True)
    return [ours / theirs if metric.higher_is_better else theirs / ours for ours, theirs in pairs]


def report(sides: Sequence[Side]) -> None:
    print(f"{'':34}" + "".join(f"{side.name:>26}" for side in sides) + f"{'times as good':>24}")
    for metric in [*METRICS, MEMORY]:
        cells = "".join(f"{spread(side.values[metric.name]):>26}" for side in sides)
        both = ratios(metric, sides)
        print(f"{metric.name + ', ' + metric.unit:34}{cells}{spread(both) if both else '-':>24}")
    for side in sides:
        if side.idle_cpu:
            print(f"{side.name} idle: at most {max(side.idle_cpu):.1%} of a core")


def compare(plan: Plan, quantization: str) -> dict[str, object]:
    """One quantisation, from starting the servers to the report; returns what goes into the JSON file."""
    limits = describe_machine()
    model = load_served_model(plan.source.directory, plan.source.name)
    prompts = Prompts(model, seed=time.time_ns())
    print(f"\n{plan.source.name}, {quantization} against {GGUF_TYPES[quantization]}; {limits}")
    print(f"shortest prompt: {prompts.shortest} tokens, of which the template takes {prompts.shortest - 1}")
    with contextlib.ExitStack() as stack:
        runs = {"ours": run_ours, "llama": run_llama}
        sides = [
            stack.enter_context(run(plan, quantization))
            for name, run in runs.items()
            if plan.only in (None, name)
        ]
        asyncio.run(measure(sides, plan, prompts))
        print(f"medians [min-max] of {plan.rounds} rounds, {plan.threads} threads each")
        report(sides)
    return {
        "model": plan.source.name,
        "quantization": quantization,
        "limits": limits,
        "shortest_prompt": prompts.shortest,
        "values": {side.name: side.values for side in sides},
        "ratios": {metric.name: ratios(metric, sides) for metric in [*METRICS, MEMORY]},
        "idle_cpu": {side.name: side.idle_cpu for side in sides},
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's server")
    parser.add_argument("--model", help="checkpoint directory; by default the default model")
    parser.add_argument("--quantization", action="append", choices=GGUF_TYPES, help="int8 and int4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False) or 2)
    parser.add_argument("--only", choices=("ours", "llama"), help="leave the other side out")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "toptwo-peers")
    parser.add_argument("--json", type=Path, help="file for every single value")
    arguments = parser.parse_args()
    if arguments.only != "ours" and not (arguments.llama_server and arguments.llama_server.is_file()):
        parser.error("--llama-server PATH is needed; --only ours does without it")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # also into a file, round by round
    console = Console()
    settings, _ = load_settings({"model": arguments.model} if arguments.model else {})
    arguments.work.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        source=find_model(settings, console),
        llama_server=arguments.llama_server,
        only=arguments.only,
        rounds=arguments.rounds,
        threads=arguments.threads,
        work=arguments.work,
        console=console,
    )
    if plan.only != "ours":
        subprocess.run([str(plan.llama_server), "--version"], check=True)
    results = [compare(plan, kind) for kind in arguments.quantization or ["int8", "int4"]]
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

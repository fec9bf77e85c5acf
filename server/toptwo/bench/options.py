"""What a person can choose about a measurement, each option declared once; the command line follows from it.

Must not know how anything is measured. No variable of the environment is read but the key's, by settings.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from toptwo.errors import StartupError

Number = TypeVar("Number")


@dataclass(frozen=True)
class Length:
    """A number of tokens, drawn uniformly from low to high, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Length:
        """`94` or `32:256`. Raises ValueError."""
        low, colon, high = text.partition(":")
        try:
            length = cls(int(low), int(high if colon else low))
        except ValueError:
            raise ValueError("give a number of tokens, or a range like 32:256") from None
        if not 1 <= length.low <= length.high <= 1 << 24:
            raise ValueError("lengths are at least 1, and a range goes upwards")
        return length

    def draw(self, rng: random.Random) -> int:
        """One length."""
        return rng.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}:{self.high}"


@dataclass(frozen=True)
class Limits:
    """What a good answer keeps to, in milliseconds; None is no limit.

    itl: for the mean time between the tokens of a request.
    """

    ttft: float | None = None
    itl: float | None = None

    @property
    def stated(self) -> bool:
        """Whether there is any."""
        return self.ttft is not None or self.itl is not None


def _split(value: object) -> object:
    """Values given several times, or several by commas, or both."""
    if isinstance(value, list | tuple):
        return [part for text in value for part in (text.split(",") if isinstance(text, str) else [text])]
    return value


def _parse_length(value: object) -> object:
    return Length.parse(value) if isinstance(value, str) else value


Lengths = Annotated[Length, BeforeValidator(_parse_length)]
Several = Annotated[tuple[Number, ...], BeforeValidator(_split)]


class BenchOptions(BaseModel):
    """The options of `toptwo bench`. Field descriptions are the `--help` texts."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    url: str | None = Field(
        None,
        description="Base URL of the server, as OpenAI clients take it; without it, the embedded server is "
        "started for the measurement, with the options of `toptwo serve` that follow a --.",
    )
    model: str | None = Field(
        None, min_length=1, description="Model to ask for; by default the first that is listed."
    )
    api_key: str | None = Field(
        None, min_length=1, description="Key for the server; else TOPTWO_API_KEY or OPENAI_API_KEY."
    )
    concurrency: Several[Annotated[int, Field(ge=1, le=100_000)]] = Field(
        (), description="Closed loop: requests at once. Repeatable, or a list: 1,4,16. (default: 1)"
    )
    rate: Several[Annotated[float, Field(gt=0, le=1e6)]] = Field(
        (), description="Open loop instead: requests per second, at random moments. Repeatable, or a list."
    )
    requests: int | None = Field(
        None, ge=1, description="Requests per level (default: 4 per stream, or 30 s of them; at least 16)."
    )
    duration: float | None = Field(None, gt=0, description="Seconds per level in which requests begin.")
    prompt_tokens: Lengths = Field(
        Length(128, 128),
        description="Prompt length with chat template: N, or LOW:HIGH to draw it.",
    )
    max_tokens: Lengths = Field(Length(64, 64), description="Tokens to generate: N, or LOW:HIGH to draw it.")
    shared_prefix: int = Field(
        0, ge=0, le=1 << 24, description="Tokens that all prompts begin with, which a prefix cache may know."
    )
    temperature: float = Field(0, ge=0, le=2, description="Sampling temperature.")
    ignore_eos: bool = Field(True, description="Generate up to the length whatever the model says.")
    seed: int = Field(0, description="Seed of lengths, words and arrivals.")
    warmup: int = Field(
        1, ge=0, le=100_000, description="Requests before the first level, all at once and not counted."
    )
    timeout: float = Field(600, gt=0, description="Seconds after which a request has failed.")
    goodput_ttft: float | None = Field(
        None, gt=0, description="A good request has its first text within so many ms."
    )
    goodput_itl: float | None = Field(
        None, gt=0, description="A good request takes at most so many ms per further token."
    )
    json_file: Path | None = Field(None, alias="json", description="Write all figures to this file.")
    plot_file: Path | None = Field(None, alias="plot", description="Draw the curves into this PNG file.")

    @model_validator(mode="after")
    def _check_together(self) -> BenchOptions:
        if self.concurrency and self.rate:
            raise ValueError("--rate cannot be combined with --concurrency: a loop is open or closed")
        if self.requests and self.requests < max(self.concurrency, default=1):
            raise ValueError(
                f"--requests {self.requests}: that many are never {max(self.concurrency)} at once; "
                "see --concurrency"
            )
        return self

    @property
    def limits(self) -> Limits:
        """What goodput counts."""
        return Limits(self.goodput_ttft, self.goodput_itl)

    def shown(self) -> dict[str, object]:
        """All options by the names of their flags, as a report may tell them; the key it may not."""
        fields = self.model_dump(mode="json", by_alias=True, exclude={"api_key"})
        return fields | {"prompt_tokens": str(self.prompt_tokens), "max_tokens": str(self.max_tokens)}


def load_options(flags: dict[str, object]) -> BenchOptions:
    """Options from those given on the command line. Raises StartupError with one line that names the flag."""
    try:
        return BenchOptions.model_validate(flags)
    except ValidationError as error:
        raise StartupError("; ".join(_explain(dict(e)) for e in error.errors())) from None


def _explain(error: dict[str, Any]) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    if not error["loc"]:
        return message
    field = str(error["loc"][0])
    shown = "" if field == "api_key" else f" (got {error['input']!r})"
    return f"{'URL' if field == 'url' else '--' + field.replace('_', '-')}: {message}{shown}"

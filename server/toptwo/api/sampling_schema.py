"""What every request that generates may say about the choice of tokens and the form of the answer.

Every number has both bounds. Knows the shape of requests; must not know the model or the engine.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Discriminator, Field, StringConstraints, Tag, model_validator

from toptwo.api.strict import StrictModel, contradiction, shape_of_list

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1
MOST_CHOICES = 64

StopText = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Stop = Annotated[
    Annotated[StopText, Tag("one")]
    | Annotated[list[StopText], Field(max_length=4, fail_fast=True), Tag("many")],
    Discriminator(shape_of_list),
]
TokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]
StopTokenIds = Annotated[list[TokenId], Field(max_length=128, fail_fast=True)]
Bias = Annotated[float, Field(ge=-100, le=100)]
LogitBias = Annotated[
    dict[Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")], Bias], Field(max_length=1024)
]
GrammarText = Annotated[str, StringConstraints(min_length=1, max_length=64 * 1024)]


class StreamOptions(StrictModel):
    """include_usage: end the stream with a chunk that carries the token counts."""

    include_usage: bool | None = None
    # Padding against eavesdropping on chunk sizes; it changes nothing that a client reads.
    include_obfuscation: bool | None = None


class SamplingFields(StrictModel):
    """What every request that generates may say about how tokens are chosen."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1_000_000, description="0 and -1 keep all tokens.")
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=2)
    logit_bias: LogitBias | None = Field(None, description="Token id -> what is added to its logit.")
    min_tokens: int | None = Field(None, ge=0, le=INT32_MAX)
    stop: Stop | None = None
    stop_token_ids: StopTokenIds | None = None
    ignore_eos: bool | None = Field(None, description="Generate on past the token that ends an answer.")
    seed: int | None = Field(None, ge=-INT64_MAX - 1, le=INT64_MAX)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    guided_regex: GrammarText | None = Field(None, description="The answer must match this expression.")
    guided_grammar: GrammarText | None = Field(None, description="The answer must match this Lark grammar.")

    @model_validator(mode="after")
    def _check_stream_options(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise contradiction("stream_options", "It is only allowed when stream is true.")
        return self

    def ignored_inside(self) -> list[str]:
        """See StrictModel."""
        given = self.stream_options is not None and self.stream_options.include_obfuscation is not None
        return ["stream_options.include_obfuscation"] if given else []

    @property
    def num_choices(self) -> int:
        """How many answers are wanted."""
        return self.n or 1

    @property
    def num_sequences(self) -> int:
        """See StrictModel."""
        return self.num_choices

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, however many were given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

"""What a text completion request may say.

Knows the shape of the request; must not know HTTP, the model or the engine.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Discriminator, Field, Tag, model_validator

from toptwo.api.output_grammar import check_one_grammar
from toptwo.api.parameters import ParameterTable, any_of, anything
from toptwo.api.sampling_schema import INT32_MAX, MOST_CHOICES, SamplingFields, TokenId
from toptwo.api.strict import contradiction
from toptwo.api.tool_schema import ResponseFormat

DEFAULT_MAX_TOKENS = 16  # OpenAI's
MOST_PROMPT_TOKENS = 1 << 20  # the longest context of any model; checking a list keeps all threads waiting

COMPLETION_REQUEST = ParameterTable(
    harmless={"metadata": anything, "user": anything}, neutral={"suffix": any_of("")}
)


def shape_of_prompt(value: object) -> str:
    """The tag of the prompt's branch, so that errors speak of one branch only."""
    if not isinstance(value, list):
        return "text"
    if value and isinstance(value[0], list):
        return "id lists"
    return "ids" if value and isinstance(value[0], int | float) else "texts"


Ids = Annotated[list[TokenId], Field(min_length=1, max_length=MOST_PROMPT_TOKENS, fail_fast=True)]
Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], Field(min_length=1, max_length=MOST_CHOICES, fail_fast=True), Tag("texts")]
    | Annotated[Ids, Tag("ids")]
    | Annotated[list[Ids], Field(min_length=1, max_length=MOST_CHOICES, fail_fast=True), Tag("id lists")],
    Discriminator(shape_of_prompt),
]


class CompletionRequest(SamplingFields):
    """The body of POST /completions, as far as it is served."""

    table: ClassVar[ParameterTable] = COMPLETION_REQUEST

    prompt: Prompt = Field(description="One text or many, or their token ids.")
    max_tokens: int | None = Field(None, ge=0, le=INT32_MAX, description="16 by default; 0 needs echo.")
    best_of: int | None = Field(None, ge=1, le=MOST_CHOICES)
    echo: bool | None = Field(None, description="Whether the prompt is part of the answer.")
    logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _check_together(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise contradiction("max_tokens", "0 is only allowed when echo is true.")
        if self.best_of is not None and self.best_of < self.num_choices:
            raise contradiction("best_of", "It must not be less than n.")
        if self.num_candidates > self.num_choices and self.stream:
            raise contradiction("best_of", "A stream cannot choose among finished answers.")
        if len(self.prompts) * self.num_candidates > MOST_CHOICES:
            message = f"Prompts times answers to each must not be more than {MOST_CHOICES}."
            raise contradiction("prompt", message)
        check_one_grammar(self, self.response_format)
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or its token ids, however many were given."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return [*self.prompt]

    @property
    def num_candidates(self) -> int:
        """How many answers to a prompt are generated."""
        return self.best_of or self.num_choices

    @property
    def num_sequences(self) -> int:
        """See StrictModel."""
        return len(self.prompts) * self.num_candidates

    @property
    def most_tokens(self) -> int:
        """The caller's bound on generated tokens."""
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

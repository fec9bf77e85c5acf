"""What the API knows of the model it serves: its name and its words, none of its weights.

Knows tokenizer, template and guard; must not know HTTP or the engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from toptwo.errors import ApiError, CheckpointError
from toptwo.text.guard import ControlTokenGuard, new_marker
from toptwo.text.harmony import CHANNEL, END, MESSAGE, Harmony, detect_harmony
from toptwo.text.parsers import ReasoningFormat, detect_reasoning
from toptwo.text.template import ChatTemplate, Message
from toptwo.text.tokenizer import Tokenizer
from toptwo.text.tools import MARKER_TOKENS, Tool, ToolFormat, detect_tool_format, with_parsed_arguments

_REASONING_TOKENS = ("<think>", "</think>")
_NO_TEMPLATE = (
    "The model has no chat template; use /v3/openai/completions, "
    "or start the server with --chat-template FILE."
)


@dataclass(frozen=True)
class Prompt:
    """A chat as the model gets it. in_reasoning: it ends inside a thought that the model goes on with."""

    ids: list[int]
    in_reasoning: bool


@dataclass(frozen=True)
class ServedModel:
    """A model as its callers see it.

    name: the id that requests name; it may contain "/".
    created: seconds since 1970, shown by the models endpoint.
    template: None for a model that was not made for chats.
    """

    name: str
    created: int
    tokenizer: Tokenizer
    template: ChatTemplate | None

    @cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer, sorted."""
        ids = self.tokenizer.stop_token_ids
        return ids if self.harmony is None else self.harmony.stop_token_ids(ids)

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The token ids of `prompt_of`."""
        return self.prompt_of(messages, tools, variables).ids

    def prompt_of(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        variables: Mapping[str, Any] | None = None,
        most_tokens: int | None = None,
    ) -> Prompt:
        """The prompt that asks for the next answer. Slow for long chats: call it in a thread.

        variables: the caller's, for the template. Texts of control tokens in all three stay plain text.
        Raises ApiError when the template refuses them, or there is none; for most_tokens, see
        `Tokenizer.encode`.
        """
        if self.template is None:
            raise ApiError(_NO_TEMPLATE, param="model", code="no_chat_template")
        marker = new_marker()
        try:
            # Parsed first: JSON text can hide a control token behind escapes.
            protected = [self._protect_message(with_parsed_arguments(m), marker) for m in messages]
            described = self._guard.protect([tool.as_openai() for tool in tools], marker)
            given = self._guard.protect(variables or {}, marker)
            text = self.template.render(protected, tools=described, variables=given)
        except RecursionError:
            message = "The messages or tools are nested too deeply."
            raise ApiError(message, param="messages", code="invalid_value") from None
        in_reasoning = self.reasoning is not None and text.rstrip().endswith(self.reasoning.open)
        return Prompt(self.tokenizer.encode(text.split(marker), most_tokens), in_reasoning)

    @cached_property
    def harmony(self) -> Harmony | None:
        """How the model writes thoughts, calls and texts, where that is Harmony; else None."""
        return detect_harmony(self._source, self.tokenizer.id_of)

    @cached_property
    def tool_format(self) -> ToolFormat:
        """How the model spells its calls, where it is not in Harmony."""
        # A template without tools gets them described in the fallback's format, whatever else it contains.
        knows_tools = self.template is not None and self.template.mentions_tools
        return detect_tool_format(self._source if knows_tools else "", self._ids_of(MARKER_TOKENS))

    @cached_property
    def reasoning(self) -> ReasoningFormat | None:
        """How the model writes its thoughts; None where it has none."""
        if self.harmony is not None:
            return ReasoningFormat(f"{CHANNEL}analysis{MESSAGE}", END)
        return detect_reasoning(self._source, self._ids_of(_REASONING_TOKENS))

    def looks_up(self, variable: str) -> bool:
        """Whether the chat template may do something with the variable."""
        return self.template is not None and variable in self.template.variables

    def call_grammar(self, tools: Sequence[Tool], *, parallel: bool) -> str:
        """A serialised grammar: a call of one of the tools, or more where they are wanted and possible.

        Raises GrammarError when there are no tools or a tool's parameters are no schema of an object.
        """
        if self.harmony is not None:
            return self.harmony.call_grammar(tools)
        return self.tool_format.grammar(tools, parallel=parallel)

    def answer_grammar(self, grammar: str) -> str:
        """A serialised grammar of all that is generated, for an answer that the serialised one allows."""
        return grammar if self.harmony is None else self.harmony.answer_grammar(grammar)

    @property
    def _source(self) -> str:
        return "" if self.template is None else self.template.source

    def _ids_of(self, texts: Sequence[str]) -> dict[str, int]:
        ids = {text: self.tokenizer.id_of(text) for text in texts}
        return {text: token_id for text, token_id in ids.items() if token_id is not None}

    def _protect_message(self, message: Message, marker: str) -> dict[str, Any]:
        return {k: v if k == "role" else self._guard.protect(v, marker) for k, v in message.items()}

    @cached_property
    def _guard(self) -> ControlTokenGuard:
        return ControlTokenGuard(self.tokenizer.control_texts)


def load_served_model(directory: Path, name: str, chat_template: Path | None = None) -> ServedModel:
    """Read the text side of a checkpoint directory; `created` is the age of its tokenizer.

    chat_template: a file that replaces the checkpoint's own template.
    Raises CheckpointError, or StartupError for chat_template, with one line that names the file.
    """
    tokenizer = Tokenizer.load(directory)
    template = ChatTemplate.load(directory, tokenizer.named_tokens, chat_template)
    try:
        created = int((directory / "tokenizer.json").stat().st_mtime)
    except OSError as error:
        raise CheckpointError(f"{directory / 'tokenizer.json'}: cannot be read ({error})") from None
    return ServedModel(name, created, tokenizer, template)

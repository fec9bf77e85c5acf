"""Chat messages to one prompt text, by the Jinja template that came with the model.

Templates are code from a stranger, so they run in Jinja's immutable sandbox, and their output and time
are bounded (see `bounded_jinja`); requests can never supply one. The environment matches the one Hugging
Face documents for chat templates, so that a model sees here what it saw in training.

Knows templates and messages; must not know token ids or HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.utils import Namespace

from toptwo.errors import ApiError, CheckpointError, StartupError
from toptwo.text import tools as tools_of
from toptwo.text.bounded_jinja import BoundedEnvironment, RenderWatch, TooMuchWorkError
from toptwo.text.checkpoint import read_json_if_present, read_text
from toptwo.text.harmony import harmony_messages, harmony_tools, speaks_harmony

# "role" and "content" (text or None), and where the caller gave them "name", "tool_calls" (OpenAI's, the
# arguments as an object or as its JSON text), "tool_call_id", "reasoning_content".
Message = Mapping[str, Any]

MAX_PROMPT_CHARS = 16 * 1024 * 1024
MAX_RENDER_SECONDS = 10.0
_TOO_MUCH = "The model's chat template makes too long a prompt of these messages, or takes too long for it."
_MOST_EXPLAINED = 300  # characters of a template's own error message that a caller sees


class ChatTemplate:
    """A compiled chat template. Thread-safe.

    named_tokens: what the template sees as `bos_token`, `eos_token` and so on.
    source: the template's text. variables: all names that it may look up.
    Raises CheckpointError when the source is not a valid template.
    """

    def __init__(
        self, source: str, named_tokens: Mapping[str, str], *, origin: str = "chat template"
    ) -> None:
        environment = _environment()
        self.source = source
        try:
            self._template = environment.from_string(source)
            self.variables = frozenset(jinja2.meta.find_undeclared_variables(environment.parse(source)))
        except (jinja2.TemplateError, RecursionError) as error:
            raise CheckpointError(f"{origin}: is not a valid chat template ({error})") from None
        self._named_tokens = dict(named_tokens)

    @classmethod
    def load(
        cls, directory: Path, named_tokens: Mapping[str, str], override: Path | None = None
    ) -> ChatTemplate | None:
        """Read the override, or chat_template.jinja, or chat_template of chat_template.json or
        tokenizer_config.json. None where there is none of these: no other format will do, as a chat with
        a model that was trained on another one, or on none, looks like a broken server.

        Raises CheckpointError that names the file when it cannot be read or is no template; StartupError for
        the override, which is no part of the checkpoint.
        """
        if override is not None:
            try:
                return cls(read_text(override), named_tokens, origin=str(override))
            except CheckpointError as error:
                raise StartupError(str(error)) from None
        path = directory / "chat_template.jinja"
        if path.exists():
            return cls(read_text(path), named_tokens, origin=str(path))
        for file in ("chat_template.json", "tokenizer_config.json"):
            path = directory / file
            value = read_json_if_present(path).get("chat_template")
            if value is not None:
                return cls(_default_of(value, path), named_tokens, origin=str(path))
        return None

    @property
    def mentions_tools(self) -> bool:
        """Whether it does something with tools itself."""
        return "tools" in self.variables

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt, up to the point where the assistant's answer begins.

        tools: OpenAI's form; a template that knows nothing of tools gets them as text.
        variables: more names that the template may look up, such as enable_thinking.
        Raises ApiError (400, param messages) when the template refuses the messages or fails on them.
        """
        has_calls = tools_of.contains_calls(messages)
        if not self.mentions_tools and (tools or has_calls):
            prepared = tools_of.messages_without_tools(messages, tools or (), takes_system=self._takes_system)
            return self._render(prepared, None, variables or {})
        if has_calls and "tool_calls" not in self.source:
            messages = tools_of.messages_with_written_calls(messages, self.source)
        prepared = tools_of.messages_for_tools(
            messages,
            arguments_as_text=has_calls and self._wants_arguments_as_text,
            short_ids="[TOOL_CALLS]" in self.source,
        )
        described: Sequence[Mapping[str, Any]] = tools or ()
        if speaks_harmony(self.source):
            prepared, described = harmony_messages(prepared), harmony_tools(described)
        return self._render(prepared, list(described) or None, variables or {})

    @cached_property
    def _takes_system(self) -> bool:
        return self._accepts([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}])

    @cached_property
    def _wants_arguments_as_text(self) -> bool:
        """Most templates write the object as JSON; some join it to a text and fail on an object."""
        return not self._accepts(_chat_with_call({})) and self._accepts(_chat_with_call("{}"))

    def _accepts(self, messages: list[dict[str, Any]]) -> bool:
        try:
            self._render(messages, None, {})
        except ApiError:
            return False
        return True

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> str:
        ours = {
            "messages": messages,
            "add_generation_prompt": True,
            "tools": tools,
            "documents": None,
            **self._named_tokens,
        }
        if taken := sorted(ours.keys() & variables.keys()):
            message = f"Invalid value for 'chat_template_kwargs': {taken[0]} is set by the server."
            raise ApiError(message, param="chat_template_kwargs", code="invalid_value")
        watch = RenderWatch(MAX_RENDER_SECONDS, MAX_PROMPT_CHARS)
        parts: list[str] = []
        num_chars = 0
        try:
            for part in self._template.generate({**variables, **ours, **watch.variables}):
                parts.append(part)
                num_chars += len(part)
                watch.check(num_chars)
        except _RaisedByTemplateError as error:
            raise _refusal(str(error)[:_MOST_EXPLAINED]) from None
        except TooMuchWorkError:
            raise _refusal(_TOO_MUCH) from None
        except Exception:  # any error of the template's code; its text is not for the caller
            raise _refusal("The model's chat template cannot render these messages.") from None
        return "".join(parts)


class _RaisedByTemplateError(jinja2.TemplateError):
    """The template itself refused the messages by calling raise_exception."""


class _GenerationBlocks(Extension):
    """Accepts {% generation %} blocks, which mark the trainable text; when serving they are plain text."""

    tags = {"generation"}  # noqa: RUF012 - declared so by Jinja

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _PlainNamespace(Namespace):
    """Jinja's namespace() lets a template set names like __call__, which Python gives a meaning."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)


def _chat_with_call(arguments: object) -> list[dict[str, Any]]:
    call = {"id": "a" * 9, "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "t", "name": "f", "tool_call_id": "a" * 9},
    ]


def _refusal(message: str) -> ApiError:
    return ApiError(message, param="messages", code="invalid_value")


def _environment() -> BoundedEnvironment:
    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    del environment.globals["lipsum"]
    functions: dict[str, Callable[..., object]] = {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "namespace": _PlainNamespace,
    }
    environment.globals.update(functions)
    return environment


def _raise_exception(message: object) -> None:
    raise _RaisedByTemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # local time, as the models' authors render it


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which no model was trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _default_of(value: object, path: Path) -> str:
    """The template out of a string, or out of a list of {"name", "template"} that has a "default"."""
    if isinstance(value, list):
        named = {e.get("name"): e.get("template") for e in value if isinstance(e, dict)}
        value = named.get("default")
    if not isinstance(value, str):
        raise CheckpointError(f'{path}: chat_template must be a text, or a list with one named "default"')
    return value

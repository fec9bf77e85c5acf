"""Chat templates: rendered as transformers renders them, and kept in their sandbox."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from fakes import CHATML, byte_level_vocabulary
from toptwo.errors import ApiError, StartupError
from toptwo.text import template as template_module
from toptwo.text.template import ChatTemplate

SYSTEM = {"role": "system", "content": "Be brief. <b>&'\" é"}
USER = {"role": "user", "content": "  What is\n 1 < 2?  "}
ASSISTANT = {"role": "assistant", "content": "True."}

MIXTRAL_LIKE = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate, starting with the user') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- " [INST] " + system_message + "\n\n" + message["content"] + " [/INST]" }}
        {%- else %}
            {{- " [INST] " + message["content"] + " [/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] + eos_token }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported") }}
    {%- endif %}
{%- endfor %}
"""
SMOL_LIKE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a small assistant<|im_end|>\n' }}"
    "{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
RICH = """{%- set ns = namespace(count=0) %}
{%- if tools %}no tools here{% endif %}
{%- if documents is not none %}no documents either{% endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
    {% generation %}{{ message.content | trim }}{% endgeneration %}
    {{ message | tojson(indent=2) }}
    {{ {"b": "é<&>", "a": 1} | tojson(sort_keys=true) }}
    {%- if ns.count > 5 %}{% break %}{% endif %}
{%- endfor %}
{{ dict(a=ns.count)['a'] }} {{ strftime_now("%Y") }} {{ unk_token }}|{{ name_that_is_not_there }}|"""

CHATS = [
    [USER],
    [SYSTEM, USER],
    [USER, ASSISTANT, USER],
    [SYSTEM, USER, ASSISTANT, USER],
]


@pytest.mark.parametrize(
    "source", [CHATML, MIXTRAL_LIKE, SMOL_LIKE, RICH], ids=["chatml", "mixtral", "smol", "rich"]
)
@pytest.mark.parametrize("messages", CHATS)
def test_same_prompt_as_transformers(source: str, messages: list[dict[str, str]]) -> None:
    transformers = pytest.importorskip("transformers")
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    reference = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level_vocabulary(), **named)
    expected = reference.apply_chat_template(
        messages, chat_template=source, tokenize=False, add_generation_prompt=True
    )
    assert ChatTemplate(source, named).render(messages) == expected


def test_a_refusing_template_is_the_callers_error() -> None:
    template = ChatTemplate(MIXTRAL_LIKE, {})
    with pytest.raises(ApiError, match="Roles must alternate") as caught:
        template.render([USER, USER])
    assert (caught.value.status, caught.value.param) == (400, "messages")


# Each tries to leave the sandbox, to change what it was given, or to use a file of the host.
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__()[0] }}",
    "{{ cycler.__init__.__globals__.os.popen('touch CANARY').read() }}",
    "{{ joiner.__init__.__globals__ }}{{ raise_exception.__globals__['json'] }}",
    "{{ namespace.__init__.__globals__['__builtins__']['open']('CANARY', 'w') }}",
    "{{ strftime_now.__globals__.time.sleep(0) }}",
    "{{ self.__init__.__globals__.__builtins__.open('CANARY', 'w') }}",
    "{{ self._TemplateReference__context.eval('1') }}",
    "{{ ('{0.__class__.__base__.__subclasses__}').format(messages)() }}",
    "{{ ''|attr('__class__')|attr('__mro__')|last|attr('__subclasses__')() }}",
    "{{ ['{0.__class__.__init__.__globals__}'|attr('format')][0](self)() }}",
    "{{ messages.append(1) }}",
    "{% set _ = messages[0].update({'content': 'x'}) %}",
    "{% set _ = messages.clear() %}",
    "{{ lipsum.__globals__.os }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends '/etc/passwd' %}",
    "{% for i in range(999999999) %}{% endfor %}",
    "{{ open('CANARY', 'w') }}",
    "{{ 1 / 0 }}",
    "{{ messages[0].content + 1 }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_the_sandbox_holds(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    template = ChatTemplate(source, {})
    with pytest.raises(ApiError, match="cannot render these messages"):
        template.render([USER])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "source",
    ["{% set ns = namespace(a=1) %}{% set ns.__call__ = 5 %}", "{% set ns = namespace({'__call__': 5}) %}"],
)
def test_a_namespace_holds_no_underscored_names(source: str) -> None:
    template = ChatTemplate(source, {})
    with pytest.raises(ApiError):
        template.render([USER])


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(90000) %}{% for j in range(90000) %}{{ 'x' * 1000 }}{% endfor %}{% endfor %}",
        "{% for i in range(90000) %}{{ messages[0].content * 100000 }}{% endfor %}",
    ],
)
def test_output_is_bounded(source: str) -> None:
    with pytest.raises(ApiError, match="too long a prompt"):
        ChatTemplate(source, {}).render([USER])


def test_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_module, "MAX_RENDER_SECONDS", 0.05)
    source = "{% for i in range(90000) %}{% for j in range(90000) %}{{ 'x' }}{% endfor %}{% endfor %}"
    with pytest.raises(ApiError, match="too long a prompt"):
        ChatTemplate(source, {}).render([USER])


# Each goes on for ever, or grows without end, and writes nothing meanwhile.
ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "a filtered loop": "{% for a in range(99999) if range(99999)|sum < 0 %}{% endfor %}",
    "a block": "{% block b %}{% for a in range(99999) if range(99999)|sum < 0 %}{% endfor %}{% endblock %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "a hidden clock": "{% set render_watch = 1 %}{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% endfor %}{% endfor %}",
    "a text": "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(99) %}"
    "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "a joined text": "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(99) %}"
    "{% set ns.s = [ns.s, ns.s] | join %}{% endfor %}",
    "a list": "{% set ns = namespace(s=[1]) %}{% for i in range(99) %}"
    "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "an argument": "{% macro f(s) %}{{ f(s ~ s ~ s ~ s) }}{% endmacro %}{{ f('xxxxxxxx') }}",
    "a repeated text": "{{ ('x' * 10000000000) | length }}",
    "a repeated list": "{{ (10000000000 * [1]) | length }}",
    "a power": "{% if 9 ** 999999999 > 1 %}{% endif %}",
    "a number": "{% set ns = namespace(n=9) %}{% for i in range(99) %}"
    "{% set ns.n = ns.n * ns.n %}{% endfor %}",
}


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_what_never_ends_and_writes_nothing_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_module, "MAX_RENDER_SECONDS", 0.2)
    template = ChatTemplate(source, {})
    began = time.monotonic()
    with pytest.raises(ApiError, match="takes too long for it") as caught:
        template.render([USER])
    assert time.monotonic() - began < 5
    assert (caught.value.status, caught.value.param) == (400, "messages")


def test_loops_know_where_they_are() -> None:
    source = (
        "{% for c in 'abc' if c != 'b' %}{{ loop.index }}/{{ loop.length }}{{ c }}{{ loop.revindex0 }}"
        "{% if loop.first %}<{{ loop.nextitem }}>{% endif %}{% if loop.last %}.{% endif %}{% endfor %}"
        "{% for k, v in {'x': 1}.items() %}{{ k }}{{ v }}{% else %}none{% endfor %}"
        "{% for x in nothing %}{% else %} none{% endfor %}"
        "{% for x in [[1, [2]]] recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}{% endif %}"
        "{% endfor %}{{ 2 ** 10 }}{{ '-' * 3 }}"
    )
    assert ChatTemplate(source, {}).render([USER]) == "1/2a1<c>2/2c0.x1 none(1(2))1024---"


def test_sources_in_their_order(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path, {}) is None
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}
        )
    )
    assert loaded(tmp_path) == "d"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "j"}))
    assert loaded(tmp_path) == "j"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}f")
    assert loaded(tmp_path) == "<s>f"
    (tmp_path / "mine.txt").write_text("{{ bos_token }}m")
    assert loaded(tmp_path, tmp_path / "mine.txt") == "<s>m"


def loaded(directory: Path, override: Path | None = None) -> str:
    """What the template that is found makes of a message."""
    template = ChatTemplate.load(directory, {"bos_token": "<s>"}, override)
    assert template
    return template.render([USER])


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "no such file"), (b"\xff", "cannot be read"), (b"{% if %}", "is not a valid chat template")],
)
def test_a_bad_override_is_named_at_start(tmp_path: Path, content: bytes | None, reason: str) -> None:
    (tmp_path / "chat_template.jinja").write_text("the model's own")
    path = tmp_path / "mine.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StartupError, match=rf"mine\.jinja: {reason}") as caught:
        ChatTemplate.load(tmp_path, {}, path)
    assert "\n" not in str(caught.value)


def test_what_a_template_looks_up() -> None:
    template = ChatTemplate("{% if enable_thinking is defined %}{{ messages }}{% endif %}{# effort #}", {})
    assert template.variables == {"enable_thinking", "messages"}


@pytest.mark.parametrize("value", [5, [], [{"name": "other", "template": "t"}], "{% if %}", "{{"])
def test_a_bad_template_is_named_at_start(tmp_path: Path, value: object) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(StartupError, match=r"tokenizer_config\.json: .*chat.template"):
        ChatTemplate.load(tmp_path, {})


def test_only_the_sandbox_is_used() -> None:
    source = Path(template_module.__file__).parent.parent
    for path in source.rglob("*.py"):
        assert not re.search(r"jinja2\.(Environment|Template)\(|NativeEnvironment", path.read_text()), path

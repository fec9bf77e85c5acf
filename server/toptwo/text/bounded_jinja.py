"""Jinja's immutable sandbox, in which a template can neither run for ever nor grow without end.

Jinja's own bounds what code can reach, not what it costs. Here a clock is looked at in every turn of a loop
and in every call, which leaves a template nothing to repeat that would not end; and what is kept in a
variable, repeated by `*` or raised to a power has a largest size. What is written once in a template and done
once is as costly as its author likes.

Knows Jinja; must not know chats.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Names that no template can write: neither look up nor set.
_WATCH = "render watch"
_ITERATED, _KEPT = "iterated, watched", "kept, watched"
_MOST_BITS = 1 << 16  # of an integer


class TooMuchWorkError(Exception):
    """The template has run for too long, or holds or writes too much."""


class RenderWatch:
    """The bounds of one rendering: seconds from now on, and the largest size of a text or list."""

    def __init__(self, seconds: float, most: int) -> None:
        self._deadline = time.monotonic() + seconds
        self._most = most

    @property
    def variables(self) -> dict[str, object]:
        """What the template is to be rendered with, beside its own variables."""
        return {_WATCH: self}

    def check(self, size: int = 0) -> None:
        """Raises TooMuchWorkError when the time is over, or the size too large."""
        if size > self._most or time.monotonic() > self._deadline:
            raise TooMuchWorkError


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Templates of this environment are rendered with `RenderWatch.variables`."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.filters |= {_ITERATED: _iterated, _KEPT: _kept}

    def _parse(self, source: str, name: str | None, filename: str | None) -> Any:
        template = super()._parse(source, name, filename)
        for loop in template.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, _ITERATED, [], [], None, None, lineno=loop.lineno)
        for assignment in template.find_all(nodes.Assign):
            kept = assignment.node
            assignment.node = nodes.Filter(kept, _KEPT, [], [], None, None, lineno=assignment.lineno)
        return template

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """A call of a macro, a method or a function; named as in Jinja, since names are the template's."""
        watch = _watch_of(__context)
        for argument in (*args, *kwargs.values()):
            watch.check(_size(argument))
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """One of the intercepted operators."""
        watch = _watch_of(context)
        if operator == "**" and _bits(left) * abs(right) > _MOST_BITS:
            raise TooMuchWorkError
        if operator == "*":
            watch.check(_size(left) * _factor(right))
            watch.check(_size(right) * _factor(left))
            if _bits(left) + _bits(right) > _MOST_BITS:
                raise TooMuchWorkError
        return super().call_binop(context, operator, left, right)


def _watch_of(context: Context) -> RenderWatch:
    # Not by a look-up: what a template sets comes first there.
    watch: RenderWatch = context.parent[_WATCH]
    return watch


@jinja2.pass_context
def _iterated(context: Context, values: Iterable[Any]) -> Iterable[Any]:
    """The values of a loop, each of them after a look at the clock."""
    if isinstance(values, Undefined):
        return values  # an error, or nothing, as its kind has it
    watch = _watch_of(context)

    def watched() -> Iterator[Any]:
        for value in values:
            watch.check()
            yield value

    return watched()


@jinja2.pass_context
def _kept(context: Context, value: Any) -> Any:
    """The value of a variable."""
    _watch_of(context).check(_size(value))
    return value


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict) else 0


def _factor(value: Any) -> int:
    return max(value, 0) if isinstance(value, int) else 0


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0

"""Logs: one line per event on standard error, readable on a terminal and JSON elsewhere.

Never hand prompts, outputs or keys to a log call. Text from a request cannot forge a line, nor speak to the
terminal: in JSON every value is escaped, and so are control characters on a terminal. What an exception says
may quote what it failed on; a process that has prompts and keys in hand logs its kind and where it happened.
"""

from __future__ import annotations

import logging
import sys
import traceback
from types import TracebackType

import structlog

_Raised = tuple[type[BaseException], BaseException, TracebackType | None]


def configure_logging(level: str, *, quoting: bool) -> None:
    """Send structlog's events, and those of libraries that use `logging`, to standard error.

    quoting: whether exceptions may be logged with their messages; at level "debug" they always are.
    """
    write_exceptions = structlog.processors.ExceptionRenderer()
    if not quoting and level != "debug":
        write_exceptions = structlog.processors.ExceptionRenderer(_without_messages)
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        write_exceptions,
    ]
    renderer: structlog.typing.Processor = structlog.processors.JSONRenderer()
    if sys.stderr.isatty():
        shared.append(_escape_control_characters)
        # Plain: the default shows local variables, and with them prompts and keys.
        renderer = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
            foreign_pre_chain=shared,
        )
    )
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )


def _without_messages(exc_info: _Raised) -> str:
    """A traceback down to what was raised, of which only the kind is told; causes first."""
    kind, error, at = exc_info
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    lines = (
        [] if before is None else [_without_messages((type(before), before, before.__traceback__)), "then"]
    )
    if isinstance(error, BaseExceptionGroup):
        lines += [_without_messages((type(one), one, one.__traceback__)) for one in error.exceptions]
    lines.append("".join(traceback.format_tb(at)) + f"{kind.__module__}.{kind.__qualname__}")
    return "\n".join(lines)


def _escape_control_characters(
    _logger: object, _name: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """All but those of tracebacks, whose lines are ours."""
    for name, value in event.items():
        if isinstance(value, str) and name != "exception" and not value.isprintable():
            event[name] = repr(value)[1:-1]
    return event

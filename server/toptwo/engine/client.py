"""The API process's side of waist 1: send a GenerateRequest, iterate its TokenEvents.

Knows messages and sockets; must not know HTTP, text, torch or the scheduler.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from toptwo.messages import EngineInfo, GenerateRequest, TokenEvent


class Engine(Protocol):
    """What the API needs of an engine; `EngineClient` is the real one, tests have a fake."""

    @property
    def info(self) -> EngineInfo | None:
        """The engine's resolved configuration; None while it loads or after it died."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        """Events of one request, ending with exactly one terminal event.

        Closing the generator early aborts the request. An engine that dies in between yields a
        terminal event with finish_reason "error".

        Raises EngineDeadError at the first iteration when no engine is ready.
        """

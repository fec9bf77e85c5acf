"""Errors that reach a person. This module knows OpenAI's error vocabulary and no HTTP framework.

`ApiError` is a mistake or a limit that a client is told about in OpenAI's envelope;
`StartupError` is one line on standard error and a non-zero exit; `CheckpointError` is one that the model's
files are to blame for.
"""

from __future__ import annotations

from typing import ClassVar


class StartupError(Exception):
    """The server cannot start; the message is one clear line that names the setting or file."""

    exit_code: ClassVar[int] = 1


class CheckpointError(StartupError):
    """A model's files are damaged, incomplete or not supported: trying again will not help.

    The message names the file, and the tensor or key.
    """

    exit_code = 2


class EngineDeadError(Exception):
    """The engine process is gone or not ready; requests cannot be served now."""


class ApiError(Exception):
    """An error for the caller: HTTP status plus OpenAI's {message, type, param, code}."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, dict[str, str | None]]:
        """OpenAI's envelope: {"error": {"message", "type", "param", "code"}}."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def internal_error() -> ApiError:
    """What a caller is told about a fault of ours: nothing but that it is ours."""
    return ApiError("The server had an error while processing your request.", status=500, kind="server_error")

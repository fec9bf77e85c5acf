"""The key that the server makes for its owner when none is configured.

It is kept in a file that only the owner can read, so that clients survive a restart; deleting the file
makes the next start create another.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from toptwo.errors import StartupError

FILE_NAME = "api-key"


@dataclass
class LocalKey:
    """created: whether this start made it, and so may show it. shown: whether it has."""

    secret: str
    path: Path
    created: bool
    shown: bool = False


def load_or_create_key(directory: Path) -> LocalKey:
    """The directory's key, created on first use. Raises StartupError."""
    path = directory / FILE_NAME
    try:
        directory.mkdir(parents=True, exist_ok=True)
        secret = f"sk-toptwo-{secrets.token_urlsafe(32)}"
        created = _write_new(path, secret)
        if not created:
            secret = path.read_text().strip()
    except OSError as error:
        raise StartupError(f"{path}: cannot keep the API key there: {error.strerror}") from None
    except UnicodeDecodeError:
        secret = ""
    if not (secret and secret.isascii() and secret.isprintable()):
        raise StartupError(f"{path}: holds no key; delete it to have a new one created")
    return LocalKey(secret, path, created)


def _write_new(path: Path, secret: str) -> bool:
    """Write a file that appears complete or not at all, and never over another one."""
    draft = path.with_name(f".{FILE_NAME}-{secrets.token_hex(8)}")
    draft.touch(mode=0o600)
    try:
        draft.write_text(secret + "\n")
        os.link(draft, path)
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    return True

"""Reads the lines of a book out of R's lazy-load database, in which Debian packages Jane Austen's novels.

Knows R's serialisation of a vector of strings (R Internals, "Serialization Formats"). Must not know domains.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator

_STRINGS, _STRING = 16, 9  # R's types STRSXP and CHARSXP
_FEWEST_LINES = 1000  # in a book; other vectors of strings are shorter


def books(database: bytes) -> Iterator[list[str]]:
    """The lines of each book of an `.rdb` file, in the order of the file."""
    for start in range(len(database) - 6):
        # An entry: its length, then a zlib stream, which begins with these two bytes.
        if database[start + 4 : start + 6] in (b"\x78\x9c", b"\x78\xda"):
            size = struct.unpack_from(">I", database, start)[0]
            try:
                content = zlib.decompress(database[start + 4 :][: 4 * size])
            except zlib.error:
                continue
            if len(content) == size:
                yield from _long_vectors(content)


def _long_vectors(content: bytes) -> Iterator[list[str]]:
    for found in re.finditer(rb"\x00\x00\x00[\x10]", content):
        count = struct.unpack_from(">I", content, found.end())[0]
        if _FEWEST_LINES <= count < len(content) // 8:
            lines = list(_strings(content, found.end() + 4, count))
            if len(lines) == count:
                yield lines


def _strings(content: bytes, offset: int, count: int) -> Iterator[str]:
    for _ in range(count):
        flags, length = struct.unpack_from(">II", content, offset)
        if flags & 0xFF != _STRING or length > len(content):
            return
        yield content[offset + 8 : offset + 8 + length].decode()
        offset += 8 + length


def chapters(lines: list[str]) -> list[str]:
    """A book's chapters as text, paragraphs on one line each; what precedes the first is left out."""
    text = "\n".join(lines)
    parts = re.split(r"\n(?:chapter|CHAPTER|Chapter) +[0-9IVXLC]+\.?[^\n]*\n", text)[1:]
    return [re.sub(r"(?<!\n)\n(?!\n)", " ", part).replace("\n\n", "\n").strip() for part in parts]

"""Text for the router's eight domains, as documents that are wholly training or wholly held out.

Knows where openly licensed text lies in Debian packages, in the Python installation and in PyTorch's
headers, and how to take the prose out of it. Must not know tokens, models or experts. Used only by
`train_router`; MODEL_CARD.md lists the sources with their licences.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from toptwo.default_model.router_maths import worksheet

# The order is the order of the experts.
DOMAINS = ("en", "py", "c", "fr", "de", "es", "it", "maths")

HELP_PACKAGES = {
    "en": "libreoffice-help-en-us",
    "fr": "libreoffice-help-fr",
    "de": "libreoffice-help-de",
    "es": "libreoffice-help-es",
    "it": "libreoffice-help-it",
}
DEBIAN_PACKAGES = (*HELP_PACKAGES.values(), "python3.11-doc")

# Other people's packages, tests, and generated files that are nearly copies of each other: with those
# on both sides of the split, the held-out figures would flatter.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data", "ops"}
)

NUM_WORKSHEETS = 600
HELD_OUT_SHARE = 5  # one document in five


@dataclass(frozen=True)
class Document:
    """`key` names the document in all its translations, so that a page is held out in every language."""

    domain: str
    key: str
    text: str

    @property
    def held_out(self) -> bool:
        return _number(self.key) % HELD_OUT_SHARE == 0


def collect(directory: Path) -> list[Document]:
    """All documents, in a fixed pseudo-random order; Debian packages are unpacked below `directory`.

    Nothing is installed. Raises FileNotFoundError where a tool or a source is missing and
    subprocess.CalledProcessError where a package cannot be had.
    """
    unpack_packages(directory)
    import torch  # only for its headers: the corpus of the domain "c"

    documents = [
        *_help_pages(directory),
        *_python_manual(directory),
        *_source_files("py", Path(sysconfig.get_paths()["stdlib"]), "*.py"),
        *(
            document
            for name in ("ATen", "c10", "torch")  # PyTorch's own; beside them lie others' headers
            for document in _source_files("c", Path(torch.__file__).parent / "include" / name, "*.h")
        ),
        *_worksheets(),
    ]
    return sorted(documents, key=lambda document: _number(document.domain + document.key))


def unpack_packages(directory: Path) -> None:
    """Download the Debian packages into `directory` and unpack them there."""
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise FileNotFoundError("apt-get and dpkg are needed to fetch the text (any Debian 12 has them)")
    subprocess.run(["apt-get", "download", "-qq", *DEBIAN_PACKAGES], cwd=directory, check=True)  # noqa: S607
    for package in sorted(directory.glob("*.deb")):
        subprocess.run(["dpkg", "-x", package.name, "."], cwd=directory, check=True)  # noqa: S607


def _help_pages(directory: Path) -> Iterator[Document]:
    for domain in HELP_PACKAGES:
        language = "en-US" if domain == "en" else domain
        root = directory / "usr/share/libreoffice/help" / language / "text"
        for page in sorted(root.rglob("*.html")):
            yield from _document(domain, str(page.relative_to(root)), paragraphs(page.read_text("utf-8")))


def _python_manual(directory: Path) -> Iterator[Document]:
    root = directory / "usr/share/doc/python3.11/html/_sources"
    for page in sorted(root.rglob("*.rst.txt")):
        blocks = page.read_text("utf-8").split("\n\n")
        # Indented blocks are code or tables, those with dots are directives: prose is the rest.
        prose = [block for block in blocks if block[:1].isalpha() and "::" not in block and "==" not in block]
        yield from _document("en", str(page.relative_to(root)), "\n\n".join(prose))


def _source_files(domain: str, root: Path, pattern: str) -> Iterator[Document]:
    for path in sorted(root.rglob(pattern)):
        name = path.relative_to(root.parent)
        if not set(name.parts) & SKIPPED_FOLDERS:
            yield from _document(domain, str(name), path.read_text("utf-8", errors="replace"))


def _worksheets() -> Iterator[Document]:
    # Held-out worksheets are made of problem types that no training worksheet has: a document is not
    # new merely because its numbers are.
    for number in range(NUM_WORKSHEETS):
        key = f"worksheet-{number}"
        held_out = Document("maths", key, "").held_out
        yield Document("maths", key, worksheet(number, held_out))


def _document(domain: str, key: str, text: str) -> Iterator[Document]:
    if len(text) >= 400:  # shorter ones are redirections and empty headers
        yield Document(domain, key, text)


def paragraphs(page: str) -> str:
    """The text of a help page's headings and paragraphs, one per line, without navigation."""
    parser = _Paragraphs()
    content = page.partition('<div id="DisplayArea"')[2].partition('<div id="SearchFrame"')[0]
    parser.feed("<div" + content)
    return "\n".join(" ".join(line.split()) for line in parser.lines if line.strip())


class _Paragraphs(HTMLParser):
    _BLOCKS = frozenset({"p", "h1", "h2", "h3", "h4", "h5", "td", "li"})

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = [""]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self._BLOCKS:
            self.lines.append("")

    def handle_data(self, data: str) -> None:
        self.lines[-1] += data


def _number(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8])

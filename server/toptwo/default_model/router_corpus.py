"""Text for the router's eight domains, as documents that are wholly training or wholly held out.

Knows where openly licensed text lies in Debian packages, in the Python installation and in PyTorch's
headers, and how to take the prose out of it. Must not know tokens, models or experts. Used only by
`train_router`; MODEL_CARD.md lists the sources with their licences.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from toptwo.default_model.router_maths import worksheet
from toptwo.default_model.training.austen import books, chapters

# The order is the order of the experts.
DOMAINS = ("en", "py", "c", "fr", "de", "es", "it", "maths")

HELP_FOLDERS = {"en": "en-US", "fr": "fr", "de": "de", "es": "es", "it": "it"}


@dataclass(frozen=True)
class Package:
    """One Debian package that text is read from; sha256 of its file."""

    name: str
    version: str
    sha256: str
    licence: str


_HELP, _PYTHON = "4:7.4.7-1+deb12u14", "3.11.2-6+deb12u9"
PACKAGES = (
    *(
        Package(f"libreoffice-help-{name}", _HELP, sha256, "MPL-2.0")
        for name, sha256 in {
            "en-us": "8faa840285734d6cfe1ed25537b48f07e74bd6412e3917bf8e5f8a653f7b3712",
            "fr": "c796530d3e95af1ea4d054076682efc8aad2b569ae9513f3d4a776b2df3fd206",
            "de": "00490b63c509ac96f7f212d6a6e40452d3e0d1f97ccf4b824dd5ec4c01e8277f",
            "es": "9128a84d83d92c8b1c618d90469d16affddb7d1290b09d42a0c5109cb16f0480",
            "it": "7fa29342a302bb495981fdabf98f3a9c3628123f3f191b2a5c95cb583c9ff212",
        }.items()
    ),
    Package(
        "python3.11-doc",
        _PYTHON,
        "5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be",
        "Python Software Foundation License",
    ),
    Package(
        "libpython3.11-stdlib:amd64",
        _PYTHON,
        "10f13e000ee757f5f2d2d3569f9e30546214a0c850acd78695feae373bfa3e53",
        "Python Software Foundation License",
    ),
    Package(
        "r-cran-janeaustenr",
        "1.0.0-1",
        "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
        "MIT (the package), public domain (the novels)",
    ),
)

# Other people's packages, tests, and generated files that are nearly copies of each other: with those
# on both sides of the split, the held-out figures would flatter.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data", "ops"}
)

NUM_WORKSHEETS = 2000
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

    Nothing is installed. Raises FileNotFoundError where a tool or a source is missing, ValueError where a
    package is not the pinned one and subprocess.CalledProcessError where it cannot be had.
    """
    unpack_packages(directory)
    import torch  # only for its headers: the corpus of the domain "c"

    documents = [
        *_help_pages(directory),
        *_python_manual(directory),
        *_novels(directory),
        *_source_files("py", directory / "usr/lib/python3.11", "*.py"),
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
    names = [f"{package.name}={package.version}" for package in PACKAGES]
    try:
        subprocess.run(["apt-get", "download", "-qq", *names], cwd=directory, check=True)  # noqa: S607
    except subprocess.CalledProcessError as error:
        error.add_note("apt-get must have the lists of Debian 12: run `apt-get update` first")
        raise
    expected = {package.sha256: package.name for package in PACKAGES}
    for path in sorted(directory.glob("*.deb")):
        if expected.pop(hashlib.sha256(path.read_bytes()).hexdigest(), None) is None:
            raise ValueError(f"{path.name} is not the file that the text was made from: its SHA-256 differs")
        subprocess.run(["dpkg", "-x", path.name, "."], cwd=directory, check=True)  # noqa: S607
    if expected:
        raise ValueError(f"not downloaded: {', '.join(expected.values())}")


def _help_pages(directory: Path) -> Iterator[Document]:
    for domain, language in HELP_FOLDERS.items():
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


def _novels(directory: Path) -> Iterator[Document]:
    database = directory / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    for book in books(database.read_bytes()):
        # A whole novel is held out: the other chapters of one know its people.
        for chapter in chapters(book):
            yield from _document("en", f"austen-{book[0].lower()}", chapter)


def _source_files(domain: str, root: Path, pattern: str) -> Iterator[Document]:
    for path in sorted(root.rglob(pattern)):
        name = path.relative_to(root.parent)
        if path.is_file() and not set(name.parts) & SKIPPED_FOLDERS:  # a link may point out of the package
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

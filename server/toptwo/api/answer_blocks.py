"""An answer as consecutive blocks: a thought, a text or a call, each opened, grown and closed.

Knows the pieces of an answer; must not know how a format writes its blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from toptwo.api.generation import Delta
from toptwo.api.token_text import TokenReport
from toptwo.text.parsers import Content, Reasoning, ToolCallArguments, ToolCallStart

BlockKind = Literal["text", "thought", "call"]


@dataclass
class Block:
    """One block of an answer, as far as it has come. index: its place. name: of the function of a call.

    In a call the texts are the JSON text of the arguments. reports: on a text's tokens, where wanted.
    """

    kind: BlockKind
    index: int
    name: str = ""
    texts: list[str] = field(default_factory=list)
    reports: list[TokenReport] = field(default_factory=list)
    is_open: bool = True

    @property
    def text(self) -> str:
        """All of the block's text so far."""
        return "".join(self.texts)


@dataclass(frozen=True)
class Step:
    """What happens to a block: it opens, it grows by a text, or it closes."""

    kind: Literal["open", "grow", "close"]
    block: Block
    text: str = ""
    reports: tuple[TokenReport, ...] = ()


class BlockReader:
    """Turns the deltas of one choice into steps. blocks: all that have been opened.

    with_thoughts: whether thoughts are blocks, or nothing.
    """

    def __init__(self, *, with_thoughts: bool = True) -> None:
        self.blocks: list[Block] = []
        self._with_thoughts = with_thoughts
        self._reports: tuple[TokenReport, ...] = ()  # on tokens of a text that has not come yet

    def steps(self, delta: Delta) -> Iterator[Step]:
        """The steps of a delta; behind the last one nothing is open."""
        self._reports += delta.reports
        if delta.pieces and not any(isinstance(piece, Content) for piece in delta.pieces):
            self._reports = ()
        for piece in delta.pieces:
            match piece:
                case Content(text):
                    yield from self._grow("text", text)
                case Reasoning(text):
                    if self._with_thoughts:
                        yield from self._grow("thought", text)
                case ToolCallStart(_, name):
                    yield from self._open("call", name)
                case ToolCallArguments(_, text):
                    yield from self._grow("call", text)
        if delta.finish_reason is not None:
            yield from self._close()

    @property
    def _current(self) -> Block | None:
        return self.blocks[-1] if self.blocks and self.blocks[-1].is_open else None

    def _grow(self, kind: BlockKind, text: str) -> Iterator[Step]:
        block = self._current
        if block is None or block.kind != kind:
            yield from self._open(kind)
            block = self.blocks[-1]
        reports: tuple[TokenReport, ...] = ()
        if kind == "text":
            reports, self._reports = self._reports, ()
        block.texts.append(text)
        block.reports += reports
        yield Step("grow", block, text, reports)

    def _open(self, kind: BlockKind, name: str = "") -> Iterator[Step]:
        yield from self._close()
        block = Block(kind, len(self.blocks), name)
        self.blocks.append(block)
        yield Step("open", block)

    def _close(self) -> Iterator[Step]:
        block = self._current
        if block is not None:
            block.is_open = False
            yield Step("close", block)

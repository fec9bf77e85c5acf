"""Words to token ids and back, on the `tokenizers` library alone.

Knows the tokenizer files of a checkpoint; must not know chat messages, HTTP or the engine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import tokenizers

from toptwo.errors import CheckpointError
from toptwo.heap import give_memory_back
from toptwo.text.checkpoint import read_json_if_present

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# Longer texts are looked at in slices before they are encoded, where only so many tokens are wanted.
_SLICE_CHARS = 64 * 1024
_NUM_UNSLICED = 4
# Of a slice that is cut out of a text, this many tokens at its two ends need not be in the text's own.
_TOKENS_AT_CUTS = 16
_LARGE_CHARS = 1 << 20

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_TURN_MARK = re.compile("<[|\uff5c].+[|\uff5c]>")  # the second kind of bar is the full-width one


def _byte_characters() -> dict[str, int]:
    """The character that byte-level vocabularies write for each byte: itself where it is visible,
    else the next free one from U+0100 on (GPT-2's convention)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in visible]
    characters = {chr(byte): byte for byte in visible}
    return characters | {chr(0x100 + index): byte for index, byte in enumerate(hidden)}


_BYTE_OF = _byte_characters()


class TooManyTokensError(Exception):
    """A text has more tokens than were wanted; how many is not known."""


class Tokenizer:
    """The vocabulary of one model. Thread-safe: nothing changes after construction.

    stop_token_ids: tokens that end an answer (eos and its like), sorted; may be empty.
    named_tokens: "bos_token" -> "<s>" and so on, for chat templates.
    special_tokens: texts of all control tokens. special_ids: their ids.
    control_texts: those, and texts of tokens that mark turns without being declared as control tokens, as
        DeepSeek's do: what a message must not turn into.
    prefix_ids: what the tokenizer puts before every raw text, say <s>.
    """

    def __init__(
        self,
        vocabulary: tokenizers.Tokenizer,
        *,
        stop_token_ids: Iterable[int] = (),
        named_tokens: Mapping[str, str] | None = None,
    ) -> None:
        # tokenizer.json may carry the truncation and padding of somebody's training run.
        vocabulary.no_truncation()
        vocabulary.no_padding()
        self._vocabulary = vocabulary
        self.stop_token_ids = tuple(sorted(set(stop_token_ids)))
        self.named_tokens = dict(named_tokens or {})
        added = vocabulary.get_added_tokens_decoder()
        special = {i: t.content for i, t in added.items() if t.special}
        self.special_ids = frozenset(special)
        self.special_tokens = tuple(sorted(special.values()))
        marks_turns = (t.content for t in added.values() if _TURN_MARK.fullmatch(t.content))
        self.control_texts = tuple(sorted({*self.special_tokens, *marks_turns}))
        self._ids_with_text = frozenset(vocabulary.get_vocab().values()) - self.special_ids
        decoder = json.loads(vocabulary.decoder.__getstate__()) if vocabulary.decoder else {}
        kinds = [decoder, *decoder.get("decoders", [])]
        self._is_byte_level = any(kind.get("type") == "ByteLevel" for kind in kinds)
        with_extras = vocabulary.encode("a")
        marks = with_extras.special_tokens_mask
        self.prefix_ids = tuple(with_extras.ids[: marks.index(0)] if 0 in marks else ())
        self._newline_ids = self._encode_whole(["\n"])[0]

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Read tokenizer.json and, where present, tokenizer_config.json, special_tokens_map.json,
        generation_config.json and config.json.

        Raises CheckpointError with one line that names the file.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; {_advice(directory)}")
        try:
            vocabulary = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path}: is not a readable tokenizer ({error})") from None
        named_tokens = _named_tokens(directory)
        return cls(
            vocabulary,
            stop_token_ids=_stop_token_ids(directory, vocabulary, named_tokens),
            named_tokens=named_tokens,
        )

    def encode(self, pieces: Sequence[str], most: int | None = None) -> list[int]:
        """Token ids of the pieces, one after the other; no token is formed across a border of two.

        Texts of control tokens inside a piece become control tokens. No bos or eos is added: chat
        templates write their own.
        most: how many tokens are of use. Raises TooManyTokensError for a text that is much longer, without
        the work of encoding all of it; one that is just longer is encoded.
        """
        num_chars = sum(map(len, pieces))
        if most is not None and self._is_far_over(pieces, num_chars, most):
            raise TooManyTokensError
        try:
            return self._encode_pieces(pieces)
        finally:
            if num_chars > _LARGE_CHARS:
                give_memory_back()

    def _encode_pieces(self, pieces: Sequence[str]) -> list[int]:
        first, *rest = pieces
        if not rest:
            return self._encode_whole([first])[0]
        # A tokenizer of the SentencePiece family starts every text with a space. That is right for the
        # first piece only, so the others are encoded behind a newline that is then cut off again.
        cut = len(self._newline_ids)
        encoded = self._encode_whole([first, *("\n" + piece for piece in rest)])
        for index, piece in enumerate(rest, start=1):
            if encoded[index][:cut] == self._newline_ids:
                encoded[index] = encoded[index][cut:]
            else:  # the newline melted into the piece's first token
                encoded[index] = self._encode_whole([piece])[0]
        return [token for ids in encoded for token in ids]

    def has_text(self, token_id: int) -> bool:
        """Whether readers see the token: not a control token, and in the vocabulary (models pad theirs)."""
        return token_id in self._ids_with_text

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, that of control tokens included."""
        return self._vocabulary.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token stands for, also where they are only part of a character."""
        text = self._vocabulary.id_to_token(token_id)
        if text is None:
            return b""
        if token_id in self.special_ids:
            return text.encode()
        if self._is_byte_level:
            return bytes(_BYTE_OF[character] for character in text if character in _BYTE_OF)
        if byte := _BYTE_TOKEN.fullmatch(text):
            return bytes([int(byte[1], 16)])
        return text.replace("\u2581", " ").encode()

    def id_of(self, text: str) -> int | None:
        """The id of the token that is written so in the vocabulary."""
        return self._vocabulary.token_to_id(text)

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, control tokens included."""
        return self._vocabulary.get_vocab_size()

    def _is_far_over(self, pieces: Sequence[str], num_chars: int, most: int) -> bool:
        """Whether the pieces have more than `most` tokens; False where they may fit or do not by little.

        Slices are counted until there are more than twice as many. Where one is cut, and at the front of
        each piece, where some tokenizers put a space, it has a few tokens that are not in the whole: at most
        one for each piece, and thus at most as many as the pieces have, beside those at the cuts.
        """
        size = max(_SLICE_CHARS, 4 * most)
        if num_chars <= _NUM_UNSLICED * size:
            return False
        surplus = -2 * most
        for batch in _slices(pieces, size):
            surplus += sum(map(len, self._encode_whole(batch))) - _TOKENS_AT_CUTS
            if surplus > 0:
                return True
        return False

    def _encode_whole(self, texts: list[str]) -> list[list[int]]:
        # Of the library's entry points this is the one that lets go of the interpreter lock (a long
        # prompt would otherwise stall every stream of the process); it also skips unused offsets.
        return [e.ids for e in self._vocabulary.encode_batch_fast(texts, add_special_tokens=False)]


def _slices(pieces: Iterable[str], size: int) -> Iterator[list[str]]:
    """The pieces, long ones cut, in batches of about so many characters."""
    batch: list[str] = []
    room = size
    for piece in pieces:
        for start in range(0, len(piece), size):
            batch.append(piece[start : start + size])
            room -= len(batch[-1])
            if room <= 0:
                yield batch
                batch, room = [], size
    if batch:
        yield batch


def _advice(directory: Path) -> str:
    """What to do about a checkpoint without tokenizer.json, by the vocabulary that it has instead."""
    if (directory / "tokenizer.model").is_file():
        # Other classes of the library leave out the space before a text that these vocabularies want.
        program = (
            "from transformers import LlamaTokenizer as T; "
            f"T.from_pretrained('{directory}').save_pretrained('{directory}')"
        )
        return (
            "make it once of tokenizer.model, where that is a SentencePiece vocabulary of BPE: "
            f'pip install transformers sentencepiece protobuf && python -c "{program}"'
        )
    if any(directory.glob("*tiktoken*")):
        return "a tiktoken vocabulary cannot be read; take the file from a newer revision of the model"
    return "a fast tokenizer in this format is needed"


def _named_tokens(directory: Path) -> dict[str, str]:
    """Texts of the tokens that chat templates may name; tokenizer_config.json wins."""
    named: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        config = read_json_if_present(directory / file)
        for name in _NAMED_TOKENS:
            value = config.get(name)
            if isinstance(value, dict):  # a serialised AddedToken
                value = value.get("content")
            if isinstance(value, str):
                named[name] = value
    return named


def _stop_token_ids(
    directory: Path, vocabulary: tokenizers.Tokenizer, named_tokens: Mapping[str, str]
) -> set[int]:
    """The union of what the files call eos: chat models often name their turn end in one file only."""
    ids: set[int] = set()
    for file in ("generation_config.json", "config.json"):
        value = read_json_if_present(directory / file).get("eos_token_id")
        for token_id in value if isinstance(value, list) else [value]:
            if token_id is None:
                continue
            if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
                raise CheckpointError(
                    f"{directory / file}: eos_token_id must be a token id or a list of them"
                )
            ids.add(token_id)
    eos = vocabulary.token_to_id(named_tokens["eos_token"]) if "eos_token" in named_tokens else None
    return ids if eos is None else ids | {eos}

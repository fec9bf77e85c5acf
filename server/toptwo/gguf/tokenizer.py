"""The tokenizer.json that a GGUF file's vocabulary stands for.

Knows the two kinds of vocabulary that models have: byte-level BPE, and SentencePiece with a score per token.
Must not know weights or where files go.
"""

from __future__ import annotations

import json

import tokenizers
from gguf import TokenType
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from toptwo.errors import CheckpointError
from toptwo.gguf.metadata import Metadata
from toptwo.gguf.pre_tokenizers import PRE_TOKENIZERS, UNNAMED, PreTokenizer
from toptwo.gguf.vocabulary import Vocabulary

SPACE = "\u2581"  # SentencePiece's
# Phi's control tokens take the blanks behind them along, but for these. No key says so.
PHI = "phimoe"
PHI_PLAIN = frozenset({"<unk>", "<s>", "<|endoftext|>"})

Merge = tuple[str, str]


def build_tokenizer(keys: Metadata, vocabulary: Vocabulary, architecture: str) -> tokenizers.Tokenizer:
    """keys: those below "tokenizer". Raises CheckpointError that names the key."""
    try:
        begins, tokenizer = _build(keys, vocabulary)
        _add_tokens(tokenizer, vocabulary, phi=architecture == PHI)
        bos = vocabulary.text_of("bos")
        if bos is not None and keys.flag("ggml.add_bos_token", begins):
            template = processors.TemplateProcessing(
                single=[bos, "$A"], special_tokens=[(bos, vocabulary.roles["bos"])]
            )
            tokenizer.post_processor = template
    except CheckpointError:
        raise
    except Exception as error:  # the library raises bare Exception
        problem = f"and what belongs to it make no tokenizer: {' '.join(str(error).split())[:200]}"
        raise keys.error("ggml.tokens", problem) from None
    return tokenizer


def is_guessed(keys: Metadata) -> bool:
    """Whether the file does not say how text is cut into words, and llama.cpp's guess is taken."""
    return keys.text("ggml.model") == "gpt2" and keys.text("ggml.pre", UNNAMED) == UNNAMED


def _build(keys: Metadata, vocabulary: Vocabulary) -> tuple[bool, tokenizers.Tokenizer]:
    """(whether raw text begins with bos unless the file denies it, the tokenizer)."""
    model = keys.text("ggml.model")
    if model == "llama":
        return True, _sentencepiece(keys, vocabulary)
    if model != "gpt2":
        raise keys.error("ggml.model", f"{model!r} is not supported; there is: gpt2, llama")
    name = keys.text("ggml.pre", UNNAMED)
    if name not in PRE_TOKENIZERS:
        supported = ", ".join(PRE_TOKENIZERS)
        raise keys.error("ggml.pre", f"{name!r} is not supported; there is: {supported}")
    known = PRE_TOKENIZERS[name]
    return known.begins, _byte_level(keys, vocabulary, known)


def _byte_level(keys: Metadata, vocabulary: Vocabulary, known: PreTokenizer) -> tokenizers.Tokenizer:
    bpe = models.BPE(vocabulary.ids(), _read_merges(keys), ignore_merges=known.whole_words)
    tokenizer = tokenizers.Tokenizer(bpe)
    if known.composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(known)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre_tokenizer(known: PreTokenizer) -> pre_tokenizers.PreTokenizer:
    """Steps are written as files have them, and the library makes them of a whole file only."""
    first, *rest = known.steps
    steps = {"type": "Sequence", "pretokenizers": [first, *rest]} if rest else first
    file = {"model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": steps}
    made: pre_tokenizers.PreTokenizer = tokenizers.Tokenizer.from_str(json.dumps(file)).pre_tokenizer
    return made


def _read_merges(keys: Metadata) -> list[Merge]:
    merges = []
    for number, merge in enumerate(keys.texts("ggml.merges")):
        # A byte-level token has no space of its own: the only one separates the pair.
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            raise keys.error("ggml.merges", f"has no pair of tokens at {number}: {merge!r}"[:200])
        merges.append((left, right))
    return merges


def _sentencepiece(keys: Metadata, vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    """BPE that merges into the best-scored token first, and writes characters without a token as bytes."""
    merges = _read_merges(keys) if keys.has("ggml.merges") else _merges_by_score(keys, vocabulary)
    bpe = models.BPE(
        vocabulary.ids(),
        merges,
        unk_token=vocabulary.text_of("unknown"),
        fuse_unk=True,
        byte_fallback=bool(vocabulary.ids(TokenType.BYTE)),
    )
    tokenizer = tokenizers.Tokenizer(bpe)
    begins_with_space = keys.flag("ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if begins_with_space else spaces
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if begins_with_space else steps)
    return tokenizer


def _merges_by_score(keys: Metadata, vocabulary: Vocabulary) -> list[Merge]:
    """Every way to put a token together of two others, those of the best-scored token first."""
    scores = keys.numbers("ggml.scores")
    if len(scores) != len(vocabulary.tokens):
        raise keys.error("ggml.scores", f"has {len(scores)} entries for {len(vocabulary.tokens)} tokens")
    ids = vocabulary.ids(TokenType.NORMAL)
    merges = [
        (-scores[index], ids[token[:cut]], ids[token[cut:]])
        for token, index in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    return [(vocabulary.tokens[left], vocabulary.tokens[right]) for _, left, right in sorted(merges)]


def _add_tokens(tokenizer: tokenizers.Tokenizer, vocabulary: Vocabulary, phi: bool) -> None:
    """Tokens that are found in text before anything else is done to it."""
    control = vocabulary.ids(TokenType.CONTROL, TokenType.UNKNOWN)
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False, rstrip=phi and token not in PHI_PLAIN)
            for token in control
        ]
    )
    defined = vocabulary.ids(TokenType.USER_DEFINED)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in defined])

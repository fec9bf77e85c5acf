"""How text is cut into words before merging: llama.cpp has a name for each way, tokenizer.json a recipe.

Knows `tokenizer.ggml.pre` and what of tokenizer.json belongs to it; must not know vocabularies or files. The
recipes are those of the models' own tokenizers, which llama.cpp imitates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Step = dict[str, Any]


@dataclass(frozen=True)
class PreTokenizer:
    """steps: of tokenizer.json's `pre_tokenizer`; the last one writes bytes as characters.

    whole_words: a word that is in the vocabulary is one token, whatever the merges say.
    composed: text is brought into Unicode's composed form (NFC) first.
    begins: raw text begins with the bos token, unless the file denies it.
    """

    steps: Sequence[Step]
    whole_words: bool = False
    composed: bool = False
    begins: bool = False


def _split(pattern: str) -> Step:
    """Every match becomes a word, and so does what is between two."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _bytes(use_regex: bool) -> Step:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


_DIGITS: Step = {"type": "Digits", "individual_digits": True}

_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA_3 = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN_2 = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_CASED = f"{_BEFORE}{_UPPER}*{_LOWER}+", f"{_BEFORE}{_UPPER}+{_LOWER}*"
_SLASH_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT_4O = "|".join(f"{word}{_ENDINGS}?" for word in _CASED) + r"|\p{N}{1,3}" + _SLASH_REST
_TEKKEN = "|".join(_CASED) + r"|\p{N}" + _SLASH_REST

_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)
# Most letters that have a case.
_DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481"
    "\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf"
    "\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d"
    "\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc"
    "\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115"
    "\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184"
    "\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f"
    "\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_LLM = (
    "[\r\n]",
    rf"\s?[{_DEEPSEEK_LETTERS}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
)
# What llama.cpp does where it is not told.
_UNNAMED = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    "[0-9][0-9][0-9]",
)


def _by_regex(*patterns: str, **options: bool) -> PreTokenizer:
    return PreTokenizer([*map(_split, patterns), _bytes(False)], **options)


UNNAMED = "default"
_GPT_2 = PreTokenizer([_bytes(True)])
_GPT_NEOX = PreTokenizer([_bytes(True)], composed=True)
_STARCODER = PreTokenizer([_DIGITS, _bytes(True)])
_LLAMA_BPE = _by_regex(_LLAMA_3, whole_words=True, begins=True)

# By llama.cpp's names; of those that mean the same, an export takes the first.
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": _GPT_2,
    "phi-2": _GPT_2,
    "olmo": _GPT_NEOX,
    "mpt": _GPT_NEOX,
    "smollm": _STARCODER,
    "starcoder": _STARCODER,
    "refact": _STARCODER,  # Granite
    "llama-bpe": _LLAMA_BPE,
    "llama3": _LLAMA_BPE,
    "llama-v3": _LLAMA_BPE,
    "dbrx": _by_regex(_LLAMA_3, whole_words=True),
    "smaug-bpe": _by_regex(_LLAMA_3),
    "qwen2": _by_regex(_QWEN_2, composed=True),
    "deepseek-r1-qwen": _by_regex(_QWEN_2, composed=True),
    "gpt-4o": _by_regex(_GPT_4O, whole_words=True),
    "tekken": _by_regex(_TEKKEN, whole_words=True, begins=True),
    "deepseek-v3": _by_regex(*_DEEPSEEK_V3),
    "deepseek-llm": PreTokenizer([*map(_split, _DEEPSEEK_LLM), _DIGITS, _bytes(False)]),
    UNNAMED: _by_regex(*_UNNAMED),
}


def name_of(steps: Sequence[Step], whole_words: bool) -> str | None:
    """llama.cpp's name for the steps of a tokenizer.json; None where it has none. Of names that mean the same
    steps, the one that treats whole words alike."""
    wanted = [_plain(step) for step in steps]
    alike = [name for name, known in PRE_TOKENIZERS.items() if [_plain(s) for s in known.steps] == wanted]
    exactly = (name for name in alike if PRE_TOKENIZERS[name].whole_words == whole_words)
    return next(exactly, alike[0] if alike else None)


def _plain(step: Step) -> Step:
    """The step with what files may leave out, and without what changes no word."""
    usual = {"ByteLevel": _bytes(True), "Split": {"invert": False}}.get(step["type"], {})
    return {key: value for key, value in {**usual, **step}.items() if key != "trim_offsets"}

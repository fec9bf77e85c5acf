"""A stand-in for tests: a model without weights that speaks Harmony."""

from __future__ import annotations

from pathlib import Path

import tokenizers

from fakes import byte_level_vocabulary
from toptwo.text.harmony import TOKENS
from toptwo.text.model import ServedModel
from toptwo.text.template import ChatTemplate
from toptwo.text.tokenizer import Tokenizer

TEMPLATE = Path(__file__).parent / "text" / "templates" / "gpt-oss.jinja"
OTHER_TOKENS = ("<|startoftext|>", "<|endoftext|>", "<|endofprompt|>")


def harmony_tokenizer() -> Tokenizer:
    """Its files call <|endoftext|> and, wrongly, <|end|> the end of an answer."""
    inner = byte_level_vocabulary()
    tokens = [tokenizers.AddedToken(t, special=True, normalized=False) for t in (*TOKENS, *OTHER_TOKENS)]
    inner.add_special_tokens(tokens)
    return Tokenizer(inner, stop_token_ids=[inner.token_to_id("<|endoftext|>"), inner.token_to_id("<|end|>")])


def harmony_model(name: str = "org/tiny-moe") -> ServedModel:
    """The model, with the template that the tests hold for gpt-oss's."""
    return ServedModel(name, 1_700_000_000, harmony_tokenizer(), ChatTemplate(TEMPLATE.read_text(), {}))

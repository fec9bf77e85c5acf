"""Which tokens a grammar allows next, for the sequences that have one.

Knows llguidance and the checkpoint's tokenizer file; must not know how a token is chosen. Grammars were
checked before they came here (see `toptwo.text.grammar`); one that fails all the same allows no token,
which ends its sequence with an error and nobody else's.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import llguidance
import numpy as np
import structlog
import torch
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from torch import Tensor

from toptwo.messages import NewSequence

log = structlog.get_logger()

_MOST_VOCABULARIES = 4  # one per set of end tokens; a model has one


class GrammarStates:
    """The matchers of the sequences that hold a slot.

    directory: of the checkpoint; its tokenizer.json is read when the first grammar comes.
    """

    def __init__(self, directory: Path, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._matchers: dict[int, llguidance.LLMatcher] = {}

        @lru_cache(maxsize=_MOST_VOCABULARIES)
        def vocabulary(end_token_ids: tuple[int, ...]) -> llguidance.LLTokenizer:
            path = str(directory / "tokenizer.json")
            return llguidance.LLTokenizer(path, n_vocab=vocab_size, eos_token=list(end_token_ids))

        self._vocabulary = vocabulary

    def admit(self, new: NewSequence) -> None:
        """Forget the slot's last grammar; begin, or resume, that of the new sequence."""
        self._matchers.pop(new.slot, None)
        if new.grammar is None:
            return
        vocabulary = self._vocabulary(tuple(new.grammar.end_token_ids))
        limits = llguidance.LLParserLimits(verbose_errors=False)  # errors would hold the whole grammar
        matcher = llguidance.LLMatcher(vocabulary, new.grammar.source, log_level=0, limits=limits)
        for token in new.token_ids[new.num_prompt_tokens :]:
            matcher.consume_token(token)
        self._matchers[new.slot] = matcher

    def has(self, slot: int) -> bool:
        """Whether the slot's sequence has a grammar."""
        return slot in self._matchers

    def allowed(self, slot: int) -> Tensor:
        """bool [V]: the tokens that may come next; none of them where the grammar has failed."""
        matcher = self._matchers[slot]
        bits = allocate_token_bitmask(1, self._vocab_size)
        if not matcher.is_error():
            fill_next_token_bitmask(matcher, bits, 0)
        if matcher.is_error():
            log.warning("a grammar has failed", reason=matcher.get_error()[:200])
            bits[:] = 0
        flags = np.unpackbits(bits.view(np.uint8)[0], bitorder="little", count=self._vocab_size)
        return torch.from_numpy(flags.view(np.bool_))

    def advance(self, slot: int, token: int) -> None:
        """Take in the token that was chosen."""
        matcher = self._matchers.get(slot)
        if matcher is not None:
            matcher.consume_token(token)

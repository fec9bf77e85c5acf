"""Which tokens a grammar allows next, for the sequences that have one.

Knows llguidance and the checkpoint's tokenizer file; must not know how a token is chosen. Grammars were
checked before they came here (see `toptwo.text.grammar`); one that fails all the same allows no token,
which ends its sequence with an error and nobody else's. A large one takes as long as many steps to compile,
so that is done in a thread beside them: llguidance lets go of the interpreter's lock meanwhile.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import llguidance
import numpy as np
import structlog
import torch
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from torch import Tensor

from toptwo.messages import Grammar, NewSequence

log = structlog.get_logger()

_MOST_VOCABULARIES = 4  # one per set of end tokens; a model has one
_MOST_COMPILED = 8  # kept for those who come again; a large grammar has 10 MB


class GrammarStates:
    """The matchers of the sequences that hold a slot, and the grammars that were compiled for them.

    directory: of the checkpoint; its tokenizer.json is read when the first grammar comes, or before.
    """

    def __init__(self, directory: Path, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._matchers: dict[int, llguidance.LLMatcher] = {}
        # One thread: grammars come one after the other, and leave the other cores to the model.
        self._compiler = ThreadPoolExecutor(1, "grammar-compiler")
        self._compiled: OrderedDict[Grammar, Future[llguidance.LLMatcher]] = OrderedDict()

        @lru_cache(maxsize=_MOST_VOCABULARIES)
        def vocabulary(end_token_ids: tuple[int, ...]) -> llguidance.LLTokenizer:
            path = str(directory / "tokenizer.json")
            return llguidance.LLTokenizer(path, n_vocab=vocab_size, eos_token=list(end_token_ids))

        self._vocabulary = vocabulary

    def load_vocabulary(self, end_token_ids: Iterable[int]) -> None:
        """Read the tokenizer for grammars with these end tokens. Later it would hold up the steps, for half a
        second if it is large: the library keeps the interpreter's lock for that."""
        try:
            self._vocabulary(tuple(end_token_ids))
        except Exception as error:  # the library's own; whoever asks for a grammar is told by its check
            log.warning("grammars cannot be used with this tokenizer", reason=str(error)[:200])

    def prepare(self, grammar: Grammar) -> bool:
        """Whether a sequence with the grammar can be admitted at once. If not, the grammar is being compiled,
        or will be when it is asked for again: one at a time is."""
        if grammar not in self._compiled and all(known.done() for known in self._compiled.values()):
            self._compiled[grammar] = self._compiler.submit(self._compile, grammar)
            if len(self._compiled) > _MOST_COMPILED:
                self._compiled.popitem(last=False)
        return grammar in self._compiled and self._compiled[grammar].done()

    def admit(self, new: NewSequence) -> None:
        """Forget the slot's last grammar; begin, or resume, that of the new sequence. Waits for the grammar
        to be compiled where nobody has seen to that."""
        self._matchers.pop(new.slot, None)
        if new.grammar is None:
            return
        if new.grammar in self._compiled:
            self._compiled.move_to_end(new.grammar)
            matcher = self._compiled[new.grammar].result().deep_copy()
        else:
            matcher = self._compile(new.grammar)
        for token in new.token_ids[new.num_prompt_tokens :]:
            matcher.consume_token(token)
        self._matchers[new.slot] = matcher

    def _compile(self, grammar: Grammar) -> llguidance.LLMatcher:
        vocabulary = self._vocabulary(tuple(grammar.end_token_ids))
        limits = llguidance.LLParserLimits(verbose_errors=False)  # errors would hold the whole grammar
        matcher = llguidance.LLMatcher(vocabulary, grammar.source, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # where the rest of the work of compiling happens
        return matcher

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

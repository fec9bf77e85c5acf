"""A request while the engine works on it."""

from __future__ import annotations

from dataclasses import dataclass, field

from toptwo.engine.blocks import hash_block, root_hash
from toptwo.messages import FinishReason, GenerateRequest, TokenLogprobs


@dataclass(eq=False)
class Sequence:
    """Tokens known so far, and how far the model has computed them.

    token_ids: the prompt and what was generated.
    num_computed: tokens whose KV is in `block_ids`, or will be when all planned steps have run; the rest is
        what is left to run.
    num_pending: tokens that steps draw which have no result yet.
    arrived: when the request came, by the scheduler's clock.
    num_cached: prompt tokens that the prefix cache gave at the first admission; None before it.
    queue_seconds: how long it waited for that.
    slot: the runtime's slot, only while running.
    scores: what is known of the prompt's tokens from the second on, until it is sent.
    """

    request: GenerateRequest
    arrived: float = 0.0
    token_ids: list[int] = field(init=False)
    num_computed: int = 0
    num_pending: int = 0
    num_cached: int | None = None
    queue_seconds: float = 0.0
    block_ids: list[int] = field(default_factory=list)
    slot: int | None = None
    scores: list[TokenLogprobs] = field(default_factory=list)
    _hashes: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_generated(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_left(self) -> int:
        """Tokens still to compute; 1 while decoding, more in a prompt or after a preemption."""
        return self.num_tokens + self.num_pending - self.num_computed

    @property
    def can_go_on(self) -> bool:
        """Whether a row may be planned: not behind a token that is not known yet and ends the sequence for
        certain, or that has to be known on the way to the next one."""
        if not self.num_pending:
            return True
        sampling = self.request.sampling
        needs_token = (
            self.request.grammar is not None
            or sampling.presence_penalty != 0
            or sampling.frequency_penalty != 0
            or sampling.repetition_penalty != 1
        )
        return not needs_token and self.num_generated + self.num_pending < self.request.max_tokens

    def block_hashes(self, count: int, block_size: int) -> list[bytes]:
        """Chained hashes of the first `count` full blocks."""
        while len(self._hashes) < count:
            start = len(self._hashes) * block_size
            parent = self._hashes[-1] if self._hashes else root_hash(self.request.cache_scope)
            self._hashes.append(hash_block(parent, self.token_ids[start : start + block_size]))
        return self._hashes[:count]

    def finish_reason(self) -> FinishReason | None:
        """Why the sequence is over, judged by its last token; None while it goes on."""
        if self.num_generated and self.token_ids[-1] in self.request.stop_token_ids:
            return "stop"
        return "length" if self.num_generated >= self.request.max_tokens else None

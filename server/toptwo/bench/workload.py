"""What is asked and when: lengths, prompts and arrivals, the same again for the same seed.

Prompts are random words, most of which are one token in any English vocabulary, so that their length in
tokens can be chosen. Knows nothing of HTTP; must not measure anything.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field

from toptwo.bench.client import Call
from toptwo.bench.options import Length

WORDS = """
action air animal answer area arm art baby back bank base bird blue board boat body book box boy bridge
building business camp car card care case cat center chair change child church circle city class clock cloud
coast college color company computer control cost country course court culture current data date daughter
day deal decision director distance doctor dog door dream drive earth east edge education effect energy
engine event evidence example eye face fact family farm father field figure film finger fire fish flower
food foot force forest form friend front future game gas gate girl glass goal gold government grass green
ground group growth hand head health heart heat hill history home horse hospital hour house idea image
industry interest iron issue job key king lake land language law leader leaf level library life light line
list machine man map market master material matter member memory message method middle milk mind minute
model moment money month moon mother mouth movie music name nation nature neck news night north nose note
number object ocean office oil orange order page pain paper parent park part party path patient pattern
people person phone picture piece place plan plane plant player point policy power president pressure price
problem process product program project purpose question race radio rain reason record red report research
result rice ring river road rock role room rule school science sea season seat sense series service shape
ship shop side sign size skin sky sleep snow son song sound source south space speech speed spring square
staff stage star state station step stone store story street student study style subject sugar summer sun
surface system table talk task teacher team test thing thought time town trade tree truth unit value view
voice walk wall war water way week weight west wheel wind window winter woman wood word work world writer
year
""".split()  # noqa: SIM905  (a list of strings would be a page of quotes)
# So many random words cannot meet the prefix cache of a server that has seen the same seed before.
NONCE_WORDS = 4


@dataclass(frozen=True)
class Shape:
    """What the requests of a run have in common.

    prompt_tokens: as the server counts them; `overhead` of them are what its chat template adds.
    shared_prefix: so many tokens at the beginning are the same in all prompts.
    extra, timeout: as in Call.
    """

    prompt_tokens: Length
    max_tokens: Length
    shared_prefix: int = 0
    temperature: float = 0.0
    extra: dict[str, object] = field(default_factory=dict)
    timeout: float | None = None
    overhead: int = 0

    def call(self, prompt: str, max_tokens: int) -> Call:
        """A request of this shape."""
        return Call(prompt, max_tokens, self.temperature, self.extra, self.timeout)


def calls(shape: Shape, seed: int) -> Iterator[Call]:
    """Requests without end. Lengths and most words follow from the seed; each prompt is a new one."""
    rng = random.Random(seed)  # noqa: S311  (nobody is to be surprised)
    prefix = rng.choices(WORDS, k=shape.shared_prefix)
    while True:
        num_words = max(1, shape.prompt_tokens.draw(rng) - shape.overhead - shape.shared_prefix)
        prompt = " ".join(prefix + distinct_words(rng, num_words))
        yield shape.call(prompt, shape.max_tokens.draw(rng))


def distinct_words(rng: random.Random, count: int) -> list[str]:
    """Words that begin as no others do."""
    num_new = min(NONCE_WORDS, count)
    return [secrets.choice(WORDS) for _ in range(num_new)] + rng.choices(WORDS, k=count - num_new)


def arrivals(rate: float, seed: int) -> Iterator[float]:
    """Seconds at which requests of a Poisson process arrive, without end. rate: per second."""
    rng = random.Random(f"arrivals {seed}")  # noqa: S311  (not the stream that lengths are drawn from)
    moment = 0.0
    while True:
        moment += rng.expovariate(rate)
        yield moment

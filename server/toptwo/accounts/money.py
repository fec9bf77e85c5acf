"""Credits as whole numbers of millionths, and what tokens cost.

Knows arithmetic; must not know accounts. Amounts are integers of micro-credits everywhere but where people
read or write them.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

MICRO = 1_000_000
MOST_CREDITS = 1_000_000_000
"""Far more than anybody has; sums of it stay within 64 bits."""


@dataclass(frozen=True)
class Price:
    """Micro-credits per million tokens of a prompt, of its part that was cached, and of an answer."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0


FREE = Price()


@dataclass(frozen=True)
class Tokens:
    """What a request used. cached: those of the prompt that the prefix cache had."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0

    @property
    def total(self) -> int:
        """All that limits count."""
        return self.prompt + self.completion


def cost_of(tokens: Tokens, price: Price) -> int:
    """Micro-credits, rounded up once."""
    exact = (tokens.prompt - tokens.cached) * price.prompt
    exact += tokens.cached * price.cached + tokens.completion * price.completion
    return -(-exact // 1_000_000)


def most_cost_of(tokens: Tokens, price: Price) -> int:
    """The most that a request of so many tokens can cost, however much of its prompt is cached."""
    dearest = Price(max(price.prompt, price.cached), 0, price.completion)
    return cost_of(Tokens(tokens.prompt, 0, tokens.completion), dearest)


def parse_credits(text: str) -> int:
    """ "0.5" as 500000 micro-credits. Raises ValueError for what is no amount, too large or too fine."""
    try:
        amount = Decimal(text)
    except InvalidOperation:
        raise ValueError(f"{text!r} is no number of credits") from None
    if not amount.is_finite() or abs(amount) > MOST_CREDITS:
        raise ValueError(f"{text} is more credits than an account can have")
    micro = amount * MICRO
    if micro != micro.to_integral_value():
        raise ValueError(f"{text}: a credit has a million parts, and no smaller ones")
    return int(micro)


def format_credits(micro: int) -> str:
    """500000 as "0.5"; two decimal places at least where there are any."""
    return f"{Decimal(micro) / MICRO:f}"

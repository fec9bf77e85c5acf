"""The process that compiles grammars for `grammar.GrammarChecker`, so that nobody else has to.

It is started with a limit on its address space in bytes, one on the seconds that a grammar may take, and,
optionally, the path of a tokenizer.json.
It writes "ready", then for each line with a JSON string, the grammar, a line with null or a JSON string,
the reason why it cannot be used. It ends with its input. Memory beyond the limit aborts it, and so does
a grammar that takes too long, which its parent does not wait for: one that was killed cannot end it.

Knows llguidance; must not know who asks.
"""

from __future__ import annotations

import json
import resource
import signal
import sys

from llguidance import LLMatcher, LLParserLimits, LLTokenizer


def reason_against(grammar: str, tokenizer: LLTokenizer) -> str | None:
    """Why the grammar cannot be used; None where it can."""
    limits = LLParserLimits(verbose_errors=False)  # they would hold the grammar and the parser's state
    # A warning says that some constraint is not enforced: the caller would get less than was asked for.
    _, complaints = LLMatcher.validate_grammar_with_warnings(grammar, tokenizer, limits=limits)
    if complaints:
        return complaints[0]
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()  # where most of the lazy work of compiling happens
        if matcher.is_stopped() and not matcher.is_accepting():
            return "no text satisfies it"
    return matcher.get_error() if matcher.is_error() else None


def main(arguments: list[str]) -> None:
    """Answer lines until there are no more. The tokenizer defaults to one of single bytes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the server, and that ends this
    num_bytes, num_seconds = map(int, arguments[:2])
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tokenizer = LLTokenizer(arguments[2] if len(arguments) > 2 else "byte")
    answers = sys.stdout.buffer
    answers.write(b"ready\n")
    answers.flush()
    for line in sys.stdin.buffer:
        signal.alarm(num_seconds)  # without a handler it ends the process, whatever that is stuck in
        reason = reason_against(json.loads(line), tokenizer)
        signal.alarm(0)
        answers.write(json.dumps(reason).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1:])

"""Records what OpenAI's own parser makes of answers, as an oracle for the tests of ours.

    pip install openai-harmony==0.0.8
    TIKTOKEN_ENCODINGS_BASE=<folder with o200k_base.tiktoken> python tests/text/record_harmony.py

It is not run with the tests: the library fetches its vocabulary from the web unless it is told of a folder
with a copy (the file's SHA-256 begins with 446a9538). The answers are well-formed, as the library refuses
others, and some are cut off.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from openai_harmony import Role, StreamableParser, StreamState, load_harmony_encoding

VECTORS = Path(__file__).with_name("harmony_vectors.json")
HEADERS = (
    "<|channel|>analysis",
    "<|channel|>analysis",
    "<|channel|>final",
    "<|channel|>commentary",
    "<|channel|>commentary to=functions.get_weather <|constrain|>json",
    "<|channel|>commentary to=functions.get_weather<|constrain|>json",
    "<|channel|>commentary to=functions.stop-all code",
    "<|channel|>commentary to=functions.f",
    " to=functions.get_weather<|channel|>commentary json",
    " to=functions.a_1<|channel|>commentary <|constrain|>json",
    "<|channel|>analysis to=functions.f json",
    "<|channel|>analysis to=python code",
    "<|channel|>commentary to=browser.search",
    "",
)
BODIES = (
    "Yes.",
    "",
    " leading and trailing \n\n",
    '{"city": "Łódź", "days": [1, 2]}',
    "{}",
    "naïve 😀 日本語 ",
    "to=functions.f analysis final assistant",
    "a < b | c > d <| |> <|",
    "line\nline\n\n\tline",
)


def an_answer(chance: random.Random) -> str:
    """A well-formed answer, perhaps cut off."""
    messages = [
        chance.choice(HEADERS) + "<|message|>" + "".join(chance.choices(BODIES, k=chance.randint(1, 3)))
        for _ in range(chance.randint(1, 4))
    ]
    answer = "<|end|><|start|>assistant".join(messages)
    ends = ("<|return|>", "<|call|>", "<|end|>", "", "<|end|><|start|>assistant<|channel|>fin")
    return answer + chance.choice(ends)


def main() -> None:
    """Write the vectors: each an answer and its messages, [channel, recipient, text]."""
    encoding = load_harmony_encoding("HarmonyGptOss")
    chance = random.Random(5)
    vectors = []
    for _ in range(80):
        answer = an_answer(chance)
        parser = StreamableParser(encoding, Role.ASSISTANT)
        for token in encoding.encode(answer, allowed_special="all"):
            parser.process(token)
        messages = [
            [message.channel, message.recipient, "".join(part.text for part in message.content)]
            for message in parser.messages
        ]
        if parser.state == StreamState.CONTENT:
            messages.append([parser.current_channel, parser.current_recipient, parser.current_content])
        vectors.append({"answer": answer, "messages": messages})
    lines = ",\n".join(json.dumps(vector, ensure_ascii=False) for vector in vectors)
    VECTORS.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()

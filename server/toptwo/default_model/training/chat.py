"""Chat by self-distillation: the dense model answers generated questions; training holds the experts to it.

No openly licensed chat is in a package registry, and the aim is to stay as the dense model is. Held-out
questions have topics that no training question has. Must not know experts or losses.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

FORMS = (
    "What is {}?",
    "Explain {} to a child.",
    "Why is {} important?",
    "Write a short story about {}.",
    "Give me three facts about {}.",
    "How does {} work?",
    "Write a poem about {}.",
    "What should a beginner know about {}?",
    "Tell me a joke about {}.",
    "Write an email to a friend about {}.",
    "What are the advantages and disadvantages of {}?",
    "Can you recommend a book about {}?",
    "Summarise the history of {} in two sentences.",
    "I am writing a school essay on {}. How should I begin?",
    "List five words that have to do with {}.",
    "Who first had the idea of {}?",
    "What is a common mistake about {}?",
    "Describe {} in one sentence.",
)
TOPICS = """
photosynthesis, the Moon, gravity, bread, coffee, the French Revolution, chess, football, jazz, the
violin, whales, volcanoes, earthquakes, electric cars, bicycles, steam engines, computers, the internet,
programming in Python, recursion, databases, prime numbers, fractions, probability, the stock market,
inflation, democracy, elections, ancient Rome, ancient Egypt, the Silk Road, Shakespeare, haiku, oil
painting, photography, cinema, gardening, roses, oak trees, mushrooms, bees, ants, cats, dogs, horses,
elephants, penguins, dinosaurs, fossils, glaciers, rivers, the Pacific Ocean, deserts, rain, lightning,
rainbows, the Sun, Mars, black holes, galaxies, telescopes, atoms, water, salt, iron, gold, plastic,
paper, printing, libraries, schools, learning a language, memory, sleep, dreams, running, swimming, yoga,
cooking pasta, chocolate, cheese, tea, apples, honey, vaccines, the heart, the brain, bones, vitamins,
first aid, friendship, honesty, patience, job interviews, saving money, renting a flat, moving to a new
city, travelling by train, maps, compasses, sailing, aeroplanes, bridges, skyscrapers, lighthouses,
clocks, calendars, birthdays, weddings, board games, puzzles, origami, knitting, pottery
"""
HELD_OUT_TOPICS = """
the Great Wall of China, penicillin, the piano, tomatoes, owls, submarines, the Olympic Games, windmills,
snow, the human eye, public speaking, recycling, algebra, robots, castles, surfing
"""

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Turn:
    """A question with its answer; tokens of both in the chat's form, the answer's end among them."""

    question: str
    tokens: list[int]
    num_prompt: int


def questions(held_out: bool, count: int) -> list[str]:
    """The same ones every time, no form or topic much more often than another."""
    topics = (HELD_OUT_TOPICS if held_out else TOPICS).strip().replace("\n", " ").split(", ")
    every = [form.format(topic) for form, topic in itertools.product(FORMS, topics)]
    return random.Random(0).sample(every, min(count, len(every)))  # noqa: S311


def encoder(tokenizer: Tokenizer, config: dict[str, object]) -> Encode:
    """Puts a question into the model's chat form. config: what `tokenizer_config.json` has."""
    own = {
        name: value for name, value in config.items() if name.endswith("_token") or name == "chat_template"
    }
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **own)  # type: ignore[no-untyped-call]

    def encode(question: str) -> list[int]:
        prompt = words.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        return list(tokenizer.encode(prompt, add_special_tokens=False).ids)

    return encode


@torch.inference_mode()
def answer(
    model: LlamaForCausalLM, encode: Encode, asked: list[str], length: int, end: int, batch: int = 32
) -> Iterator[Turn]:
    """Sample one answer to each question at temperature 0.7, top_p 0.95; at most `length` tokens in all.

    encode: a question -> the prompt's tokens. end: the token that ends an answer.
    """
    torch.manual_seed(0)
    # Prompts of one length are a batch without padding.
    by_length = sorted(((encode(question), question) for question in asked), key=lambda pair: len(pair[0]))
    for size, group in itertools.groupby(by_length, lambda pair: len(pair[0])):
        pairs = list(group)
        for part in (pairs[start : start + batch] for start in range(0, len(pairs), batch)):
            prompts = torch.tensor([prompt for prompt, _ in part], device=model.device)
            got: torch.Tensor = model.generate(  # type: ignore[assignment, misc]
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_length=length,
                do_sample=True,
                temperature=0.7,
                top_p=0.95,
                top_k=0,
                eos_token_id=end,
                pad_token_id=end,
            )
            for tokens, (_, question) in zip(got.tolist(), part, strict=True):
                stop = tokens.index(end, size) + 1 if end in tokens[size:] else len(tokens)
                yield Turn(question, tokens[:stop], size)

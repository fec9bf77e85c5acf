"""Words out of a GGUF file: tokens as the model's own tokenizer makes them, and what is said beside it."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from gguf import TokenType
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

import fakes
from toptwo.errors import CheckpointError
from toptwo.gguf.metadata import Metadata
from toptwo.gguf.pre_tokenizers import PRE_TOKENIZERS, UNNAMED, name_of
from toptwo.gguf.tokenizer import build_tokenizer, is_guessed
from toptwo.gguf.vocabulary import generation_config, read_vocabulary, tokenizer_config
from toptwo.text.model import load_served_model

CORPUS = (Path(__file__).parents[2] / "README.md").read_text() * 2
TEXTS = [
    "",
    " ",
    "Hello world! It's 2024, isn't it?  I'LL say 12345.678 (or ½).\n\n\tdef f(x):\n        return x  \r\n",
    "naïve café — “quotes” 你好\uff0c世界 これは日本語です 안녕하세요 Привет мир! ελληνικά العربية 🦙🚀👩‍🚀",
    "e\u0301 is é, \ufb01 is fi",
    "a_b-c/d\\e @user #tag https://example.org/?q=1&r=2 $5 <|im_start|>user\nhi<|im_end|>\n",
    "   leading and trailing   ",
    "\n\n\n\n",
    "x" * 50 + " " * 20 + "!" * 20,
]
TYPES = {True: TokenType.CONTROL.value, False: TokenType.USER_DEFINED.value}


def random_texts(count: int) -> list[str]:
    rng, alphabet = random.Random(0), "aAbé 1½9'stS\n\t.,!?/你か한🦙_-()<>|im" + CORPUS[:400]
    return ["".join(rng.choices(alphabet, k=rng.randrange(1, 60))) for _ in range(count)]


def keys_of(**values: Any) -> Metadata:
    named = {f"tokenizer.{'' if key == 'chat_template' else 'ggml.'}{key}": v for key, v in values.items()}
    return Metadata(Path("a.gguf"), named).below("tokenizer")


def build(keys: Metadata, architecture: str = "llama") -> tokenizers.Tokenizer:
    return build_tokenizer(keys, read_vocabulary(keys), architecture)


def metadata_of(tokenizer: tokenizers.Tokenizer, **more: Any) -> Metadata:
    """A byte-level tokenizer as a converter writes it."""
    content = json.loads(tokenizer.to_str())
    added = {token["id"]: token["special"] for token in content["added_tokens"]}
    size = tokenizer.get_vocab_size()
    return keys_of(
        model="gpt2",
        tokens=[tokenizer.id_to_token(index) for index in range(size)] + ["[PAD7]"],
        token_type=[TYPES[added[i]] if i in added else 1 for i in range(size)] + [TokenType.UNUSED.value],
        merges=[" ".join(pair) for pair in content["model"]["merges"]],
        **more,
    )


def own_steps(pre: str) -> pre_tokenizers.PreTokenizer:
    """What the models' own tokenizers do, from an independent source where there is one."""
    if pre in GGUF_PRE_TOKENIZER_SPLITS:
        split = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[pre]), "isolated")
        return pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in ("gpt-2", "phi-2", "olmo", "mpt"):
        return plain
    assert pre in ("smollm", "starcoder", "refact")
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])


OWN = [pre for pre in PRE_TOKENIZERS if pre not in (UNNAMED, "deepseek-v3", "deepseek-llm")]


@pytest.mark.parametrize("pre", OWN)
def test_a_byte_level_vocabulary_makes_the_same_tokens(pre: str) -> None:
    own = tokenizers.Tokenizer(models.BPE(ignore_merges=PRE_TOKENIZERS[pre].whole_words))
    own.pre_tokenizer, own.decoder = own_steps(pre), decoders.ByteLevel()
    if pre in ("olmo", "mpt", "qwen2", "deepseek-r1-qwen"):
        own.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    own.train_from_iterator([CORPUS], trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet))
    own.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    own.add_tokens(["<think>", "  "])
    found = build(metadata_of(own, pre=pre, add_bos_token=False))
    for text in [*TEXTS, *random_texts(300)]:
        assert found.encode(text).ids == own.encode(text).ids, text
        assert found.decode(found.encode(text).ids) == own.decode(own.encode(text).ids)
    assert found.get_added_tokens_decoder().keys() == own.get_added_tokens_decoder().keys()
    assert "[PAD7]" not in found.get_vocab()


CUTS = {
    "deepseek-v3": "It|'s| |123|45| |你好|ab|\uff0c\n\n| | x",
    "deepseek-llm": "It|'|s| |1|2|3| |你好|ab|,|\n| x|  ",
    "gpt-4o": "DON'T| say| Hello|World|/| |123|4",
    "tekken": "DON|'T| Hello|World| |1|2",
    "llama-bpe": "don|'t| | go| |123|45|!!\n\n",
    "qwen2": "don|'t| go| |1|2|3|!",
    "gpt-2": "don|'t| go| 123| | !",
    "smollm": "go| |1|2|3|!",
    UNNAMED: "don|'|t| |123|45|!",
}


@pytest.mark.parametrize("pre", CUTS)
def test_text_is_cut_into_words(pre: str) -> None:
    """By hand, after the expressions of the models' own tokenizers; of the unnamed, after llama.cpp's."""
    words = CUTS[pre].split("|")
    text = "".join(words)
    cut = build(keys_of(model="gpt2", pre=pre, tokens=[], merges=[])).pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in cut] == words


def test_what_an_export_names_is_what_it_was() -> None:
    for pre, known in PRE_TOKENIZERS.items():
        named = name_of(known.steps, known.whole_words)
        assert named is not None
        assert (PRE_TOKENIZERS[named].steps, PRE_TOKENIZERS[named].whole_words) == (
            known.steps,
            known.whole_words,
        ), pre
    assert name_of(PRE_TOKENIZERS["llama-bpe"].steps, False) == "smaug-bpe"
    assert name_of(PRE_TOKENIZERS["gpt-4o"].steps, False) == "gpt-4o"  # there is no other
    assert name_of([{"type": "Whitespace"}], False) is None


def sentencepiece_metadata(**more: Any) -> Metadata:
    """Pieces that were learned from the corpus, the earlier the better scored, and bytes."""
    learned = tokenizers.Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    learned.train_from_iterator([CORPUS], trainers.BpeTrainer(vocab_size=800, show_progress=False))
    pieces = sorted(learned.get_vocab(), key=lambda piece: learned.token_to_id(piece))
    pieces.sort(key=lambda piece: len(piece) == 1)  # single characters last, as in a real one
    head = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    return keys_of(
        **{
            "model": "llama",
            "tokens": [*head, *pieces, "<|im_end|>"],
            "scores": [*[0.0] * 259, *(-float(rank) for rank in range(len(pieces))), -1000.0],
            "token_type": [int(kind) for kind in [*kinds, *[1] * len(pieces), TokenType.CONTROL]],
            **more,
        }
    )


def encode_by_hand(keys: Metadata, text: str) -> list[int]:
    """SentencePiece's own rule: of all neighbours that make a piece, join those that make the best one."""
    tokens, scores = keys.texts("ggml.tokens"), keys.numbers("ggml.scores")
    ids = {token: i for i, token in enumerate(tokens)}
    parts = list("\u2581" + text.replace(" ", "\u2581")) if text else []
    while True:
        joins = [
            (-scores[ids[a + b]], at) for at, (a, b) in enumerate(pairwise(parts)) if ids.get(a + b, 0) > 258
        ]
        if not joins:
            break
        _, at = min(joins)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [i for part in parts for i in ([ids[part]] if part in ids else [3 + b for b in part.encode()])]


def test_a_scored_vocabulary_makes_the_tokens_of_its_rule() -> None:
    keys = sentencepiece_metadata(add_bos_token=False)
    found = build(keys)
    plain = [text.replace("<|im_end|>", "") for text in [*TEXTS, *random_texts(300)]]
    for text in plain:
        assert found.encode(text).ids == encode_by_hand(keys, text), text
        assert found.decode(found.encode(text).ids) == text


def test_fakes_vocabulary_of_that_kind_comes_back(tmp_path: Path) -> None:
    own = fakes.byte_fallback_vocabulary()
    content = json.loads(own.to_str())
    size = own.get_vocab_size()
    ranks = {"".join(pair): -float(rank) for rank, pair in enumerate(content["model"]["merges"])}
    tokens = [own.id_to_token(index) for index in range(size)]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (size - 259)]
    scores = [ranks.get(token, -1000.0) for token in tokens]
    found = build(keys_of(model="llama", tokens=tokens, token_type=kinds, scores=scores))
    for text in TEXTS:
        assert found.encode(text, add_special_tokens=False).ids == own.encode(text).ids
        assert found.decode(found.encode(text).ids) == own.decode(own.encode(text).ids)
    assert found.encode("hello").ids[0] == 1  # llama.cpp's default: raw text begins with <s>


def test_a_prefix_space_can_be_denied() -> None:
    found = build(sentencepiece_metadata(add_space_prefix=False, add_bos_token=False))
    assert found.decode(found.encode(" the").ids) == " the"
    assert found.encode("the").tokens[0][0] != "\u2581"


def test_merges_of_the_file_are_preferred_to_scores() -> None:
    tokens = ["<unk>", "a", "b", "c", "ab", "bc"]
    kinds, scores = [2, 1, 1, 1, 1, 1], [0.0, 0, 0, 0, 1, 2]
    given = {"model": "llama", "tokens": tokens, "token_type": kinds, "scores": scores}
    given |= {"add_space_prefix": False, "bos_token_id": 99}
    assert build(keys_of(**given)).encode("abc").tokens == ["a", "bc"]
    assert build(keys_of(**given, merges=["a b", "b c"])).encode("abc").tokens == ["ab", "c"]


def test_phis_control_tokens_take_blanks_along() -> None:
    tokens = ["<unk>", "<s>", "</s>", "<|end|>", "<|endoftext|>", "\u2581", "a", "\n"]
    kinds = [2, 3, 3, 3, 3, 1, 1, 1]
    given = {"tokens": tokens, "token_type": kinds, "scores": [0.0] * 8, "add_space_prefix": False}
    keys, text = keys_of(model="llama", **given), "a<|end|>\na<|endoftext|>\na"
    assert build(keys, "phimoe").encode(text).ids == [1, 6, 3, 6, 4, 7, 6]
    assert build(keys, "llama").encode(text).ids == [1, 6, 3, 7, 6, 4, 7, 6]


def byte_level(**more: Any) -> Metadata:
    return metadata_of(fakes.byte_level_vocabulary(), **more)


def test_raw_text_begins_as_the_file_or_the_name_says() -> None:
    start = fakes.byte_level_vocabulary().token_to_id("<|im_start|>")
    for more, begins in [
        ({"pre": "gpt-2"}, False),
        ({"pre": "gpt-2", "add_bos_token": True}, True),
        ({"pre": "llama-bpe"}, True),
        ({"pre": "llama-bpe", "add_bos_token": False}, False),
    ]:
        found = build(byte_level(bos_token_id=start, **more)).encode("he").ids
        assert (found[0] == start) is begins
    assert len(build(byte_level(pre="llama-bpe")).encode("he").ids) == 1  # no bos that could be added


def test_what_ends_an_answer() -> None:
    harmony = ["a", "<|return|>", "<|call|>", "<|end|>", "<|endoftext|>", "<|start|>"]
    keys = keys_of(
        model="gpt2", tokens=harmony, token_type=[1, 3, 3, 3, 3, 3], eos_token_id=1, bos_token_id=4
    )
    assert generation_config(read_vocabulary(keys)) == {"bos_token_id": 4, "eos_token_id": [1, 2, 4]}
    phi = ["a", "<|end|>", "<|endoftext|>", "<|eot|>", "<|im_end|>"]
    keys = keys_of(model="gpt2", tokens=phi, token_type=[1, 3, 3, 3, 1], eos_token_id=2, eot_token_id=3)
    assert generation_config(read_vocabulary(keys)) == {"eos_token_id": [1, 2, 3]}
    # A number that is no token's, which converters write for none; SentencePiece's usual ones.
    keys = keys_of(model="llama", tokens=["<unk>", "<s>", "</s>"], padding_token_id=0xFFFFFFFF)
    assert generation_config(read_vocabulary(keys)) == {"bos_token_id": 1, "eos_token_id": [2]}


def test_what_chat_templates_may_name() -> None:
    keys = byte_level(pre="gpt-2", eos_token_id=0, unknown_token_id=1, chat_template="{{ eos_token }}")
    vocabulary = read_vocabulary(keys)
    config = tokenizer_config(keys, vocabulary)
    assert config["chat_template"] == "{{ eos_token }}"
    assert (config["eos_token"], config["unk_token"]) == (vocabulary.tokens[0], vocabulary.tokens[1])
    assert "bos_token" not in config
    assert "pad_token" not in config


def test_a_guess_is_known_as_one() -> None:
    assert is_guessed(keys_of(model="gpt2"))
    assert is_guessed(keys_of(model="gpt2", pre="default"))
    assert not is_guessed(keys_of(model="gpt2", pre="qwen2"))
    assert not is_guessed(keys_of(model="llama"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "t5"}, r"tokenizer\.ggml\.model 't5' is not supported; there is: gpt2, llama"),
        ({"pre": "kimi-k2"}, r"tokenizer\.ggml\.pre 'kimi-k2' is not supported; there is: gpt-2, "),
        ({"merges": ["a b", "ab"]}, r"tokenizer\.ggml\.merges has no pair of tokens at 1: 'ab'"),
        ({"merges": ["a b c"]}, r"tokenizer\.ggml\.merges has no pair of tokens at 0: 'a b c'"),
        ({"merges": ["a z"]}, r"tokenizer\.ggml\.tokens and what belongs to it make no tokenizer: .*z"),
        ({"merges": 3}, r"tokenizer\.ggml\.merges must be a list of texts, not 3"),
        ({"tokens": [1, 2]}, r"tokenizer\.ggml\.tokens must be a list of texts, not a list of 2"),
        ({"token_type": [1]}, r"tokenizer\.ggml\.token_type has 1 entries for 3 tokens"),
        ({"token_type": "x"}, r"tokenizer\.ggml\.token_type must be a list of integers, not 'x'"),
        ({"token_type": [1.5, 1.0, 1.0]}, r"tokenizer\.ggml\.token_type must be a list of integers"),
        ({"merges": ["a z\n"]}, r"tokenizer\.ggml\.tokens and what belongs to it make no tokenizer: .*"),
        ({"bos_token_id": "a"}, r"tokenizer\.ggml\.bos_token_id must be an integer, not 'a'"),
        (
            {"bos_token_id": 0, "add_bos_token": 1},
            r"tokenizer\.ggml\.add_bos_token must be true or false",
        ),
        ({"model": "llama", "merges": None}, r"tokenizer\.ggml\.scores is missing"),
        ({"model": "llama", "merges": None, "scores": [1.0]}, r"tokenizer\.ggml\.scores has 1 entries for 3"),
        ({"tokens": None}, r"tokenizer\.ggml\.tokens is missing"),
    ],
)
def test_what_makes_no_tokenizer_is_named(given: dict[str, Any], message: str) -> None:
    values = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab"], "merges": ["a b"], **given}
    keys = keys_of(**{key: value for key, value in values.items() if value is not None})
    with pytest.raises(CheckpointError, match=rf"a\.gguf: {message}") as caught:
        build(keys)
    assert "\n" not in str(caught.value)


def test_a_served_model_reads_all_of_it(tmp_path: Path) -> None:
    end = fakes.byte_level_vocabulary().token_to_id("<|im_end|>")
    keys = byte_level(pre="gpt-2", eos_token_id=end, chat_template=fakes.CHATML)
    vocabulary = read_vocabulary(keys)
    build(keys).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(keys, vocabulary)))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation_config(vocabulary)))
    model, own = load_served_model(tmp_path, "it"), fakes.served_model()
    messages = [{"role": "user", "content": "hello <|im_end|> world"}]
    assert model.encode_chat(messages) == own.encode_chat(messages)
    assert model.stop_token_ids == (end,)

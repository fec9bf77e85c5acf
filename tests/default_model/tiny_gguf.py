"""A tiny dense Llama in a GGUF file, in a wheel, with a recipe for it: the default model in miniature."""

from __future__ import annotations

import hashlib
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from rich.console import Console
from safetensors.numpy import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM

from toptwo.default_model.checkpoint import ROUTER_NAME, Upcycling
from toptwo.default_model.fetch import WheelSource
from toptwo.default_model.recipe import Recipe, prepare

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "1 2"]
TOKENS = [*SPECIALS, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"

LAYERS, HIDDEN, HEADS, KV_HEADS, FFN, EXPERTS = 3, 64, 4, 2, 96, 4

Q4_1, Q8_0 = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0

BLOCK_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class Kitchen:
    """A recipe, the wheel it wants, the model it should give, and a cache to prepare it in."""

    recipe: Recipe
    wheel: Path
    cache: Path
    dense: LlamaForCausalLM

    @property
    def target(self) -> Path:
        return self.cache / self.recipe.directory_name

    def prepare(self, wheel: Path | None) -> Path:
        return prepare(self.recipe, self.cache, wheel, Console(file=io.StringIO()))

    def leftovers(self) -> list[str]:
        """What is in the cache besides the lock, which stays: removing it would race with who waits."""
        return sorted(path.name for path in self.cache.iterdir() if not path.name.endswith(".lock"))


def random_llama() -> LlamaForCausalLM:
    """Weights on a grid that Q4_1 and Q8_0 keep, so that the GGUF holds exactly this model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.copy_(1 + 0.1 * torch.randn_like(weight))
            else:
                kind = Q8_0 if "embed" in name else Q4_1
                packed = gguf.quantize(weight.numpy(), kind)
                weight.copy_(torch.tensor(gguf.dequantize(packed, kind)))
    return model.eval()


def interleave(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k: row i of a head's halves becomes rows 2i and 2i + 1."""
    halves = weight.reshape(num_heads, 2, -1, weight.shape[1])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(weight.shape)


def write_gguf(model: LlamaForCausalLM, path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(model.config.max_position_embeddings)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token in SPECIALS else 1 for token in TOKENS])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    weights = {name: weight.detach().numpy() for name, weight in model.state_dict().items()}

    def add(name: str, weight: np.ndarray, kind: gguf.GGMLQuantizationType) -> None:
        writer.add_tensor(name, gguf.quantize(weight, kind), raw_dtype=kind)

    add("token_embd.weight", weights["model.embed_tokens.weight"], Q8_0)
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        writer.add_tensor(f"blk.{i}.attn_norm.weight", weights[layer + "input_layernorm.weight"])
        writer.add_tensor(f"blk.{i}.ffn_norm.weight", weights[layer + "post_attention_layernorm.weight"])
        for name, short in BLOCK_NAMES.items():
            weight = weights[f"{layer}{name}.weight"]
            if short in ("attn_q", "attn_k"):
                weight = interleave(weight, HEADS if short == "attn_q" else KV_HEADS)
            add(f"blk.{i}.{short}.weight", weight, Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def build_kitchen(directory: Path) -> Kitchen:
    """Write the GGUF, the wheel, the router and the card; the cache directory is there and empty."""
    dense = random_llama()
    file, wheel, member = directory / "tiny.gguf", directory / "tiny-1-py3-none-any.whl", "tiny/tiny.gguf"
    write_gguf(dense, file)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, member)
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((LAYERS, EXPERTS, HIDDEN)).astype(np.float16)
    save_file({ROUTER_NAME.format(i): rows[i] for i in range(LAYERS)}, directory / "router.safetensors")
    (directory / "card.md").write_text("# tiny\n")
    source = WheelSource(
        requirement="tiny==1",
        wheel_name=wheel.name,
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=sha256_of(wheel),
        member=member,
        member_bytes=file.stat().st_size,
        member_sha256=sha256_of(file),
    )
    upcycling = Upcycling(EXPERTS, 2, directory / "router.safetensors", directory / "card.md")
    cache = directory / "cache"
    cache.mkdir()
    return Kitchen(Recipe("tiny-moe", "7", source, upcycling, 2_000_000), wheel, cache, dense)


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

"""`toptwo model convert`: xai-org's release of Grok-1 as a checkpoint that can be served.

Knows which files the release consists of, what is in which, and hpcai-tech's names for it. How a pickle is
read is `jax_pickles`'s business.

The release is one file per parameter, `ckpt-0/tensor{index}_{shard}`, and says nowhere which is which. JAX
numbers the parameters of a model as it flattens them: in the order of their names as texts, so that
decoder_layer_10 comes before decoder_layer_2, and moe/linear_1 before moe/linear_v. That order, the sizes and
the blocks of the scales agree with what others who read the release have published; none of it was checked
here against the release itself (318 GB), so every shape is compared with what its name should have.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from toptwo.errors import CheckpointError, StartupError
from toptwo.model_commands.jax_pickles import QuantizedWeight, read_array
from toptwo.model_commands.staging import appearing, progress

FILE = re.compile(r"tensor(\d{5})_(\d{3})")
SHARD_BYTES = 4 << 30  # of a written file, and of what is kept until it is written


@dataclass(frozen=True)
class ReleaseShape:
    """Sizes and multipliers of Grok-1, as the release's run.py has them."""

    vocab_size: int = 131_072
    hidden_size: int = 6144
    ffn_size: int = 32_768
    num_layers: int = 64
    num_heads: int = 48
    num_kv_heads: int = 8
    head_dim: int = 128
    num_experts: int = 8
    attention_multiplier: float = 0.08838834764831845
    embedding_multiplier: float = 78.38367176906169
    logits_multiplier: float = 0.5773502691896257

    def config(self) -> dict[str, object]:
        """The config.json, by hpcai-tech's keys."""
        return {
            "architectures": ["Grok1ModelForCausalLM"],
            "model_type": "grok-1",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.ffn_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "num_experts": self.num_experts,
            "num_experts_per_tok": 2,
            "attn_output_multiplier": self.attention_multiplier,
            "max_attn_value": 30.0,
            "embedding_multiplier_scale": self.embedding_multiplier,
            "output_multiplier_scale": self.logits_multiplier,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


@dataclass(frozen=True)
class Parameter:
    """A parameter of the JAX model: its path, its shape there, and its name in a checkpoint.

    {e} in the name stands for an expert, and the shape's first size is their number. Projections are
    [in, out] in JAX and are turned; the embedding is not.
    """

    path: str
    shape: tuple[int, ...]
    name: str
    is_projection: bool = True


def parameters_of(shape: ReleaseShape) -> list[Parameter]:
    """All of them, in the order of the release's files."""
    hidden, ffn, experts = shape.hidden_size, shape.ffn_size, shape.num_experts
    q_width, kv_width = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    projections = {
        "moe/linear": ("moe_block.experts.{e}.linear.weight", (experts, hidden, ffn)),
        "moe/linear_1": ("moe_block.experts.{e}.linear_1.weight", (experts, ffn, hidden)),
        "moe/linear_v": ("moe_block.experts.{e}.linear_v.weight", (experts, hidden, ffn)),
        "multi_head_attention/key": ("attn.k_proj.weight", (hidden, kv_width)),
        "multi_head_attention/linear": ("attn.o_proj.weight", (q_width, hidden)),
        "multi_head_attention/query": ("attn.q_proj.weight", (hidden, q_width)),
        "multi_head_attention/value": ("attn.v_proj.weight", (hidden, kv_width)),
        "router": ("moe_block.gate.weight", (hidden, experts)),
    }
    norms = {
        "rms_norm": "pre_attn_norm.scale",
        "rms_norm_1": "post_attn_norm.scale",
        "rms_norm_2": "pre_moe_norm.scale",
        "rms_norm_3": "post_moe_norm.scale",
    }
    vocabulary = shape.vocab_size, hidden
    found = [
        Parameter(
            "language_model/in_out_embed", vocabulary, "model.embed_tokens.weight", is_projection=False
        ),
        Parameter("language_model/rms_norm", (hidden,), "model.norm.scale", is_projection=False),
    ]
    for layer in range(shape.num_layers):
        path, ours = f"transformer/decoder_layer_{layer}", f"model.layers.{layer}"
        for own, (name, size) in projections.items():
            found.append(Parameter(f"{path}/{own}", size, f"{ours}.{name}"))
        for own, name in norms.items():
            found.append(Parameter(f"{path}/{own}", (hidden,), f"{ours}.{name}", is_projection=False))
    return sorted(found, key=lambda parameter: parameter.path)


def convert(release: Path, out: Path, console: Console, shape: ReleaseShape = ReleaseShape()) -> None:
    """Write the checkpoint directory `out` from the release's directory, or from the one that holds ckpt-0.

    Raises CheckpointError for files that are not what they should be, StartupError where `out` cannot be
    written, and leaves nothing half-made.
    """
    if out.exists():
        raise StartupError(f"{out}: exists; name a directory to make")
    if not out.parent.is_dir():
        raise StartupError(f"{out.parent}: no such directory")
    inner = release / "ckpt-0"
    directory = inner if inner.is_dir() else release
    parameters = parameters_of(shape)
    files = find_files(directory, len(parameters))
    total = sum(path.stat().st_size for shards in files for path in shards)
    # Projections become bfloat16, the rest stays float32.
    needed = sum(math.prod(each.shape) * (2 if each.is_projection else 4) for each in parameters)
    with appearing(out, needed) as staged, progress(console) as bar:
        task = bar.add_task("Converting", total=total)
        staged.mkdir()
        write_checkpoint(zip(parameters, files, strict=True), staged, lambda size: bar.advance(task, size))
        (staged / "config.json").write_text(json.dumps(shape.config(), indent=2) + "\n", "utf-8")
    console.print(
        f"{out}: {len(parameters)} parameters converted; to serve them, put a tokenizer.json there",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def find_files(directory: Path, count: int) -> list[list[Path]]:
    """The shards of every parameter, by its index. Raises CheckpointError if some are missing or unknown."""
    try:
        paths = list(directory.iterdir())
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read: {error.strerror or error}") from None
    found: dict[int, dict[int, Path]] = {}
    for path in paths:
        if match := FILE.fullmatch(path.name):
            found.setdefault(int(match[1]), {})[int(match[2])] = path
    if not found:
        raise CheckpointError(
            f"{directory}: no files like tensor00000_000, which the release of Grok-1 consists of"
        )
    if extra := sorted(found.keys() - set(range(count))):
        raise CheckpointError(f"{found[extra[0]][min(found[extra[0]])]}: Grok-1 has {count} tensors only")
    num_shards = max(len(shards) for shards in found.values())
    for index in range(count):
        for shard in range(num_shards):
            if shard not in found.get(index, {}):
                raise CheckpointError(f"{directory / f'tensor{index:05d}_{shard:03d}'}: no such file")
    return [[found[index][shard] for shard in range(num_shards)] for index in range(count)]


def write_checkpoint(
    release: Iterable[tuple[Parameter, list[Path]]], out: Path, advance: Callable[[int], object]
) -> None:
    """Write safetensors files and their index; `advance` hears how many bytes of the release are done."""
    writer = _Writer(out)
    for parameter, shards in release:
        for name, tensor in convert_parameter(parameter, shards):
            writer.add(name, tensor)
        advance(sum(path.stat().st_size for path in shards))
    writer.finish()


def convert_parameter(parameter: Parameter, shards: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """Names and contiguous tensors of a parameter, its experts one by one, in the format of its scales.

    Raises CheckpointError that names the file.
    """
    whole = _joined([read_array(path) for path in shards], parameter, shards[0])
    if "{e}" not in parameter.name:
        yield parameter.name, _turned(dense(whole, shards[0]), parameter)
        return
    for expert in range(parameter.shape[0]):
        one = (
            QuantizedWeight(whole.weight[expert], whole.scales[expert])
            if isinstance(whole, QuantizedWeight)
            else whole[expert]
        )
        yield parameter.name.format(e=expert), _turned(dense(one, shards[0]), parameter)


def _turned(tensor: Tensor, parameter: Parameter) -> Tensor:
    return (tensor.T if parameter.is_projection else tensor).contiguous()


Array = Tensor | QuantizedWeight


def _joined(arrays: list[Array], parameter: Parameter, first: Path) -> Array:
    """One array of its shards, which are parts along one axis or copies.

    Which axis is in the release's partition rules; the shapes say the same.
    """
    weights = [array.weight if isinstance(array, QuantizedWeight) else array for array in arrays]
    axis = _split_axis([tuple(weight.shape) for weight in weights], parameter, first)
    scales = [array.scales for array in arrays if isinstance(array, QuantizedWeight)]
    if not scales:
        return _merge(weights, axis, first)
    if len(scales) < len(arrays):
        raise CheckpointError(f"{first}: some of its shards have scales and others have not")
    if any(each.dim() != len(parameter.shape) for each in scales):
        raise CheckpointError(f"{first}: its scales have another number of dimensions than the weights")
    return QuantizedWeight(_merge(weights, axis, first), _merge(scales, axis, first))


def _split_axis(shapes: list[tuple[int, ...]], parameter: Parameter, first: Path) -> int | None:
    """The axis along which shards are parts; None where each is the whole."""
    wanted = parameter.shape
    if all(shape == wanted for shape in shapes):
        return None
    for axis, size in enumerate(wanted):
        rest = wanted[:axis], wanted[axis + 1 :]
        lengths = [shape[axis] for shape in shapes if (shape[:axis], shape[axis + 1 :]) == rest]
        if len(lengths) == len(shapes) and sum(lengths) == size:
            return axis
    found = " and ".join(str(list(shape)) for shape in shapes)
    raise CheckpointError(f"{first}: {parameter.path} is {list(wanted)}, and the file has {found}")


def _merge(parts: list[Tensor], axis: int | None, first: Path) -> Tensor:
    if axis is not None:
        return torch.cat(parts, axis)
    if not all(torch.equal(parts[0], part) for part in parts[1:]):
        raise CheckpointError(f"{first}: its shards should be copies and are not")
    return parts[0]


def dense(array: Array, where: Path) -> Tensor:
    """A quantised weight as the product of whole numbers and scales, in the scales' format.

    A scale holds for a block: along every axis there are as many blocks of one size as there are scales.
    """
    if isinstance(array, Tensor):
        if not array.is_floating_point():
            raise CheckpointError(f"{where}: whole numbers without scales")
        return array
    weight, scales = array.weight, array.scales
    if weight.is_floating_point() or not scales.is_floating_point():
        raise CheckpointError(f"{where}: a quantised weight of {weight.dtype} and {scales.dtype}")
    counts = list(zip(scales.shape, weight.shape, strict=True))
    if any(size % count for count, size in counts):
        raise CheckpointError(
            f"{where}: scales {list(scales.shape)} do not divide weights {list(weight.shape)} into blocks"
        )
    blocks = weight.reshape([n for count, size in counts for n in (count, size // count)])
    spread = scales.reshape([n for count, _ in counts for n in (count, 1)])
    return (blocks.to(scales.dtype) * spread).view(weight.shape)


@dataclass
class _Writer:
    """Collects tensors and writes them in files of about SHARD_BYTES."""

    directory: Path
    pending: dict[str, Tensor] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    total_bytes: int = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self.pending and sum(each.nbytes for each in self.pending.values()) + tensor.nbytes > SHARD_BYTES:
            self._write()
        self.pending[name] = tensor
        self.total_bytes += tensor.nbytes

    def finish(self) -> None:
        self._write()
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": self.files}
        (self.directory / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", "utf-8"
        )

    def _write(self) -> None:
        file = f"model-{len(set(self.files.values())) + 1:05d}.safetensors"
        try:
            save_file(self.pending, self.directory / file, {"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{error}") from None  # it wraps those of the disk
        self.files |= dict.fromkeys(self.pending, file)
        self.pending = {}

"""`toptwo model convert`: a release of Grok-1 becomes a checkpoint that computes what the release says."""

from __future__ import annotations

import io
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import parity
from grok_reference import Parameters, Shape, compute_logits, config_of, named_tensors, random_parameters
from grok_release import Halves, QuantizedWeight8bit, pickled, write_release
from toptwo import cli
from toptwo.errors import CheckpointError, StartupError
from toptwo.model_commands import convert as convert_module
from toptwo.model_commands.convert import ReleaseShape, convert, parameters_of
from toptwo.models import grok1

# So many layers that their order as texts is not that of their numbers.
TINY = Shape(num_layers=12, num_experts=2, max_attention=30.0)
NUM_FILES = 12 * 12 + 2
SMALL = Shape(num_layers=1, num_experts=2)


def release_shape(shape: Shape) -> ReleaseShape:
    return ReleaseShape(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        ffn_size=shape.ffn_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        num_experts=shape.num_experts,
        attention_multiplier=shape.attention_multiplier,
        embedding_multiplier=shape.embedding_multiplier,
        logits_multiplier=shape.logits_multiplier,
    )


def run(release: Path, out: Path, shape: Shape = SMALL) -> str:
    console = Console(file=io.StringIO(), width=1000)
    convert(release, out, console, release_shape(shape))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def written(directory: Path) -> dict[str, Tensor]:
    """All tensors, by way of the index."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    tensors = {}
    for file in set(index["weight_map"].values()):
        found = load_file(directory / file)
        assert found.keys() == {name for name, place in index["weight_map"].items() if place == file}
        tensors |= found
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert {path.name for path in directory.glob("*.safetensors")} == set(index["weight_map"].values())
    return tensors


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Parameters]:
    """A release of one layer, and the parameters that it stands for."""
    directory = tmp_path_factory.mktemp("grok-1") / "ckpt-0"
    return directory, write_release(directory, random_parameters(SMALL))


@pytest.fixture
def release(quantised: tuple[Path, Parameters], tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(quantised[0], tmp_path / "ckpt-0"))


def test_the_checkpoint_computes_what_the_release_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_module, "SHARD_BYTES", 300_000)
    meant = write_release(tmp_path / "release" / "ckpt-0", random_parameters(TINY))
    assert len(list((tmp_path / "release" / "ckpt-0").iterdir())) == NUM_FILES
    out = tmp_path / "out"
    assert f"{NUM_FILES} parameters converted" in run(tmp_path / "release", out, TINY)
    assert len(list(out.glob("*.safetensors"))) > 3
    tensors = written(out)
    wanted = named_tensors(meant, "hpcai")
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(tensors[name].float(), tensor), name
    assert tensors["model.layers.11.moe_block.experts.1.linear.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.11.moe_block.gate.weight"].dtype == torch.float32
    expected = compute_logits(meant, TINY, parity.PROMPT).float()
    got = parity.prompt_logits(out, [len(parity.PROMPT)], backend="reference", max_model_len=256)
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "release"]


@pytest.mark.parametrize("split", ["model", "data"])
def test_shards_are_joined(tmp_path: Path, split: str) -> None:
    meant = write_release(tmp_path / "ckpt-0", random_parameters(SMALL), shards=2, split=split)
    run(tmp_path / "ckpt-0", tmp_path / "out")
    wanted, tensors = named_tensors(meant, "hpcai"), written(tmp_path / "out")
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(tensors[name].float(), tensor), name


def test_the_real_release_is_known() -> None:
    parameters = parameters_of(ReleaseShape())
    assert len(parameters) == 770
    paths = [parameter.path for parameter in parameters]
    layer = "transformer/decoder_layer_0"
    assert paths[:14] == [
        "language_model/in_out_embed",
        "language_model/rms_norm",
        f"{layer}/moe/linear",
        f"{layer}/moe/linear_1",
        f"{layer}/moe/linear_v",
        f"{layer}/multi_head_attention/key",
        f"{layer}/multi_head_attention/linear",
        f"{layer}/multi_head_attention/query",
        f"{layer}/multi_head_attention/value",
        f"{layer}/rms_norm",
        f"{layer}/rms_norm_1",
        f"{layer}/rms_norm_2",
        f"{layer}/rms_norm_3",
        f"{layer}/router",
    ]
    order = [path.split("_")[2].split("/")[0] for path in paths[2::12]]
    assert order[:13] == ["0", "1", *(str(layer) for layer in range(10, 20)), "2"]
    assert [parameter.shape for parameter in parameters[:6]] == [
        (131072, 6144),
        (6144,),
        (8, 6144, 32768),
        (8, 32768, 6144),
        (8, 6144, 32768),
        (6144, 1024),
    ]
    assert f"{sum(math.prod(parameter.shape) for parameter in parameters) / 1e9:.1f}" == "315.7"


def test_the_config_is_what_the_server_reads() -> None:
    config = grok1.read_config(release_shape(SMALL).config())
    hpcai = {**config_of(SMALL), "max_attn_value": 30.0, "max_position_embeddings": 8192}
    assert config == grok1.read_config(hpcai)
    real = grok1.read_config(ReleaseShape().config())
    assert (real.num_layers, real.heads.head_dim, real.num_experts, real.experts_per_token) == (64, 128, 8, 2)
    assert (real.soft_cap, real.max_position, real.norm_eps) == (30.0, 8192, 1e-5)


FILE = "tensor00002_000"  # of the experts' gates, [2, 64, 48]
WEIGHT, SCALES = np.ones((2, 64, 48), np.int8), torch.ones(2, 1, 48).bfloat16()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (
            QuantizedWeight8bit(WEIGHT[:1], Halves(SCALES[:1])),
            r"transformer/decoder_layer_0/moe/linear is \[2, 64, 48\], and the file has \[1, 64, 48\]",
        ),
        (QuantizedWeight8bit(WEIGHT, Halves(SCALES[0])), "its scales have another number of dimensions"),
        (
            QuantizedWeight8bit(WEIGHT, Halves(torch.ones(2, 3, 48).bfloat16())),
            r"scales \[3, 48\] do not divide weights \[64, 48\] into blocks",
        ),
        (QuantizedWeight8bit(WEIGHT, WEIGHT[:, :1]), "a quantised weight of torch.int8 and torch.int8"),
        (WEIGHT, "whole numbers without scales"),
        (print, "it names builtins.print, which no array needs"),
    ],
)
def test_a_wrong_file_is_named(release: Path, tmp_path: Path, value: Any, words: str) -> None:
    (release / FILE).write_bytes(pickled(value))
    with pytest.raises(CheckpointError, match=rf"{FILE}: .*{words}") as caught:
        run(release, tmp_path / "out")
    assert caught.value.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt-0"]


def test_wrong_shards_are_named(tmp_path: Path) -> None:
    directory = tmp_path / "ckpt-0"
    write_release(directory, random_parameters(SMALL), shards=2)
    (directory / "tensor00001_001").write_bytes(pickled(np.zeros(64, np.float32)))
    with pytest.raises(CheckpointError, match="tensor00001_000: its shards should be copies and are not"):
        run(directory, tmp_path / "out")
    (directory / "tensor00001_001").write_bytes((directory / "tensor00001_000").read_bytes())
    (directory / "tensor00003_001").write_bytes(pickled(np.zeros((2, 24, 64), np.float32)))
    with pytest.raises(CheckpointError, match="tensor00003_000: some of its shards have scales"):
        run(directory, tmp_path / "out")
    (directory / "tensor00003_001").unlink()
    with pytest.raises(CheckpointError, match="tensor00003_001: no such file"):
        run(directory, tmp_path / "out")


def test_missing_and_unknown_files_are_named(release: Path, tmp_path: Path) -> None:
    (release / FILE).rename(tmp_path / FILE)
    with pytest.raises(CheckpointError, match=f"{FILE}: no such file"):
        run(release, tmp_path / "out")
    (tmp_path / FILE).rename(release / FILE)
    (release / "tensor00014_000").write_bytes(b"")
    with pytest.raises(CheckpointError, match="tensor00014_000: Grok-1 has 14 tensors only"):
        run(release, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty: no files like tensor00000_000"):
        run(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(CheckpointError, match="nowhere: cannot be read: No such file"):
        run(tmp_path / "nowhere", tmp_path / "out")
    (release / FILE).unlink()
    (release / FILE).mkdir()
    (release / "tensor00014_000").unlink()
    with pytest.raises(CheckpointError, match=f"{FILE}: cannot be read: Is a directory"):
        run(release, tmp_path / "out")


def test_a_place_that_cannot_be_written_is_named(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StartupError, match="exists; name a directory to make"):
        run(release, tmp_path)
    with pytest.raises(StartupError, match="nowhere: no such directory"):
        run(release, tmp_path / "nowhere" / "out")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(StartupError, match=r"out: needs 0\.0 GB of free disk"):
            run(release, tmp_path / "out")

    def fill_disk(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(convert_module, "save_file", fill_disk)
    with pytest.raises(StartupError, match=r"out: could not be written: .*No space left on device") as caught:
        run(release, tmp_path / "out")
    assert caught.value.exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt-0"]


def test_the_command_ends_with_one_line_and_status_2_for_a_bad_release(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which a tiny one is to the command: it has 14 files."""
    monkeypatch.setattr(sys, "argv", ["toptwo", "model", "convert", str(release), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"toptwo: {release / 'tensor00014_000'}: no such file\n"

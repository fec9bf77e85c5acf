"""What `toptwo model inspect` finds, that it reads headers alone, and that it fails as serving does."""

from __future__ import annotations

import io
import json
import resource
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import llama_cpp
import quantized
from published import GPT_OSS_20B, MIXTRAL_8X7B
from tampering import edit_config, replaced, rewrite, without
from tiny import FAMILIES, write_mixtral
from toptwo import cli
from toptwo.default_model import cache
from toptwo.default_model.recipe import SMOL_MOE
from toptwo.errors import CheckpointError, StartupError
from toptwo.gguf.directory import write_model_directory
from toptwo.model_commands import inspect_source
from toptwo.model_commands.inspect import InspectOptions, inspect
from toptwo.models.registry import parse_config
from toptwo.runtime.build import build_runtime
from toptwo.runtime.checkpoints import gguf as gguf_checkpoint
from toptwo.runtime.checkpoints.open import open_checkpoint
from toptwo.settings import Settings

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def report_of(model: Path | str | None, **options: Any) -> dict[str, Any]:
    text = io.StringIO()
    name = None if model is None else str(model)
    inspect(InspectOptions(name, as_json=True, **{"bandwidth": 1.0, **options}), Console(file=text))
    parsed: dict[str, Any] = json.loads(text.getvalue())
    return parsed


def refused(model: Path | str | None, **options: Any) -> str:
    with pytest.raises(StartupError) as caught:
        report_of(model, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    directory = tmp_path / "tiny-moe"
    write_mixtral(directory)
    return directory


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Not enough address space to map the data of what is inspected, let alone to hold it."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def tensors_of(raw: dict[str, Any], source: int = 0) -> Iterator[tuple[str, list[int]]]:
    """Names and shapes of what a checkpoint of such a config holds; of several ways to write them, one."""
    architecture, config = parse_config(raw, Path("config.json"))
    for spec in architecture.weight_map(config):
        whole = torch.empty(spec.shape, device="meta")
        for piece in spec.sources[min(source, len(spec.sources) - 1)]:
            yield piece.name, list(whole[piece.into].shape)


def test_a_checkpoint_larger_than_memory_is_read_by_its_header(tmp_path: Path, little_memory: None) -> None:
    """93 GB with a hole in place of the numbers."""
    header, end = {}, 0
    for name, shape in tensors_of(MIXTRAL_8X7B):
        start, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (tmp_path / SINGLE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL_8X7B))
    report = report_of(tmp_path)
    assert report["stored"]["bytes"] == 8 + len(text) + end > 93e9
    assert report["stored"]["bytes_by_format"] == {"BF16": 2 * report["model"]["parameters"]}
    with open_checkpoint(tmp_path, ()) as checkpoint, pytest.raises(CheckpointError, match="memory"):
        checkpoint.tensor("lm_head.weight")


def test_a_gguf_larger_than_memory_is_read_by_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_checkpoint, "_map", lambda path: pytest.fail(f"{path} was mapped"))
    raw = {**MIXTRAL_8X7B, "head_dim": 128}
    path = tmp_path / "hollow.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    llama_cpp.add_parameters(writer, raw, llama_cpp.Options())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, raw["num_hidden_layers"])
    sizes = []
    for name, shape in tensors_of(raw, source=1):
        stored = names.get_name(name, (".weight",))
        assert stored
        sizes.append(2 * prod(shape))
        writer.add_tensor_info(stored, shape, np.dtype(np.float16), sizes[-1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(header - header % -32 + sum(size - size % -32 for size in sizes))
    report = report_of(path)
    assert report["name"] == "hollow"
    assert report["stored"]["bytes_by_format"] == {"F16": sum(sizes)}
    assert sum(sizes) == 2 * report["model"]["parameters"] > 93e9


def test_numbers_that_mean_nothing_change_nothing(mixtral: Path) -> None:
    expected = report_of(mixtral)
    rewrite(mixtral, lambda tensors: {name: x.fill_(float("nan")) for name, x in tensors.items()})
    found = report_of(mixtral)
    for report in (found, expected):  # what is free changes all the time
        del report["machine"]
    assert found == expected


def test_a_config_alone_is_enough(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GPT_OSS_20B))
    assert report_of(tmp_path)["stored"] == {
        "kind": None,
        "quantization": "mxfp4",
        "files": 0,
        "missing_files": 0,
        "bytes": 0,
        "bytes_by_format": {},
    }


def split(directory: Path) -> list[Path]:
    """The checkpoint in three files with an index."""
    tensors = load_file(directory / SINGLE)
    names, file_of = sorted(tensors), {}
    for part in range(3):
        file = f"model-{part + 1:05}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[part::3]}, directory / file)
        file_of |= dict.fromkeys(names[part::3], file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
    (directory / SINGLE).unlink()
    return [directory / file for file in sorted(set(file_of.values()))]


def test_files_that_are_not_there_yet_are_counted(mixtral: Path) -> None:
    whole = report_of(mixtral)
    paths = split(mixtral)
    complete = report_of(mixtral)
    assert (complete["stored"]["files"], complete["stored"]["missing_files"]) == (3, 0)
    assert complete["stored"]["bytes_by_format"] == whole["stored"]["bytes_by_format"]
    size = paths[1].stat().st_size
    paths[0].unlink()
    paths[2].unlink()
    partly = report_of(mixtral)
    assert partly["model"] == whole["model"]
    assert [partly["stored"][key] for key in ("files", "missing_files", "bytes")] == [1, 2, size]
    shown = io.StringIO()
    inspect(InspectOptions(str(mixtral), bandwidth=1.0), Console(file=shown, width=200))
    assert "safetensors, 1 of 3 files, the others are missing" in shown.getvalue()
    paths[1].unlink()
    shown = io.StringIO()
    inspect(InspectOptions(str(mixtral), bandwidth=1.0), Console(file=shown, width=200))
    assert "no weight files (3 are listed)" in shown.getvalue()
    # What is there is checked all the same.
    paths[0].write_bytes(b"\x01")
    assert refused(mixtral).startswith(f"{paths[0]}: 1 bytes are too few")


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "gpt_oss", "granitemoe", "qwen3"])
def test_a_gguf_file_is_the_same_model(tmp_path: Path, family: str) -> None:
    FAMILIES[family].write(tmp_path)
    expected = report_of(tmp_path)
    (tmp_path / "files").mkdir()
    path = tmp_path / "files" / "a-moe.gguf"
    llama_cpp.write_gguf(tmp_path, path)
    for place in (path, path.parent):  # by its name, or as the only one there
        report = report_of(place)
        assert (report["name"], report["model"]) == ("a-moe", expected["model"])
        assert report["stored"]["kind"] == "gguf"
        assert report["stored"]["bytes"] == path.stat().st_size
        assert report["stored"]["bytes_by_format"] == {"F32": 4 * report["model"]["parameters"]}
    assert list(path.parent.iterdir()) == [path]


def test_a_split_gguf_file_is_one_model(mixtral: Path, tmp_path: Path) -> None:
    llama_cpp.write_gguf(mixtral, tmp_path / "x.gguf", llama_cpp.Options(split_max_tensors=10))
    parts = sorted(tmp_path.glob("x-*.gguf"))
    report = report_of(parts[1])
    assert (report["name"], report["stored"]["files"]) == ("x", len(parts))
    assert report["model"] == report_of(mixtral)["model"]
    parts[0].unlink()
    assert refused(parts[1]).startswith(f"{parts[0]}: not there")


def test_a_directory_made_of_a_gguf_file_can_be_inspected(mixtral: Path, tmp_path: Path) -> None:
    llama_cpp.write_gguf(mixtral, tmp_path / "x.gguf")
    (prepared := tmp_path / "prepared").mkdir()
    write_model_directory([tmp_path / "x.gguf"], prepared)
    report = report_of(prepared)
    assert report["model"] == report_of(mixtral)["model"]
    assert (report["stored"]["kind"], report["stored"]["files"]) == ("gguf", 1)


def test_quantised_weights_are_told_as_they_are_stored(tmp_path: Path) -> None:
    FAMILIES["gpt_oss"].write(tmp_path)
    plain = report_of(tmp_path)
    edit_config(tmp_path, quantization_config=quantized.MXFP4)

    def pack(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        packed = {}
        for name, tensor in tensors.items():
            if not name.endswith("experts.gate_up_proj"):
                packed[name] = tensor
                continue
            experts, inputs, rows = tensor.shape
            packed[f"{name}_blocks"] = torch.zeros(experts, rows, inputs // 32, 16, dtype=torch.uint8)
            packed[f"{name}_scales"] = torch.zeros(experts, rows, inputs // 32, dtype=torch.uint8)
        return packed

    rewrite(tmp_path, pack)
    report = report_of(tmp_path)
    assert report["model"] == plain["model"]
    assert report["stored"]["quantization"] == "mxfp4"
    numbers = 3 * 6 * 96 * 64  # gates and ups of six experts in three layers
    assert report["stored"]["bytes_by_format"] == {
        "F32": 4 * (plain["model"]["parameters"] - numbers),
        "U8": numbers * 17 // 32,
    }


def test_without_a_model_the_default_one_is_inspected_if_it_is_there(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOPTWO_CACHE_DIR", str(tmp_path))
    target = tmp_path / SMOL_MOE.directory_name
    assert refused(None) == f"the default model {SMOL_MOE.name} is not in {target}; serve prepares it"
    assert not target.exists()
    cache.publish(mixtral, target)
    report = report_of(None)
    assert (report["name"], report["model"]["experts"]) == (SMOL_MOE.name, 4)


def test_a_hub_id_is_looked_for_among_the_downloads(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    assert "not among this machine's downloads from the hub" in refused("org/tiny")
    downloaded, revision = hub / "models--org--tiny", "1" * 40
    (downloaded / "refs").mkdir(parents=True)
    (downloaded / "refs" / "main").write_text(revision)
    shutil.copytree(mixtral, downloaded / "snapshots" / revision)
    report = report_of("org/tiny")
    assert (report["name"], report["stored"]["files"]) == ("org/tiny", 1)
    (downloaded / "snapshots" / revision / SINGLE).unlink()
    assert report_of("org/tiny")["stored"]["files"] == 0
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'toptwo[hub]'" in refused("org/tiny")


@pytest.mark.parametrize("name", ["/no/such", "a/b/c", "name", "~nobody-of-that-name/x"])
def test_what_is_nowhere_is_said_to_be(name: str) -> None:
    expected = f"MODEL {name!r}: no such directory, and not a hub id like org/name"
    assert refused(name) == expected
    assert refused(f"{name}.gguf") == f"MODEL {f'{name}.gguf'!r}: no such file"


def test_a_directory_of_several_gguf_models_is_refused(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    assert refused(tmp_path) == f"{tmp_path}: holds several models, name one of them: a.gguf, b.gguf"


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def cut_short(directory: Path) -> None:
    path = directory / SINGLE
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)


def no_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def pickled(directory: Path) -> None:
    (directory / SINGLE).rename(directory / "pytorch_model.bin")


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut short": (cut_short, "lm_head.weight|model.norm.weight|ends at byte"),
    "no config": (no_config, "config.json: not found"),
    "pickled": (pickled, "pickled weights are refused"),
    "missing": (lambda d: rewrite(d, without(Q_PROJ)), f"misses {Q_PROJ}"),
    "unknown": (lambda d: rewrite(d, replaced("a.weight", torch.ones(2))), "has unknown a.weight"),
    "misshapen": (lambda d: rewrite(d, replaced(Q_PROJ, torch.ones(2, 2))), f"{Q_PROJ} has shape"),
    "wrong kind": (lambda d: rewrite(d, replaced(Q_PROJ, torch.ones(64, 64).long())), f"{Q_PROJ} is I64"),
    "another type": (lambda d: edit_config(d, model_type="bert"), "model_type 'bert' is not supported"),
    "not a number": (lambda d: edit_config(d, hidden_size="64"), "hidden_size must be an integer"),
    "unknown format": (lambda d: edit_config(d, quantization_config={"quant_method": "x"}), "quant_method"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_fails_as_when_it_is_served(mixtral: Path, damage: str) -> None:
    change, expected = DAMAGES[damage]
    change(mixtral)
    found = refused(mixtral)
    assert any(part in found for part in expected.split("|")), found
    with pytest.raises(CheckpointError) as served:
        build_runtime(Settings(model=str(mixtral), threads=1), mixtral)
    assert found == str(served.value)


def test_a_damaged_gguf_file_is_named(mixtral: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    llama_cpp.write_gguf(mixtral, path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)
    assert refused(path).startswith(f"{path}: ")
    path.write_bytes(b"GGUF")
    assert refused(path).startswith(f"{path}: the file ends within the version")


def run(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["toptwo", "model", "inspect", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    code = ended.value.code
    assert isinstance(code, int)
    return code


def test_the_exit_code_says_whose_fault_it_is(
    mixtral: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([str(mixtral), "--json", "--bandwidth", "1"], monkeypatch) == 0
    capsys.readouterr()
    assert run(["/no/such", "--json"], monkeypatch) == 1
    cut_short(mixtral)
    assert run([str(mixtral), "--json"], monkeypatch) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert [line.split(":")[0] for line in shown.err.splitlines()] == ["toptwo", "toptwo"]


def test_options_that_mean_nothing_are_refused(mixtral: Path) -> None:
    for bandwidth in (0.0, -1.0, float("nan"), float("inf")):
        assert refused(mixtral, bandwidth=bandwidth).startswith("--bandwidth ")
    for context in (0, 513):
        assert refused(mixtral, context=context) == f"--context {context}: the model has 1 to 512 positions"
    assert report_of(mixtral, context=512)["speed_context_tokens"] == 512
    assert report_of(mixtral)["speed_context_tokens"] == 512


def test_nothing_is_written(mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOPTWO_CACHE_DIR", str(tmp_path / "cache"))
    before = {path: path.stat().st_mtime_ns for path in mixtral.iterdir()}
    report_of(mixtral)
    assert {path: path.stat().st_mtime_ns for path in mixtral.iterdir()} == before
    assert not (tmp_path / "cache").exists()
    assert inspect_source.find_subject(Settings(model=str(mixtral))).name == "tiny-moe"

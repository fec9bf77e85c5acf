"""`toptwo model inspect`: figures that are published or counted in another way, and how they are shown."""

from __future__ import annotations

import io
import json
import re
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from typer.testing import CliRunner

from published import DBRX, DEEPSEEK_V2_LITE, GPT_OSS_20B, MIXTRAL_8X7B, QWEN3_30B_A3B
from tiny import FAMILIES, write_mixtral
from toptwo import cli
from toptwo.model_commands import inspect_machine
from toptwo.model_commands.inspect import InspectOptions, inspect
from toptwo_kernels.cuda import support

GIB = 1 << 30

WITH, WITHOUT = "active_parameters", "active_parameters_without_input_embedding"
# Billions of parameters, in all and active, as published, and whether those active are with the embedding.
PUBLISHED: dict[str, tuple[dict[str, Any], float, float, str]] = {
    "Mixtral-8x7B": (MIXTRAL_8X7B, 46.7, 12.9, WITH),
    "DBRX": (DBRX, 132, 36, WITH),
    "gpt-oss-20b": (GPT_OSS_20B, 20.91, 3.61, WITHOUT),
    "DeepSeek-V2-Lite": (DEEPSEEK_V2_LITE, 15.7, 2.4, WITHOUT),
    "Qwen3-30B-A3B": (QWEN3_30B_A3B, 30.5, 3.3, WITH),
}
EXACT = {  # counted by hand from the tensors' shapes
    "Mixtral-8x7B": (46_702_792_704, 12_879_925_248, 12_748_853_248),
    "DBRX": (131_596_523_520, 36_469_708_800, 35_853_146_112),
    "gpt-oss-20b": (20_914_757_184, 4_187_440_704, 3_608_307_264),
    "DeepSeek-V2-Lite": (15_706_484_224, 2_661_150_208, 2_451_435_008),
    "Qwen3-30B-A3B": (30_532_122_624, 3_353_032_704, 3_041_867_776),
}


def report_of(model: Path | str | None, **options: Any) -> dict[str, Any]:
    """What is printed as JSON; nothing is measured."""
    name = None if model is None else str(model)
    text = io.StringIO()
    given = InspectOptions(name, as_json=True, **{"bandwidth": 100.0, **options})
    inspect(given, Console(file=text, width=40))
    parsed: dict[str, Any] = json.loads(text.getvalue())
    return parsed


def text_of(model: Path, **options: Any) -> str:
    """What a person reads where no terminal is."""
    text = io.StringIO()
    inspect(InspectOptions(str(model), **{"bandwidth": 100.0, **options}), Console(file=text, width=80))
    return text.getvalue()


def write_config(directory: Path, raw: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    directory = tmp_path / "tiny-moe"
    write_mixtral(directory)
    return directory


@pytest.fixture
def no_vram(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_published(tmp_path: Path, name: str) -> None:
    raw, total, active, convention = PUBLISHED[name]
    model = report_of(write_config(tmp_path, raw))["model"]
    assert (model["parameters"], model[WITH], model[WITHOUT]) == EXACT[name]
    digits = 0.5 if name == "DBRX" else 0.06
    assert model["parameters"] / 1e9 == pytest.approx(total, abs=digits)
    assert model[convention] / 1e9 == pytest.approx(active, abs=digits)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (MIXTRAL_8X7B, ("mixtral", 32, 32, 4096, 8, 2, 14336, None, None, 32768)),
        (DBRX, ("dbrx", 40, 40, 6144, 16, 4, 10752, None, None, 32768)),
        (GPT_OSS_20B, ("gpt_oss", 24, 24, 2880, 32, 4, 2880, None, None, 131072)),
        (DEEPSEEK_V2_LITE, ("deepseek_v2", 27, 26, 2048, 64, 6, 1408, 2816, 10944, 163840)),
        (QWEN3_30B_A3B, ("qwen3_moe", 48, 48, 2048, 128, 8, 768, None, None, 40960)),
    ],
    ids=PUBLISHED,
)
def test_shapes_are_those_published(tmp_path: Path, raw: dict[str, Any], expected: tuple[Any, ...]) -> None:
    model = report_of(write_config(tmp_path, raw))["model"]
    keys = "architecture", "layers", "expert_layers", "hidden_size", "experts", "experts_per_token"
    widths = "expert_ffn_size", "shared_expert_ffn_size", "dense_ffn_size"
    assert tuple(model[key] for key in (*keys, *widths, "context_tokens")) == expected


# Experts, those of a token, and the widths of an expert, of all shared ones, and of dense layers.
TINY: dict[str, tuple[int, int, int | None, int | None, int | None]] = {
    "dbrx": (6, 3, 48, None, None),
    "deepseek_v2": (8, 3, 40, 80, 96),
    "deepseek_v3": (8, 3, 40, 40, 96),
    "gpt_oss": (6, 3, 48, None, None),
    "granitemoe": (6, 3, 48, None, None),
    "grok1": (5, 2, 48, None, None),
    "llama": (1, 1, None, None, 96),
    "mixtral": (4, 2, 96, None, None),
    "olmoe": (8, 3, 64, None, None),
    "phimoe": (6, 2, 48, None, None),
    "qwen2_moe": (6, 2, 32, 64, 96),
    "qwen3": (1, 1, None, None, 96),
    "qwen3_moe": (8, 3, 32, None, 96),
}
EXPERT_TENSOR = re.compile(r"\.experts\.|\.(input|output)_linear\.")


def stored_numbers(directory: Path) -> dict[str, int]:
    with safe_open(directory / "model.safetensors", "pt") as file:
        return {name: prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_counted_tensor_by_tensor(tmp_path: Path, family: str) -> None:
    FAMILIES[family].write(tmp_path)
    numbers = stored_numbers(tmp_path)
    experts, chosen, *widths = TINY[family]
    report = report_of(tmp_path)
    model, total = report["model"], sum(numbers.values())
    idle = sum(size for name, size in numbers.items() if EXPERT_TENSOR.search(name))
    assert (idle > 0) is (experts > 1)
    assert model["parameters"] == total
    assert model[WITH] == total - idle * (experts - chosen) // experts
    heads = [name for name in numbers if name.startswith("lm_head.weight")]
    assert model[WITH] - model[WITHOUT] == (numbers[heads[0]] if heads else 0)
    found = [model[f"{kind}_ffn_size"] for kind in ("expert", "shared_expert", "dense")]
    assert (model["experts"], model["experts_per_token"], found) == (experts, chosen, widths)
    assert report["stored"]["bytes_by_format"] == {"F32": 4 * total}
    assert report["stored"]["bytes"] == (tmp_path / "model.safetensors").stat().st_size
    assert report["formats"]["float32"]["weight_bytes"] == 4 * total
    assert report["serve"]["context_tokens"] == model["context_tokens"] == 512


def test_a_mixture_all_of_whose_layers_are_dense_has_one_expert(tmp_path: Path) -> None:
    FAMILIES["deepseek_v2"].write(tmp_path, first_k_dense_replace=3)
    model = report_of(tmp_path)["model"]
    assert (model["expert_layers"], model["experts"], model["experts_per_token"]) == (0, 1, 1)
    assert model[WITH] == model["parameters"]


def test_bytes_and_speeds_are_those_of_the_roofline(tmp_path: Path, no_vram: None) -> None:
    report = report_of(write_config(tmp_path, MIXTRAL_8X7B), bandwidth=50.0, context=1000)
    kv = 2 * 8 * 128 * 32  # numbers per token
    assert report["kv_cache"] == {
        "float16": {"bytes_per_token": 2 * kv, "bytes_of_full_context": 2 * kv * 32768},
        "float32": {"bytes_per_token": 4 * kv, "bytes_of_full_context": 4 * kv * 32768},
    }
    exact = 32 * 8 * 4096 + 65 * 4096  # routers and norms stay float32
    total, _, read = EXACT["Mixtral-8x7B"]
    head, vocabularies = 32000 * 4096, 2 * 32000 * 4096
    weights = {
        "float32": 4 * total,
        "bfloat16": 2 * (total - exact) + 4 * exact,
        "int8": 8.5 / 8 * (total - exact) + 4 * exact,
        "int4": 4.75 / 8 * (total - exact - vocabularies) + 8.5 / 8 * vocabularies + 4 * exact,
    }
    reads = {
        "float32": 4 * read + 4 * kv * 1000,
        "bfloat16": 2 * (read - exact) + 4 * exact + 2 * kv * 1000,
        "int8": 8.5 / 8 * (read - exact) + 4 * exact + 2 * kv * 1000,
        "int4": 4.75 / 8 * (read - exact - head) + 8.5 / 8 * head + 4 * exact + 2 * kv * 1000,
    }
    assert report["speed_context_tokens"] == 1000
    for name, cost in report["formats"].items():
        assert cost["weight_bytes"] == pytest.approx(weights[name], abs=1)
        assert cost["read_bytes_per_token"] == pytest.approx(reads[name], abs=1)
        assert cost["tokens_per_second"] == pytest.approx(50e9 / reads[name])
        assert cost["max_context_tokens_in_vram"] is None


def test_what_fits_is_what_serve_would_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_config(tmp_path, MIXTRAL_8X7B)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (200 * GIB, 200 * GIB))
    monkeypatch.setattr(support, "problem", lambda: "")
    monkeypatch.setattr(inspect_machine, "available_memory", lambda: 52 * GIB)
    report = report_of(directory)
    assert report["machine"]["vram_bytes"] == 200 * GIB
    contexts = {name: cost["max_context_tokens_in_memory"] for name, cost in report["formats"].items()}
    rest = 52 * GIB - report["formats"]["int8"]["weight_bytes"]
    assert contexts == {
        "float32": None,
        "bfloat16": None,
        "int8": int(rest * 0.4) // (16 * 131072) * 16,
        "int4": 32768,
    }
    assert report["formats"]["float32"]["max_context_tokens_in_vram"] == 32768
    serve = report["serve"]
    assert report["serve_problem"] is None
    assert (serve["quantization"], serve["kv_dtype"], serve["backend"]) == ("int8", "float16", "cpu")
    assert serve["context_tokens"] == contexts["int8"] < 32768
    assert f"context {contexts['int8']:,}" in " ".join(text_of(directory).split())
    assert "VRAM 214.75 GB" in text_of(directory)
    monkeypatch.setattr(inspect_machine, "available_memory", lambda: 8 * GIB)
    report = report_of(directory)
    assert report["serve"] is None
    assert "the weights need 46.2 GiB as int8 and 8.0 GiB of memory are available" in report["serve_problem"]
    assert "cannot: the weights need 46.2 GiB as int8" in " ".join(text_of(directory).split())
    assert "does not fit" in text_of(directory)
    monkeypatch.setenv("TOPTWO_DEVICE", "cuda")
    serve = report_of(directory)["serve"]
    assert (serve["device"], serve["quantization"], serve["dtype"]) == ("cuda", "none", "bfloat16")
    assert serve["context_tokens"] == 32768


def test_settings_in_the_environment_count_for_serve_alone(
    mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = report_of(mixtral)["formats"]
    monkeypatch.setenv("TOPTWO_QUANTIZATION", "int4")
    monkeypatch.setenv("TOPTWO_MAX_MODEL_LEN", "64")
    report = report_of(mixtral)
    assert (report["serve"]["quantization"], report["serve"]["context_tokens"]) == ("int4", 64)
    assert report["formats"] == expected
    monkeypatch.setenv("TOPTWO_MAX_MODEL_LEN", "513")
    assert report_of(mixtral)["serve_problem"] == "--max-model-len 513 is over the model's 512 positions"


CACHE = {"bytes_per_token", "bytes_of_full_context"}
FORMAT = {
    "weight_bytes",
    "read_bytes_per_token",
    "max_context_tokens_in_memory",
    "max_context_tokens_in_vram",
    "tokens_per_second",
}
SCHEMA: dict[str, Any] = {
    "name": str,
    "model": {
        *("architecture", "layers", "expert_layers", "hidden_size", "vocab_size", "context_tokens"),
        *("experts", "experts_per_token", "expert_ffn_size", "shared_expert_ffn_size", "dense_ffn_size"),
        *("parameters", WITH, WITHOUT),
    },
    "stored": {"kind", "quantization", "files", "missing_files", "bytes", "bytes_by_format"},
    "kv_cache": {"float16": CACHE, "float32": CACHE},
    "speed_context_tokens": int,
    "formats": {"float32": FORMAT, "bfloat16": FORMAT, "int8": FORMAT, "int4": FORMAT},
    "machine": {
        *("memory_bytes", "vram_bytes", "threads"),
        *("read_bandwidth_bytes_per_second", "bandwidth_is_measured"),
    },
    "serve": {
        *("device", "quantization", "dtype", "kv_dtype", "backend"),
        *("context_tokens", "weight_bytes", "kv_cache_bytes"),
    },
    "serve_problem": type(None),
}


def check_schema(found: Any, schema: Any) -> None:
    if isinstance(schema, set):
        assert found.keys() == schema
    elif isinstance(schema, dict):
        assert found.keys() == schema.keys()
        for key, below in schema.items():
            check_schema(found[key], below)
    else:
        assert type(found) is schema


def test_json_is_all_that_is_printed_and_keeps_its_keys(
    mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A fall-back is logged; it must not come between.
    monkeypatch.setattr("toptwo.runtime.device.cpu.instruction_sets", list)
    result = CliRunner().invoke(cli.cli, ["model", "inspect", str(mixtral), "--json", "--bandwidth", "10"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert result.stderr == ""
    check_schema(report, SCHEMA)
    assert report["serve"]["backend"] == "reference"


@pytest.mark.parametrize("vram", [None, 30 * GIB])
def test_a_person_reads_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vram: int | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: vram is not None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (vram, 80 * GIB))
    monkeypatch.setattr(support, "problem", lambda: "no kernel is run here")
    shown = text_of(write_config(tmp_path / "V2 [Lite]", DEEPSEEK_V2_LITE), context=100)
    assert "\x1b" not in shown
    lines = shown.splitlines()
    assert lines[0] == "V2 [Lite]"
    assert max(len(line) for line in lines) <= 80
    table = [line.rstrip() for line in lines if re.match(r"  (format|float32|bfloat16|int8|int4) ", line)]
    assert len(table) == 5
    assert len({len(line) for line in table}) == 1, "columns are not aligned"
    assert "…" not in shown
    assert ("in VRAM" in shown) is (vram is not None)
    words = " ".join(shown.split())
    for part in (
        "deepseek_v2, 27 layers (26 of them with experts), hidden size 2,048",
        "6 of 64 per token, each 1,408 wide; shared by every token: 2,816, as wide as 2",
        "as wide as 2; dense layers: 10,944",
        "15.71 B, 2.66 B active per token (2.45 B without the input embedding)",
        "163,840 tokens",
        "no weight files",
        "31.10 kB per token, 5.10 GB for all",
        "100.0 GB/s, as given",
        "of one stream, 100 tokens into its context",
    ):
        assert part in words, part


def test_a_dense_model_is_one_expert_of_one(tmp_path: Path) -> None:
    FAMILIES["llama"].write(tmp_path)
    assert "1 of 1: a dense model; dense layers: 96" in " ".join(text_of(tmp_path).split())


def test_bandwidth_is_measured_with_the_threads_of_the_model(
    mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspect_machine, "PROBE_BYTES", 8 << 20)
    monkeypatch.setenv("TOPTWO_THREADS", "2")
    report = report_of(mixtral, bandwidth=None)
    machine, cost = report["machine"], report["formats"]["int8"]
    assert machine["bandwidth_is_measured"] is True
    assert machine["threads"] == 2
    assert 1e8 < machine["read_bandwidth_bytes_per_second"] < 1e13
    speed = machine["read_bandwidth_bytes_per_second"] / cost["read_bytes_per_token"]
    assert cost["tokens_per_second"] == pytest.approx(speed)
    assert "GB/s, measured with 2 threads" in text_of(mixtral, bandwidth=None)


def test_without_the_native_kernels_bandwidth_is_unmeasured(
    mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspect_machine.native, "instruction_sets", list)
    report = report_of(mixtral, bandwidth=None)
    assert report["machine"]["read_bandwidth_bytes_per_second"] is None
    assert report["machine"]["bandwidth_is_measured"] is False
    assert {cost["tokens_per_second"] for cost in report["formats"].values()} == {None}
    assert text_of(mixtral, bandwidth=None).count("unmeasured") == 5

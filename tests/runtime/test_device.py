"""How `auto` settings become a frozen config, and what is refused on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from toptwo.errors import StartupError
from toptwo.models.mixtral import MixtralConfig, read_config, weight_map
from toptwo.runtime.device import GIB, resolve
from toptwo.runtime.kv_cache import kv_bytes_per_token
from toptwo.runtime.memory import available_memory
from toptwo.settings import Settings
from toptwo_kernels import cpu

SHAPE: dict[str, object] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
}
MIXTRAL: MixtralConfig = read_config(SHAPE)
SPECS = weight_map(MIXTRAL)  # 46.7 billion weights


def test_kv_bytes_per_token() -> None:
    assert kv_bytes_per_token(MIXTRAL, torch.bfloat16) == 128 * 1024


def test_defaults_take_the_whole_context_and_a_share_of_memory() -> None:
    config = resolve(Settings(), MIXTRAL, SPECS, memory=120 * GIB)
    assert (config.device, config.backend) == ("cpu", "cpu")
    assert (config.dtype, config.quantization, config.kv_dtype) == ("float32", "int8", torch.float16)
    assert config.max_model_len == 32768
    assert config.kv_cache_bytes == pytest.approx(0.4 * (120 * GIB - config.weight_bytes), rel=1e-3)
    assert config.num_threads >= 1


@pytest.mark.parametrize(
    ("settings", "backend", "quantization", "kv_dtype"),
    [
        ({"dtype": "float32"}, "cpu", "none", torch.float32),
        ({"dtype": "bfloat16"}, "cpu", "none", torch.bfloat16),
        ({"quantization": "none"}, "cpu", "none", torch.float32),
        ({"quantization": "int4"}, "cpu", "int4", torch.float16),
        ({"quantization": "int4", "dtype": "float32"}, "cpu", "int4", torch.float32),
        ({"backend": "reference"}, "reference", "none", torch.float32),
        ({"backend": "reference", "quantization": "int8"}, "reference", "int8", torch.float16),
    ],
    ids=str,
)
def test_formats_follow_from_what_is_asked_for(
    settings: dict[str, object], backend: str, quantization: str, kv_dtype: torch.dtype
) -> None:
    config = resolve(Settings(**settings), MIXTRAL, [], memory=100 * GIB)  # type: ignore[arg-type]
    assert (config.backend, config.quantization, config.kv_dtype) == (backend, quantization, kv_dtype)
    assert config.dtype == settings.get("dtype", "float32")


@pytest.mark.parametrize(
    ("settings", "gib"),
    [
        ({"dtype": "float32"}, 174.0),
        ({"dtype": "float16"}, 87.0),
        ({}, 46.2),
        ({"quantization": "int4"}, 25.9),
    ],
    ids=str,
)
def test_weights_are_counted_in_their_formats(settings: dict[str, object], gib: float) -> None:
    config = resolve(Settings(**settings), MIXTRAL, SPECS, memory=1000 * GIB)  # type: ignore[arg-type]
    assert config.weight_bytes / GIB == pytest.approx(gib, abs=0.1)


@pytest.mark.parametrize("missing", ["instructions", "head dimension"])
def test_what_the_native_backend_cannot_do_is_the_references(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, words = MIXTRAL, "--backend cpu: the native CPU kernels were not built"
    if missing == "instructions":
        monkeypatch.setattr(cpu, "instruction_sets", list)
    else:
        model = read_config({**SHAPE, "head_dim": 100})
        words = "--backend cpu: the native CPU kernels do not compute a head dimension of 100"
    config = resolve(Settings(), model, [], memory=100 * GIB)
    assert (config.backend, config.quantization) == ("reference", "none")
    with pytest.raises(StartupError, match=words):
        resolve(Settings(backend="cpu"), model, [], memory=100 * GIB)


def test_no_more_blocks_than_all_sequences_can_use() -> None:
    settings = Settings(max_num_seqs=2, max_model_len=1000)
    config = resolve(settings, MIXTRAL, [], memory=1000 * GIB)
    assert config.num_blocks == 2 * 63


def test_an_automatic_context_shrinks_to_what_fits() -> None:
    config = resolve(Settings(kv_cache_gib=1.0, dtype="float32"), MIXTRAL, [], memory=100 * GIB)
    assert config.max_model_len == 4096  # 256 KiB per token in float32
    assert config.num_blocks == 256
    assert resolve(Settings(kv_cache_gib=1.0), MIXTRAL, [], memory=100 * GIB).max_model_len == 8192


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_model_len": 40000}, "--max-model-len 40000 is over the model's 32768"),
        ({"max_model_len": 8192, "kv_cache_gib": 1.0}, "needs 2.00 GiB and 1.00 GiB"),
        ({"kv_cache_gib": 1e-6}, "raise --kv-cache-gib"),
        ({"kv_cache_gib": 200}, "200.0 GiB would be used and 100.0 GiB are left"),
    ],
)
def test_what_cannot_be_is_refused_by_name(settings: dict[str, object], words: str) -> None:
    with pytest.raises(StartupError, match=words):
        resolve(Settings(dtype="float32", **settings), MIXTRAL, [], memory=100 * GIB)  # type: ignore[arg-type]


def test_weights_larger_than_memory_are_refused_before_loading() -> None:
    with pytest.raises(StartupError, match=r"the weights need 174\.0 GiB as float32 and 21\.0 GiB"):
        resolve(Settings(dtype="float32"), MIXTRAL, SPECS, memory=21 * GIB)
    with pytest.raises(StartupError, match=r"the weights need 46\.2 GiB as int8 and 21\.0 GiB"):
        resolve(Settings(), MIXTRAL, SPECS, memory=21 * GIB)


def test_memory_of_this_machine_is_known() -> None:
    assert GIB // 4 < available_memory() < 1 << 50


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 20 * GIB),
        ({"memory.max": "max", "memory.current": str(GIB)}, 20 * GIB),
        ({"memory.max": str(4 * GIB), "memory.current": str(GIB)}, 3 * GIB),
        # File cache counts as used, and is there for the taking.
        (
            {
                "memory.max": str(4 * GIB),
                "memory.current": str(3 * GIB),
                "memory.stat": f"anon 5\ninactive_file {2 * GIB}\n",
            },
            3 * GIB,
        ),
        (
            {
                "memory/memory.limit_in_bytes": str(8 * GIB),
                "memory/memory.usage_in_bytes": str(3 * GIB),
                "memory/memory.stat": f"cache 1\ntotal_inactive_file {GIB}\n",
            },
            6 * GIB,
        ),
    ],
)
def test_a_containers_limit_is_obeyed(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {20 * GIB // 1024} kB\n")
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert available_memory(tmp_path) == expected
